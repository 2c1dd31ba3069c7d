"""Whole models written as diffusers folders, which transformers 4 and 5 read alike; nothing is asked of the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.models import clip, clip_tokens, pickling, streaming, whole_model
from library.models.clip_tokens import END_WORD, START_WORD
from library.models.family import Parts
from library.models.whole_model import Kept

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
KEPT = ("scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt", "vae/config.json", "unet/config.json", INDEX)
FIRST_WORD = "!"  # of the vocabulary: its number is 0
FORMAT = {"format": "pt"}  # transformers reads no safetensors without it

NOISING = {  # of every SD model
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
PNDM = {"_class_name": "PNDMScheduler", **NOISING, "set_alpha_to_one": False, "skip_prk_steps": True}
DDIM = {"_class_name": "DDIMScheduler", **NOISING, "set_alpha_to_one": False, "clip_sample": False}
EULER = {"_class_name": "EulerDiscreteScheduler", **NOISING, "timestep_spacing": "leading"}


@dataclass(frozen=True)
class FolderKind:
    """What a family's diffusers folders hold besides weights."""

    pipeline: str  # diffusers' class
    scheduler: Mapping[str, Any]
    prediction_type: str
    text_folders: tuple[str, ...]
    tokenizers: tuple[clip_tokens.Kind, ...]
    has_linear_projections: bool  # proj_in and proj_out of the U-Net as (out, in), not (out, in, 1, 1)
    latent_scale: float
    cells: int  # sides of the latents that samplers make where nobody names a size
    absent: tuple[str, ...]  # parts that the index names as missing
    more: Mapping[str, Any]  # in the index
    tokenizer_cache_dir: str | None


def kept(folder: Path) -> Kept:
    """Return the small files of a diffusers folder, by their path in it."""
    files = {path for pattern in KEPT for path in folder.glob(pattern)}
    return Kept(files={path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)})


def write(folder: Path, parts: Parts, kept: Kept, kind: FolderKind, *, form: str, dtype: torch.dtype | None) -> None:
    """Write a whole model into an empty folder; half of one is left where this fails.

    Args:
        folder: is there.
        parts: with all text encoders and the VAE.
        kept: of the source: its scheduler, tokenizers and sizes, where it was a folder.
        kind: of the family.
        form: whole_model.DIFFUSERS: weights in .bin files; whole_model.DIFFUSERS_SAFETENSORS.
        dtype: of the weights in the files; None: as in memory.

    Raises: OSError.
    """
    assert parts.vae is not None, "only whole models are written"
    ending = ".safetensors" if form == whole_model.DIFFUSERS_SAFETENSORS else ".bin"
    for part, module, own in (
        ("unet", parts.denoiser, _unet_config(parts.denoiser, kept, kind)),
        ("vae", parts.vae, _vae_config(parts.vae, kept, kind)),
    ):
        _write_json(folder / part / "config.json", own)
        tensors = module.state_dict()
        if part == "unet":
            tensors = _projections(tensors, kind.has_linear_projections)
        _write_weights(folder / part / f"diffusion_pytorch_model{ending}", tensors, dtype)
    name = "model" if ending == ".safetensors" else "pytorch_model"
    for part, text_encoder in zip(kind.text_folders, parts.text_encoders, strict=True):
        _write_json(folder / part / "config.json", _text_config(text_encoder, dtype))
        _write_weights(folder / part / f"{name}{ending}", clip.separate_tensors(text_encoder), dtype)
    for index, tokenizer in enumerate(kind.tokenizers):
        place = "tokenizer" if index == 0 else f"tokenizer_{index + 1}"
        _write_tokenizer(folder / place, tokenizer, kept, kind.tokenizer_cache_dir)
    scheduler = {**kept_json(kept, SCHEDULER, kind.scheduler), "prediction_type": kind.prediction_type}
    _write_json(folder / SCHEDULER, scheduler)
    _write_json(folder / INDEX, _index(kept, kind, scheduler))  # last: with it the folder is a model


