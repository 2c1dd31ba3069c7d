"""The U-Net of SD 1.x, 2.x and XL: built from a file in the original layout, written to it, switched."""

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
HEAD_WIDTH = 64  # since SD 2.x
NUM_SIZES = 6  # what a U-Net is told of a picture: height and width of the file, top and left of the crop, and of it
SAMPLE_CELLS = 64  # diffusers' default picture size; nothing in training reads it


def build(
    file: TensorSource, has_wide_heads: bool, dtype: torch.dtype, *, pooled_width: int | None = None
) -> nn.Module:
    """Return diffusers' U-Net with the file's weights, its size read from the tensors' shapes.

    Args:
        file: names start at "input_blocks.".
        has_wide_heads: heads of width 64, as since SD 2.x, instead of 8 heads everywhere.
        dtype: of the weights in memory.
        pooled_width: of the pooled text that the U-Net is told beside the picture's sizes; None: it is told neither.
            Without, proj_in and proj_out are 1x1 convolutions, as sd-scripts builds them, so that SD 2.x LoRA files
            get the 4-D weights its readers know; with, they are linear layers, as there.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape, or it is an inpainting or upscaling model.
    """
    config = config_of(file, has_wide_heads, pooled_width)
    from diffusers import UNet2DConditionModel

    module = build_on_meta(lambda: UNet2DConditionModel(**config))
    table = layout.unet_table(layout.blocks_of(file.shapes))
    stored = {name: table.to_original(name) or name for name in module.state_dict()}
    require(file, stored.values(), "U-Net")
    tensors = ((name, file.read(original)) for name, original in stored.items())
    load_onto(module, tensors, dtype, str(file.path), "U-Net")
    return module


def config_of(file: TensorSource, has_wide_heads: bool, pooled_width: int | None = None) -> dict[str, Any]:
    """Return the arguments of diffusers' UNet2DConditionModel that fit the file's tensors."""
    try:
        blocks = layout.blocks_of(file.shapes)
        table = layout.unet_table(blocks)
        widths = [
            file.shapes[str(table.to_original(f"down_blocks.{level}.resnets.0.conv1.weight"))][0]
            for level in range(len(blocks.depths))
        ]
        channels = file.shapes["input_blocks.0.0.weight"][1]
        level = next(level for level, depth in enumerate(blocks.depths) if depth)
        context = f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        context_width = file.shapes[str(table.to_original(context))][1]
    except (KeyError, StopIteration) as error:
        raise _no_structure(file, error) from error
    if channels != 4:
        raise CheckpointError(
            f"{file.path}: the U-Net takes {channels} channels, expected 4. "
            "It is an inpainting, upscaling or editing model; give the plain text-to-image model."
        )
    conditioned = {} if pooled_width is None else _conditioned(file, pooled_width)
    return {
        "sample_size": SAMPLE_CELLS,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": blocks.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in blocks.depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(blocks.depths)],
        "cross_attention_dim": context_width,
        # named head *dim* in diffusers for history's sake: it is the number of heads
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if has_wide_heads else SD1_HEADS,
        # diffusers wants at least 1 and gives the middle what the last level has
        "transformer_layers_per_block": [max(1, depth) for depth in (*blocks.depths[:-1], _middle_depth(file, blocks))],
        **conditioned,
    }


def _no_structure(file: TensorSource, error: Exception) -> CheckpointError:
    """Return the error for names that are not those of a whole U-Net; error names the first that is missing."""
    return CheckpointError(
        f"{file.path}: the U-Net's tensors do not have the structure of Stable Diffusion "
        f"(stopped at {error or 'its attention'}). The file is incomplete or holds another kind of model."
    )


def _middle_depth(file: TensorSource, blocks: layout.UNetBlocks) -> int:
    """Return the depth of the last level and of the middle, which are the same where both have attention."""
    return blocks.depths[-1] or layout.depth_of("middle_block.1", file.shapes)


def _conditioned(file: TensorSource, pooled_width: int) -> dict[str, Any]:
    """Return the arguments of a U-Net that is told the pooled text and the picture's sizes."""
    told = "label_emb.0.0.weight"
    require(file, (told,), "U-Net")
    width = file.shapes[told][1]
    size_width, rest = divmod(width - pooled_width, NUM_SIZES)
    if size_width < 1 or rest:
        raise CheckpointError(
            f"{file.path}: the U-Net is told {width} numbers of text and sizes, which does not fit a pooled text of "
            f"{pooled_width}. The file mixes different models, or is of a model that is told other things."
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": size_width,
        "projection_class_embeddings_input_dim": width,
        "use_linear_projection": True,
    }


def original_tensors(unet: nn.Module, linear_projection: bool) -> dict[str, Tensor]:
    """Return the U-Net's weights under their names in a full checkpoint.

    Args:
        unet: diffusers' UNet2DConditionModel.
        linear_projection: write proj_in and proj_out as (out, in), as SD 2.x and XL files have them, instead of
            (out, in, 1, 1).
    """
    table = layout.unet_table(blocks_of(unet))
    written: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        if name.endswith((".proj_in.weight", ".proj_out.weight")):
            tensor = tensor.reshape(tensor.shape[:2] if linear_projection else (*tensor.shape[:2], 1, 1))
        written[f"{layout.PREFIX}{table.to_original(name)}"] = tensor
    return written


def block_indices(unet: nn.Module) -> dict[str, int]:
    """Return the block that each weight of the U-Net is in, by its name: 0 to 22 for SDXL.

    What the U-Net is told first, then the blocks of the way down, of the middle and of the way up, and the output
    last, as files number them.
    """
    table = layout.unet_table(blocks_of(unet))
    places = {name: str(table.to_original(name)).split(".") for name, _ in unet.named_parameters()}
    sizes = dict.fromkeys(("input_blocks", "middle_block", "output_blocks"), 0)
    for part, number, *_ in places.values():
        if part in sizes:
            sizes[part] = max(sizes[part], int(number) + 1)
    before = {"time_embed": 0, "label_emb": 0, "out": 1 + sum(sizes.values())}
    first = 1
    starts = {}
    for part, size in sizes.items():
        starts[part], first = first, first + size
    return {
        name: starts[part] + int(number) if part in starts else before[part]
        for name, (part, number, *_) in places.items()
    }


def weight_names(file: TensorSource) -> set[str]:
    """Return the names of the U-Net's tensors among those of a file, which start at "input_blocks.".

    Raises:
        CheckpointError: it has no such structure.
    """
    try:
        table = layout.unet_table(layout.blocks_of(file.shapes))
    except KeyError as error:
        raise _no_structure(file, error) from error
    return {name for name in file.shapes if table.to_library(name) is not None}


def blocks_of(unet: nn.Module) -> layout.UNetBlocks:
    """Return the block structure of diffusers' UNet2DConditionModel."""
    model: Any = unet
    attentions = [getattr(block, "attentions", None) for block in model.down_blocks]
    depths = tuple(len(modules[0].transformer_blocks) if modules else 0 for modules in attentions)
    return layout.UNetBlocks(depths, len(model.down_blocks[0].resnets))


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
