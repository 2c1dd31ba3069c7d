"""Whole training runs for the tests: model families, pictures, dataset configs, and what a run leaves behind."""

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors import safe_open

from library.batch import Batch
from library.cli import main
from library.models.family import ModelFamily, Parts

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240  # for processes of their own on a busy machine; free ones take about 15 s
GREY = 51  # of 255: a weight of exactly 0.2


@dataclass(frozen=True)
class Family:
    """A row of these tests: an entry script, its model family and a tiny checkpoint. A new family is a new row."""

    script: str
    place: str  # of the family's class, as the entry script names it
    checkpoint: Callable[[], Path]
    folder: Callable[[], Path]  # the same model as a diffusers folder
    base_model_version: str
    architecture: str  # modelspec
    keys: str  # the reference's key names, in tests/data/networks
    pipeline: str = "StableDiffusionPipeline"  # of diffusers
    # how names in the last layer of the (first) text encoder begin, which --clip_skip 2 or the family leaves out, and
    # in the layer before
    last_layers: tuple[str, str] = tuple(f"lora_te_text_model_encoder_layers_{index}_" for index in (11, 10))
    is_last_layer_read: bool = True
    text_groups: tuple[str, ...] = ("te",)  # how names of text encoders' modules begin after lora_
    text_prefix: str = "cond_stage_model"  # of a text encoder in a checkpoint
    idle: tuple[str, ...] = ()  # options that other families have, and this one warns about
    refused: tuple[str, ...] = ()  # options and network modules that other families have, and this one cannot carry out
    right: tuple[str, ...] = ()  # cases of test_wrong_input.py that are no mistakes with this family
    lacks: str = "$^"  # a pattern for the keys of modules that the tiny checkpoint has fewer of than the true one
    switches: tuple[str, ...] = ()  # options that say which model of the family it is
    resolution: int = 64

    def run(self, *argv: object) -> int:
        """Return the exit code of a training with these arguments, in this process."""
        return main(self.script, self.place, [str(argument) for argument in argv])

    def skip_unless_taken(self, *words: object, idle: bool = False) -> None:
        """Skip a test of options or modules that this family refuses or, with idle, has no use for."""
        if set(words) & {*self.refused, *(self.idle if idle else ())}:
            pytest.skip("not with this family")

    def load(self) -> tuple[ModelFamily, Parts]:
        """Return the family and the models of the tiny checkpoint, float32."""
        module, _, name = self.place.partition(":")
        family = getattr(importlib.import_module(module), name)(**dict.fromkeys(self.switches, True))
        return family, family.load(str(self.checkpoint()), None, torch.float32)


SD15 = Family(
    script="train_network",
    place="library.models.sd:Sd",
    checkpoint=tiny_models.tiny_sd15,
    folder=tiny_models.tiny_sd15_folder,
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1/lora",
    keys="lora_keys_sd15.json.gz",
)
SD21 = Family(
    script="train_network",
    place="library.models.sd:Sd",
    checkpoint=tiny_models.tiny_sd21,
    folder=tiny_models.tiny_sd21_folder,
    base_model_version="sd_v2",
    architecture="stable-diffusion-v2-512/lora",
    keys="lora_keys_sd21.json.gz",
    switches=("v2",),
)
SD21_V = replace(
    SD21,
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v/lora",
    switches=("v2", "v_parameterization"),
)
SDXL = Family(
    script="sdxl_train_network",
    place="library.models.sdxl:Sdxl",
    checkpoint=tiny_models.tiny_sdxl,
    folder=tiny_models.tiny_sdxl_folder,
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base/lora",
    keys="lora_keys_sdxl.json.gz",
    pipeline="StableDiffusionXLPipeline",
    last_layers=("lora_te1_text_model_encoder_layers_2_", "lora_te1_text_model_encoder_layers_1_"),
    is_last_layer_read=False,
    text_groups=("te1", "te2"),
    text_prefix="conditioner.embedders.0",
    idle=("--clip_skip",),
    right=("checkpoint of SDXL", "network of SDXL", "layers that are not there"),
    lacks=r"lora_te1_.*_layers_([3-9]|1\d)_|lora_te2_.*_layers_([4-9]|[1-3]\d)_|_transformer_blocks_[2-9]_"
    r"|_(input_blocks_[45]|output_blocks_[345])_1_transformer_blocks_1_",
)
SD35M = Family(
    script="sd3_train_network",
    place="library.models.sd3:Sd3",
    checkpoint=functools.partial(tiny_models.tiny_sd3, "5-medium"),
    folder=functools.partial(tiny_models.tiny_sd3_folder, "5-medium"),
    base_model_version="5-medium",
    architecture="stable-diffusion-3-5-medium/lora",
    keys="lora_keys_sd35m.json.gz",
    pipeline="StableDiffusion3Pipeline",
    last_layers=("lora_te1_text_model_encoder_layers_2_", "lora_te1_text_model_encoder_layers_1_"),
    text_groups=("te1", "te2"),
    text_prefix="text_encoders.clip_l",
    idle=("--clip_skip", "--max_token_length"),
    refused=("--weighted_captions", "networks.oft"),
    right=("checkpoint of SD 3", "layers that are not there"),
    lacks=r"lora_te1_.*_layers_([3-9]|1\d)_|lora_te2_.*_layers_([4-9]|[1-3]\d)_|joint_blocks_([4-9]|\d\d)_"
    r"|joint_blocks_[23]_x_block_attn2|joint_blocks_3_context_block_(attn_proj|mlp)",
)
SD3M = replace(
    SD35M,
    checkpoint=functools.partial(tiny_models.tiny_sd3, "medium"),
    folder=functools.partial(tiny_models.tiny_sd3_folder, "medium"),
    base_model_version="medium",
    architecture="stable-diffusion-3-medium/lora",
    keys="lora_keys_sd3m.json.gz",
)
FAMILIES = (SD15, SDXL, SD35M)  # every test of whole runs; test_sd2.py tells what differs in the others


