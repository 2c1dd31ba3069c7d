"""The modules that a LoRA can adapt, under the names that LoRA files use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from library.models import clip, unet
from library.models.family import Absent, LoraTarget
from library.models.layout import clip as clip_layout
from library.models.layout import mmdit_lora
from library.models.layout import unet as unet_layout

T5_PREFIX = "lora_te3"


def of(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the targets of models whose family is not known, told by their structure.

    Args:
        text_encoders: transformers' CLIP text models; the only one of SD 1.x and 2.x, or both of SDXL, in order. Of
            SD3 those two and T5, `Absent` where one is not there.
        denoiser: diffusers' U-Net, or an MMDiT under the original names.
    """
    if hasattr(denoiser, "joint_blocks"):
        yield from of_sd3(text_encoders, denoiser)
        return
    is_told_sizes = getattr(denoiser, "add_embedding", None) is not None
    for index, text_encoder in enumerate(text_encoders):
        is_one_of_several = is_told_sizes or len(text_encoders) > 1
        yield from of_text_encoder(text_encoder, f"lora_te{index + 1}" if is_one_of_several else "lora_te", index)
    yield from of_unet_by_original_names(denoiser) if is_told_sizes else of_unet(denoiser)


def of_sd3(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the targets of SD3: CLIP-L, CLIP-G, T5, then the MMDiT.

    Args:
        text_encoders: in that order, `Absent` where one is not there; those behind the last may be left out.
        denoiser: the MMDiT.
    """
    for index, text_encoder in enumerate(text_encoders):
        if isinstance(text_encoder, Absent):
            continue
        if hasattr(getattr(text_encoder, "encoder", None), "block"):
            yield from of_t5(text_encoder, T5_PREFIX, index)
        else:
            yield from of_text_encoder(text_encoder, f"lora_te{index + 1}", index)
    yield from of_mmdit(denoiser)


def of_text_encoder(text_encoder: nn.Module, prefix: str, index: int = 0) -> Iterator[LoraTarget]:
    """Yield the targets of a text encoder.

    Args:
        text_encoder: a CLIP text model of transformers.
        prefix: of its names: "lora_te", or "lora_te1" where there are several.
        index: which of several it is, from 0.
    """
    model: Any = clip.inner(text_encoder)
    for path in clip_layout.lora_paths(len(model.encoder.layers)):
        name = f"{prefix}_text_model_{path.replace('.', '_')}"
        yield LoraTarget(name, model.get_submodule(path), "text_encoder", "attention", None, encoder=index)


def of_unet(denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the targets of a U-Net under diffusers' names, as files for SD 1.x and 2.x have them."""
    modules = dict(denoiser.named_modules())
    for entry in unet_layout.lora_paths():
        if entry.path in modules:
            yield LoraTarget(_name(entry.path), modules[entry.path], "unet", entry.kind, entry.block)


def of_unet_by_original_names(denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the targets of a U-Net under the original layout's names, as files for SDXL have them, or diffusers'."""
    modules = dict(denoiser.named_modules())
    for entry in unet_layout.original_lora_paths(unet.blocks_of(denoiser)):
        if entry.path in modules:
            yield LoraTarget(
                _name(entry.original),
                modules[entry.path],
                "unet",
                entry.kind,
                entry.block,
                alias=_name(entry.path),
            )


def of_mmdit(denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the targets of an MMDiT, whose module paths are the original layout's."""
    modules = dict(denoiser.named_modules())
    blocks: Any = denoiser.joint_blocks
    for entry in mmdit_lora.lora_paths(len(blocks)):
        if entry.path in modules:
            yield LoraTarget(_name(entry.path), modules[entry.path], "unet", entry.kind, entry.block)


def of_t5(text_encoder: nn.Module, prefix: str, index: int) -> Iterator[LoraTarget]:
    """Yield the targets of a T5 text encoder.

    Args:
        text_encoder: transformers' T5EncoderModel.
        prefix: of its names, "lora_te3".
        index: which of several text encoders it is, from 0.
    """
    model: Any = text_encoder
    for path in mmdit_lora.t5_lora_paths(len(model.encoder.block)):
        name = f"{prefix}_{path.replace('.', '_')}"
        yield LoraTarget(name, model.get_submodule(path), "text_encoder", mmdit_lora.T5, None, encoder=index)


def _name(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"
