"""The U-Net of SD 1.x and 2.x: built from a file in the original layout, written to it, switched."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource, build_on_meta, load_onto, require
from library.models.layout import unet as layout

log = logging.getLogger(__name__)

SD1_HEADS = 8
SD2_HEAD_WIDTH = 64
SAMPLE_CELLS = 64  # diffusers' default picture size; nothing in training reads it


def build(file: TensorSource, v2: bool, dtype: torch.dtype) -> nn.Module:
    """Return diffusers' U-Net with the file's weights, its size read from the tensors' shapes.

    Args:
        file: names start at "input_blocks.".
        v2: heads of width 64 instead of 8 heads everywhere. proj_in and proj_out are 1x1 convolutions in either
            case, as sd-scripts builds them, so that SD 2.x LoRA files get the 4-D weights its readers know.
        dtype: of the weights in memory.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape, or it is an inpainting or upscaling model.
    """
    config = config_of(file, v2)
    from diffusers import UNet2DConditionModel

    module = build_on_meta(lambda: UNet2DConditionModel(**config))
    table = layout.unet_table(layout.blocks_of(file.shapes))
    stored = {name: table.to_original(name) or name for name in module.state_dict()}
    require(file, stored.values(), "U-Net")
    tensors = ((name, file.read(original)) for name, original in stored.items())
    load_onto(module, tensors, dtype, str(file.path), "U-Net")
    return module


def config_of(file: TensorSource, v2: bool) -> dict[str, Any]:
    """Return the arguments of diffusers' UNet2DConditionModel that fit the file's tensors."""
    try:
        blocks = layout.blocks_of(file.shapes)
        table = layout.unet_table(blocks)
        widths = [
            file.shapes[str(table.to_original(f"down_blocks.{level}.resnets.0.conv1.weight"))][0]
            for level in range(len(blocks.attention))
        ]
        channels = file.shapes["input_blocks.0.0.weight"][1]
        level = blocks.attention.index(True)
        context = f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        context_width = file.shapes[str(table.to_original(context))][1]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: the U-Net's tensors do not have the structure of Stable Diffusion 1.x or 2.x "
            f"(stopped at {error}). The file is incomplete or holds another kind of model."
        ) from error
    if channels != 4:
        raise CheckpointError(
            f"{file.path}: the U-Net takes {channels} channels, expected 4. "
            "It is an inpainting, upscaling or editing model; give the plain text-to-image model."
        )
    return {
        "sample_size": SAMPLE_CELLS,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": blocks.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in blocks.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(blocks.attention)],
        "cross_attention_dim": context_width,
        # named head *dim* in diffusers for history's sake: it is the number of heads
        "attention_head_dim": [max(1, width // SD2_HEAD_WIDTH) for width in widths] if v2 else SD1_HEADS,
    }


def original_tensors(unet: nn.Module, linear_projection: bool) -> dict[str, Tensor]:
    """Return the U-Net's weights under their names in a full checkpoint.

    Args:
        unet: diffusers' UNet2DConditionModel.
        linear_projection: write proj_in and proj_out as (out, in), as SD 2.x files have them, instead of
            (out, in, 1, 1).
    """
    model: Any = unet
    blocks = layout.UNetBlocks(
        tuple(hasattr(block, "attentions") for block in model.down_blocks), len(model.down_blocks[0].resnets)
    )
    table = layout.unet_table(blocks)
    written: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        if name.endswith((".proj_in.weight", ".proj_out.weight")):
            tensor = tensor.reshape(tensor.shape[:2] if linear_projection else (*tensor.shape[:2], 1, 1))
        written[f"{layout.PREFIX}{table.to_original(name)}"] = tensor
    return written


def set_attention(unet: nn.Module, kind: str) -> None:
    """Choose how the U-Net computes attention: "sdpa", or "xformers" where it works (a warning and sdpa if not)."""
    # diffusers' set_attention_backend is silently without effect on this class, so processors are set by hand
    from diffusers.models.attention_processor import AttnProcessor2_0

    model: Any = unet
    assert kind in ("sdpa", "xformers"), kind
    if kind == "xformers":
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError, RuntimeError) as error:
            log.warning("--xformers cannot be used here (%s); --sdpa is used instead.", str(error).partition("\n")[0])
        else:
            return
    model.set_attn_processor(AttnProcessor2_0())