@dataclass(frozen=True)
class Pictures:
    """Folders of small pictures with captions, 64 pixels a side."""

    photos: Path  # RGB
    photo_masks: Path  # white in the left half, black in the right
    grey_masks: Path  # GREY everywhere
    black_masks: Path
    cutouts: Path  # RGBA: opaque in the left half, transparent in the right
    veils: Path  # RGBA: GREY of 255 opaque everywhere
    regularisation: Path  # RGB


def half(value: int = 255) -> np.ndarray:
    """Return a mask (64, 64) uint8 that is `value` in its left half and 0 in its right."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = value
    return mask


def picture(seed: int) -> np.ndarray:
    """Return smooth colours (64, 64, 3) uint8 that depend on the seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


def save(folder: Path, name: str, pixels: np.ndarray, caption: str | None = None) -> Path:
    """Write name.png, with its caption beside it; return the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def draw_pictures(folder: Path, count: int = 2) -> Pictures:
    """Draw `count` pictures of each kind."""
    made = Pictures(*(folder / name for name in Pictures.__dataclass_fields__))
    for i in range(count):
        save(made.photos, f"photo{i}", picture(i), f"zundamon, photo {i}, sitting")
        save(made.photo_masks, f"photo{i}", half())
        save(made.grey_masks, f"photo{i}", np.full((64, 64), GREY, np.uint8))
        save(made.black_masks, f"photo{i}", np.zeros((64, 64), np.uint8))
        save(made.cutouts, f"cutout{i}", np.dstack([picture(10 + i), half()]), f"cat, cutout {i}")
        veil = np.full((64, 64), GREY, np.uint8)
        save(made.veils, f"veil{i}", np.dstack([picture(i), veil]), f"zundamon, photo {i}, sitting")
        save(made.regularisation, f"reg{i}", picture(20 + i), "a person")
    return made


def subset(image_dir: Path, **keys: object) -> dict[str, object]:
    """Return a subset of a dataset config as the documentation writes it."""
    return {"image_dir": str(image_dir), "caption_extension": ".txt", **keys}


def write_toml(path: Path, *subsets: Mapping[str, object], **dataset: object) -> Path:
    """Write a dataset config of one dataset; return its path."""
    lines = ["[[datasets]]", *_lines({"resolution": 64, "batch_size": 2, **dataset})]
    for keys in subsets:
        lines += ["[[datasets.subsets]]", *_lines(keys)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _lines(keys: Mapping[str, object]) -> list[str]:
    written = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return [f"{key} = {json.dumps(value)}" for key, value in written.items()]


@dataclass(frozen=True)
class Trained:
    """A run that ended well."""

    folder: Path
    argv: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The LoRA at the end of the run."""
        return self.folder / "out" / "lora.safetensors"

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The LoRA's tensors by name."""
        return tensors_of(self.file)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The LoRA's metadata."""
        return metadata_of(self.file)

    @cached_property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return self.curve("loss/current")

    def curve(self, tag: str) -> list[float]:
        """Return a TensorBoard curve, step by step."""
        return [event.value for event in events_of(self.folder / "logs").Scalars(tag)]

    def names(self, pattern: str = "*.safetensors") -> list[str]:
        """Return the names of files in the output folder, sorted."""
        return sorted(path.name for path in (self.folder / "out").glob(pattern))


def arguments(family: Family, folder: Path, dataset_config: Path | None, *more: object, seed: object = 7) -> list[str]:
    """Return the command line of a short LoRA training, without the script's name; seed None leaves --seed out."""
    argv: list[object] = ["--pretrained_model_name_or_path", family.checkpoint(), "--output_dir", folder / "out"]
    argv += ["--output_name", "lora", "--network_module", "networks.lora", "--learning_rate", "1e-3"]
    argv += ["--max_train_steps", 2, "--max_data_loader_n_workers", 0, "--logging_dir", folder / "logs"]
    argv += [f"--{switch}" for switch in family.switches]
    argv += [] if seed is None else ["--seed", seed]
    argv += [] if dataset_config is None else ["--dataset_config", dataset_config]
    return [str(argument) for argument in [*argv, *more]]


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, which is thereby found whole."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def metadata_of(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def uncropped_batch() -> Batch:
    """Return a batch of one picture of 64 pixels of which only the sizes are known."""
    size, corner = torch.tensor([[64, 64]]), torch.tensor([[0, 0]])
    return Batch(("",), ("",), None, None, None, None, torch.ones(1), size, corner, size)


def events_of(logs: Path) -> Any:
    """Return the TensorBoard events of the one run in a logging folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = logs.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file)).Reload()


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names whose tensors are not bit-equal, or that only one file has."""
    shared = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {name for name in shared if not torch.equal(one[name], other[name])})


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run in a process of its own, on the CPU, that keeps its caches in folder."""
    return {**os.environ, "XDG_CACHE_HOME": str(folder), "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "default"}


def launch(family: Family, num_processes: int, argv: list[str], folder: Path) -> str:
    """Train with several processes on the CPU, which must end well; return their messages."""
    several = ["--standalone", "--nproc_per_node", str(num_processes)]  # accelerate launch starts them on GPUs only
    command = [sys.executable, "-m", "torch.distributed.run", *several, str(ROOT / f"{family.script}.py"), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(folder), timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr
