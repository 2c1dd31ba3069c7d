"""Names of the U-Net: the original (LDM) layout beside diffusers', and the order and names of its LoRA modules."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
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
    ("label_emb.0.0", "add_embedding.linear_1"),  # of models that are told picture sizes and pooled text
    ("label_emb.0.2", "add_embedding.linear_2"),
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
    """The block structure of a U-Net: SD 1.x and 2.x are (1, 1, 1, 0) with 2 layers, SDXL is (0, 2, 10) with 2."""

    depths: tuple[int, ...]  # per level, finest first: transformer blocks in each attention module; 0: no attention
    layers: int  # resnets a level on the way down; one more on the way up


def blocks_of(shapes: Mapping[str, Sequence[int]]) -> UNetBlocks:
    """Return the block structure that original tensor names (without PREFIX) show.

    Raises:
        KeyError: the names are not those of a U-Net in the original layout.
    """
    depths: list[int] = []
    layers: list[int] = []
    open_level = False
    index = 1
    while f"input_blocks.{index}.0.in_layers.2.weight" in shapes or f"input_blocks.{index}.0.op.weight" in shapes:
        if f"input_blocks.{index}.0.op.weight" in shapes:
            open_level = False
        else:
            if not open_level:
                depths.append(depth_of(f"input_blocks.{index}.1", shapes))
                layers.append(0)
                open_level = True
            layers[-1] += 1
        index += 1
    if not layers:
        raise KeyError("input_blocks.1.0.in_layers.2.weight")
    return UNetBlocks(tuple(depths), layers[0])


def depth_of(attention: str, shapes: Container[str]) -> int:
    """Return how many transformer blocks the attention module of this name has; 0 where there is none."""
    depth = 0
    while f"{attention}.transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def unet_table(blocks: UNetBlocks) -> KeyTable:
    """Return the names of every module of a U-Net with these blocks."""
    pairs = [*OUTSIDE, *MIDDLE]
    levels = len(blocks.depths)
    index = 1
    for level, depth in enumerate(blocks.depths):
        for layer in range(blocks.layers):
            pairs += beneath(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            if depth:
                pairs.append((f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}"))
            index += 1
        if level < levels - 1:
            pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            index += 1
    index = 0
    for level, depth in enumerate(reversed(blocks.depths)):
        for layer in range(blocks.layers + 1):
            pairs += beneath(f"output_blocks.{index}.0", f"up_blocks.{level}.resnets.{layer}", RESNET)
            if depth:
                pairs.append((f"output_blocks.{index}.1", f"up_blocks.{level}.attentions.{layer}"))
            if layer == blocks.layers and level < levels - 1:
                position = 2 if depth else 1
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

    path: str  # module path; with "." as "_" the name in LoRA files of SD 1.x and 2.x
    kind: str  # "attention" or "resnet"
    block: int  # position in the values of block_dims: 25, or 23 in the original layout
    original: str = ""  # the path in the original layout, after which SDXL's LoRA files name the module


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


ORIGINAL_MID, ORIGINAL_UP = 10, 13  # of the 23 positions of block_dims that the original layout's blocks have


def original_lora_paths(blocks: UNetBlocks) -> Iterator[LoraPath]:
    """Yield every path that a U-Net with these blocks can have, in the order of SDXL's LoRA files.

    That is the order of the original layout: position by position, each position's resnet before its attention.
    """
    places = dict(unet_table(blocks).pairs)
    num_positions = len(blocks.depths) * (blocks.layers + 1)  # in: conv_in, and a downsampler between two levels
    depths = dict(_attention_depths(blocks))
    for part, first_block, count in (
        ("input_blocks", 1, num_positions),
        ("middle_block", ORIGINAL_MID, 3),
        ("output_blocks", ORIGINAL_UP, num_positions),
    ):
        for position in range(count):
            yield from _position(f"{part}.{position}", first_block + position, places, depths)


def _attention_depths(blocks: UNetBlocks) -> Iterator[tuple[str, int]]:
    """Yield each attention module's library path with its depth."""
    for level, depth in enumerate(blocks.depths):
        for layer in range(blocks.layers):
            yield f"down_blocks.{level}.attentions.{layer}", depth
        for layer in range(blocks.layers + 1):
            yield f"up_blocks.{len(blocks.depths) - 1 - level}.attentions.{layer}", depth
    yield "mid_block.attentions.0", blocks.depths[-1]


def _position(position: str, block: int, places: Mapping[str, str], depths: Mapping[str, int]) -> Iterator[LoraPath]:
    """Yield the modules at a position of the original layout, if it is a block at all."""
    attentions = [name for name in (position, f"{position}.1") if depths.get(places.get(name, ""))]
    resnet = position if position.startswith("middle_block") else f"{position}.0"
    for original, library in RESNET:
        if library in RESNET_LORA and f"{resnet}.{original}" in places:
            yield LoraPath(places[f"{resnet}.{original}"], "resnet", block, f"{resnet}.{original}")
    if f"{position}.0.op" in places:
        yield LoraPath(places[f"{position}.0.op"], "resnet", block, f"{position}.0.op")
    for attention in attentions:
        path = places[attention]
        inner = [f"transformer_blocks.{index}.{name}" for index in range(depths[path]) for name in TRANSFORMER_LORA]
        for name in ("proj_in", *inner, "proj_out"):
            yield LoraPath(f"{path}.{name}", "attention", block, f"{attention}.{name}")
    for name in (f"{position}.1.conv", f"{position}.2.conv"):
        if name in places:
            yield LoraPath(places[name], "resnet", block, name)