def kept_json(kept: Kept, name: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """Return a kept file's content, or the default where the source had none that can be read."""
    try:
        content = json.loads(kept.files[name])
    except (KeyError, ValueError):
        return dict(default)
    return content if isinstance(content, dict) else dict(default)


def _version() -> str:
    import diffusers

    return diffusers.__version__


def _config(module: nn.Module) -> dict[str, Any]:
    """Return the configuration of a module of diffusers or transformers, without where it was loaded from."""
    model: Any = module
    own: Any = model if hasattr(model, "to_json_string") else model.config
    content: dict[str, Any] = json.loads(own.to_json_string())
    content.pop("_name_or_path", None)
    return content


def _unet_config(unet: nn.Module, kept: Kept, kind: FolderKind) -> dict[str, Any]:
    source = kept_json(kept, "unet/config.json", {"sample_size": kind.cells})
    sizes = {"sample_size": source["sample_size"]} if "sample_size" in source else {}
    return {**_config(unet), **sizes, "use_linear_projection": kind.has_linear_projections}


def _vae_config(vae: nn.Module, kept: Kept, kind: FolderKind) -> dict[str, Any]:
    """Return the VAE's configuration: what its weights do not tell is the source's, else the family's."""
    default: dict[str, Any] = {"scaling_factor": kind.latent_scale, "sample_size": kind.cells * 8}
    source = kept_json(kept, "vae/config.json", default)
    told: dict[str, Any] = {
        name: source[name] for name in ("scaling_factor", "sample_size", "force_upcast") if name in source
    }
    return {**_config(vae), **default, **told}


def _text_config(text_encoder: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    weights = dtype or next(text_encoder.parameters()).dtype
    config = {name: value for name, value in _config(text_encoder).items() if name != "dtype"}
    # torch_dtype is the name that every version of transformers knows
    return {
        **config,
        "architectures": [type(text_encoder).__name__],
        "torch_dtype": str(weights).removeprefix("torch."),
    }


def _projections(tensors: Mapping[str, Tensor], is_linear: bool) -> dict[str, Tensor]:
    """Return the U-Net's tensors with proj_in and proj_out as linear layers or as 1x1 convolutions."""
    written = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".proj_in.weight", ".proj_out.weight")):
            written[name] = tensor.reshape(tensor.shape[:2] if is_linear else (*tensor.shape[:2], 1, 1))
    return written


def _write_weights(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    pieces = {name: (tensor,) for name, tensor in tensors.items()}
    layout = whole_model.layout_of(pieces, dtype)

    def make(name: str) -> Tensor:
        return whole_model.joined(pieces[name], dtype)

    if path.suffix == ".safetensors":
        streaming.fill(path, layout, make, FORMAT, f"save {path.parent.name}")
    else:
        pickling.fill(path, layout, make, None, f"save {path.parent.name}")


def _write_tokenizer(folder: Path, tokenizer: clip_tokens.Kind, kept: Kept, cache_dir: str | None) -> None:
    """Write the source's tokenizer, or one as every version of transformers reads it."""
    own = {name: content for name, content in kept.files.items() if name.startswith(f"{folder.name}/")}
    folder.mkdir()
    for name, content in own.items():
        (folder.parent / name).write_bytes(content)
    if not own:
        words = {"bos_token": START_WORD, "eos_token": END_WORD, "unk_token": END_WORD}
        words["pad_token"] = FIRST_WORD if tokenizer.pad == 0 else END_WORD
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip_tokens.WINDOW, "do_lower_case": True}
        _write_json(folder / "tokenizer_config.json", {**config, **words})
        _write_json(folder / "special_tokens_map.json", words)
    if not (folder / "vocab.json").is_file():  # newer versions of transformers keep tokenizer.json alone
        if (folder / "tokenizer.json").is_file():
            vocabulary = clip_tokens.read_vocabulary(folder)
        else:
            vocabulary = clip_tokens.cached_vocabulary(cache_dir, tokenizer.name)
        clip_tokens.write_vocabulary(folder, vocabulary)


def _index(kept: Kept, kind: FolderKind, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says which classes the folder's parts are of."""
    source = kept_json(kept, INDEX, {})
    plain = {name: value for name, value in source.items() if not isinstance(value, list) and not name.startswith("_")}
    parts: dict[str, list[str | None]] = {name: [None, None] for name in kind.absent}
    parts |= {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DConditionModel"]}
    parts |= {"vae": ["diffusers", "AutoencoderKL"]}
    for index, text_folder in enumerate(kind.text_folders):
        parts[text_folder] = ["transformers", "CLIPTextModel" if index == 0 else "CLIPTextModelWithProjection"]
        parts[text_folder.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return {"_class_name": kind.pipeline, "_diffusers_version": _version(), **plain, **kind.more, **parts}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
