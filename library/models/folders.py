"""Models as diffusers folders, on disk or on the Hugging Face hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.errors import CheckpointError
from library.models import clip, recognition
from library.models.checkpoint import PICKLED, open_tensors

DENOISER_WEIGHTS = "diffusion_pytorch_model"
TEXT_ENCODER_WEIGHTS = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin")
DENOISER_FILES = tuple(f"{DENOISER_WEIGHTS}{end}" for end in (".safetensors", ".fp16.safetensors"))
VAE_WEIGHTS = tuple(f"{DENOISER_WEIGHTS}{end}" for end in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"))


def is_file(name: str) -> bool:
    """Say whether this names a model file, present or missing, rather than a folder or a hub id."""
    path = Path(name)
    return path.is_file() or (not path.is_dir() and path.suffix in (".safetensors", *PICKLED))


def model_folder(name: str, own: recognition.Kind = recognition.SD) -> Path:
    """Return the local folder of a diffusers model; a hub id is fetched into the hub's own cache.

    Args:
        name: --pretrained_model_name_or_path.
        own: what it must be.

    Raises:
        CheckpointError: not there, or a model of another family.
    """
    folder = Path(name)
    if not folder.is_dir():
        import diffusers

        pipeline = getattr(diffusers, own.pipelines[0])
        unneeded: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        try:
            folder = Path(pipeline.download(name, **unneeded))
        except (OSError, ValueError) as error:
            raise _not_found(name, error) from error
    _check_pipeline(folder, own)
    return folder


def load_denoiser(folder: Path, dtype: torch.dtype, *, is_mapped: bool = True) -> nn.Module:
    """Return the U-Net of a diffusers folder."""
    from diffusers import UNet2DConditionModel

    plain = any((folder / "unet").glob(f"{DENOISER_WEIGHTS}[.-][!f]*"))  # one file, or the first of several
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # diffusers leaves it to Python to close a file it read
            denoiser: Any = UNet2DConditionModel.from_pretrained(
                folder,
                subfolder="unet",
                torch_dtype=dtype,
                variant=None if plain else "fp16",
                local_files_only=True,
                use_safetensors=any((folder / "unet").glob("*.safetensors")),  # else diffusers warns of .bin files
                disable_mmap=not is_mapped,
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its U-Net cannot be loaded ({_first_line(error)}).") from error
    return denoiser.requires_grad_(False).eval()


def load_text_encoder(
    folder: Path,
    dtype: torch.dtype,
    part: str = "text_encoder",
    *,
    has_projection: bool = False,
    is_mapped: bool = True,
) -> nn.Module:
    """Return a text encoder of a diffusers folder, whichever transformers wrote its names.

    Args:
        folder: of the whole model.
        dtype: of the weights in memory.
        part: the text encoder's folder in it.
        has_projection: whether it also makes a pooled text.
        is_mapped: whether its file is mapped into memory.

    Raises:
        CheckpointError: weights or configuration are missing or do not fit.
    """
    from transformers import CLIPTextConfig

    place, weights = folder / part, text_encoder_file(folder, part)
    try:
        config = CLIPTextConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: config.json cannot be read ({_first_line(error)}).") from error
    return clip.build(open_tensors(weights, is_mapped=is_mapped), dtype, config, has_projection=has_projection)


def text_encoder_file(folder: Path, part: str = "text_encoder") -> Path:
    """Return the file with a text encoder's weights of a diffusers folder. Raises: CheckpointError: there is none."""
    return _first_file(folder / part, TEXT_ENCODER_WEIGHTS, "text encoder")


def vae_file(name: str) -> Path:
    """Return the file with a VAE's weights, for a file, a folder (its own or a whole model's) or a hub id.

    Raises:
        CheckpointError: there is none.
    """
    if is_file(name):
        return Path(name)
    folder = Path(name)
    if folder.is_dir():
        return _first_file(folder / "vae" if (folder / "vae").is_dir() else folder, VAE_WEIGHTS, "VAE")
    from huggingface_hub import hf_hub_download

    reasons: list[Exception] = []
    for candidate in (f"{place}{weights}" for place in ("vae/", "") for weights in VAE_WEIGHTS):
        try:
            return Path(hf_hub_download(name, candidate))
        except (OSError, ValueError) as error:  # the repository may have the next one
            reasons.append(error)
    raise _not_found(name, reasons[0])


def _first_file(folder: Path, names: tuple[str, ...], part: str) -> Path:
    """Return the first of these files that the folder has, or raise CheckpointError."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds no {part} weights (looked for {', '.join(names)}).")


def _check_pipeline(folder: Path, own: recognition.Kind) -> None:
    """Raise CheckpointError where a folder holds another family, or no pipeline at all."""
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        denoiser = "transformer" if own == recognition.SD3 else "unet"
        if (folder / denoiser).is_dir() and (folder / "text_encoder").is_dir():
            return
        raise CheckpointError(
            f"{folder}: is not a diffusers model folder (no usable model_index.json). "
            "Give such a folder or a model file."
        ) from error
    recognition.check_pipeline(folder, kind, own)


def _not_found(name: str, error: Exception) -> CheckpointError:
    """Return the error for a name that is no file, no folder and not to be had from the hub."""
    return CheckpointError(
        f"{name}: neither a file nor a folder, and not loadable from the Hugging Face hub ({_first_line(error)}). "
        "Check the path, or the connection if it is a hub id."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
