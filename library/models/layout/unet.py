"""Names of the U-Net: the original (LDM) layout beside diffusers', and the order and names of its LoRA modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.models.layout.keys import KeyTable, beneath

PREFIX = "model.diffusion_model."  # in a full checkpoint

RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
OUTSIDE = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
MIDDLE = (
    *beneath("middle_block.0", "mid_block.resnets.0", RESNET),
    ("middle_block.1", "mid_block.attentions.0"),
    *beneath("middle_block.2", "mid_block.resnets.1", RESNET),
)


@dataclass(frozen=True)
class UNetBlocks:
    """The block structure of a U-Net: SD 1.x and 2.x are (True, True, True, False) with 2 layers."""

    attention: tuple[bool, ...]  # per level, finest first
    layers: int  # resnets a level on the way down; one more on the way up


def blocks_of(shapes: Mapping[str, Sequence[int]]) -> UNetBlocks:
    """Return the block structure that original tensor names (without PREFIX) show.

    Raises:
        KeyError: the names are not those of a U-Net in the original layout.
    """
    attention: list[bool] = []
    layers: list[int] = []
    open_level = False
    index = 1
    while f"input_blocks.{index}.0.in_layers.2.weight" in shapes or f"input_blocks.{index}.0.op.weight" in shapes:
        if f"input_blocks.{index}.0.op.weight" in shapes:
            open_level = False
        else:
            if not open_level:
                attention.append(f"input_blocks.{index}.1.proj_in.weight" in shapes)
                layers.append(0)
                open_level = True
            layers[-1] += 1
        index += 1
    if not layers:
        raise KeyError("input_blocks.1.0.in_layers.2.weight")
    return UNetBlocks(tuple(attention), layers[0])


def unet_table(blocks: UNetBlocks) -> KeyTable:
    """Return the names of every module of a U-Net with these blocks."""
    pairs = [*OUTSIDE, *MIDDLE]
    levels = len(blocks.attention)
    index = 1
    for level, has_attention in enumerate(blocks.attention):
        for layer in range(blocks.layers):
            pairs += beneath(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            if has_attention:
                pairs.append((f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"))
            index += 1
        if level < levels - 1:
            pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            index += 1
    index = 0
    for level, has_attention in enumerate(reversed(blocks.attention)):
        for layer in range(blocks.layers + 1):
            pairs += beneath(f"output_blocks.{index}.0", f"up_blocks.{level}.resnets.{layer}", RESNET)
            if has_attention:
                pairs.append((f"output_blocks.{index}.1", f"up_blocks.{level}.attentions.{layer}"))
            if layer == blocks.layers and level < levels - 1:
                position = 2 if has_attention else 1
                pairs.append((f"output_blocks.{index}.{position}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
            index += 1
    return KeyTable(tuple(pairs))


# ---- LoRA: the names in files and their order, frozen; diffusers' module paths happen to be the same -------------
ATTENTION_LORA = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER_LORA = (
    *(f"attn1.{name}" for name in ATTENTION_LORA),
    "ff.net.0.proj",
    "ff.net.2",
    *(f"attn2.{name}" for name in ATTENTION_LORA),
)
RESNET_LORA = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
LEVELS, UP_FIRST, MID, PER_LEVEL = 4, 13, 12, 3  # of the 25 positions of block_dims


@dataclass(frozen=True)
class LoraPath:
    """One module that a LoRA may adapt, if the U-Net has it."""

    path: str  # module path; with "." as "_" the name in LoRA files
    kind: str  # "attention" or "resnet"
    block: int  # position in the 25 values of block_dims


def lora_paths(depth: int = 1, layers: int = 2, levels: int = LEVELS) -> Iterator[LoraPath]:
    """Yield every path that SD 1.x or 2.x can have, in the order of LoRA files; skip those a U-Net lacks.

    Args:
        depth: transformer blocks in one attention module.
        layers: resnets a level on the way down.
        levels: resolutions of the U-Net.
    """
    for level in range(levels):
        yield from _level(f"down_blocks.{level}", 1 + PER_LEVEL * level, layers, depth)
        yield LoraPath(f"down_blocks.{level}.downsamplers.0.conv", "resnet", PER_LEVEL + PER_LEVEL * level)
    for level in range(levels):
        yield from _level(f"up_blocks.{level}", UP_FIRST + PER_LEVEL * level, layers + 1, depth)
        yield LoraPath(f"up_blocks.{level}.upsamplers.0.conv", "resnet", UP_FIRST + 2 + PER_LEVEL * level)
    yield from (LoraPath(entry.path, entry.kind, MID) for entry in _level("mid_block", MID, 2, depth))


def _level(path: str, first_block: int, layers: int, depth: int) -> Iterator[LoraPath]:
    """Yield a level's attention modules, then its resnets."""
    for layer in range(layers):
        attention = f"{path}.attentions.{layer}"
        yield LoraPath(f"{attention}.proj_in", "attention", first_block + layer)
        for index in range(depth):
            for name in TRANSFORMER_LORA:
                yield LoraPath(f"{attention}.transformer_blocks.{index}.{name}", "attention", first_block + layer)
        yield LoraPath(f"{attention}.proj_out", "attention", first_block + layer)
    for layer in range(layers):
        for name in RESNET_LORA:
            yield LoraPath(f"{path}.resnets.{layer}.{name}", "resnet", first_block + layer)
