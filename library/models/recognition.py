"""Which model a file is of, told by the names of its tensors, and the script that trains it."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource
from library.models.layout import unet as unet_layout


@dataclass(frozen=True)
class Kind:
    """Models that one script trains."""

    model: str  # "an SDXL model"
    network: str  # "a network for SDXL"
    script: str
    parts: tuple[str, ...]  # of tensors' names: only their checkpoints have one
    network_starts: tuple[str, ...]  # of tensors' names: only their LoRA files have one
    pipelines: tuple[str, ...]  # diffusers' classes, as model_index.json names them
    shared_starts: tuple[str, ...] = ()  # of tensors' names in its LoRA files: those of another kind too
    part: str = "U-Net"  # what every checkpoint of this kind has
    part_start: str = unet_layout.PREFIX  # of the names of that part's tensors


SD = Kind(
    "a Stable Diffusion 1.x or 2.x model",
    "a network for Stable Diffusion 1.x or 2.x",
    "train_network.py",
    ("cond_stage_model.",),
    ("lora_te_text_model_", "lora_unet_down_blocks_0_attentions_"),
    ("StableDiffusionPipeline",),
)
SDXL = Kind(
    "an SDXL model",
    "a network for SDXL",
    "sdxl_train_network.py",
    ("conditioner.embedders.",),
    (
        "lora_te1_",
        "lora_te2_",
        "lora_unet_input_blocks_",
        "lora_unet_middle_block_",
        "lora_unet_output_blocks_",
    ),
    ("StableDiffusionXLPipeline",),
)
SD3 = Kind(
    "a Stable Diffusion 3 model",
    "a network for Stable Diffusion 3",
    "sd3_train_network.py",
    ("joint_blocks.",),
    ("lora_unet_joint_blocks_", "lora_te3_"),
    ("StableDiffusion3Pipeline",),
    shared_starts=("lora_te1_", "lora_te2_"),
    part="MMDiT",
    part_start="joint_blocks.",
)
KINDS = (SD, SD3, SDXL)  # SD3's LoRA files have names of SDXL's too


def other_networks(own: Kind) -> tuple[tuple[str, str, str], ...]:
    """Return how names in LoRA files of other kinds start, what such a file is, and its training script."""
    others = [(start, kind) for kind in KINDS if kind != own for start in kind.network_starts]
    return tuple((start, kind.network, kind.script) for start, kind in others if start not in own.shared_starts)


def check(file: TensorSource, own: Kind) -> None:
    """Raise CheckpointError where the file is no checkpoint of this kind, and name the right script."""
    for kind in KINDS:
        if kind != own and any(part in name for name in file.shapes for part in kind.parts):
            raise CheckpointError(f"{file.path}: is {kind.model}. Train it with {kind.script}.")
    if any(name.startswith(("lora_unet_", "lora_te")) for name in file.shapes):
        raise CheckpointError(
            f"{file.path}: is a LoRA file. --pretrained_model_name_or_path needs the model it was trained on."
        )
    if not any(name.startswith((own.part_start, f"{unet_layout.PREFIX}{own.part_start}")) for name in file.shapes):
        raise CheckpointError(
            f"{file.path}: holds no {own.part} (no tensor starts with {own.part_start}). "
            "Give a full Stable Diffusion checkpoint."
        )


def check_pipeline(folder: object, pipeline: str, own: Kind) -> None:
    """Raise CheckpointError where a diffusers folder holds a pipeline of another kind, and name the right script."""
    for kind in KINDS:
        if kind != own and pipeline in kind.pipelines:
            raise CheckpointError(f"{folder}: is {kind.model}. Train it with {kind.script}.")
