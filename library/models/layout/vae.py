"""Names of the VAE: the original (LDM) layout beside diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.models.layout.keys import KeyTable, beneath

PREFIX = "first_stage_model."  # in a full checkpoint; a file that holds only a VAE has none

RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
DEPRECATED_ATTENTION = (  # diffusers before 0.17
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
)
ENCODER_ONLY = ("encoder.", "quant_conv.")


@dataclass(frozen=True)
class VaeBlocks:
    """The block structure of a VAE: SD's has 4 levels of 2 layers."""

    levels: int
    layers: int  # resnets a level in the encoder; one more in the decoder


def blocks_of(shapes: Mapping[str, Sequence[int]]) -> VaeBlocks:
    """Return the block structure that original tensor names (without PREFIX) show.

    Raises:
        KeyError: the names are not those of a VAE in the original layout.
    """
    levels = layers = 0
    while f"encoder.down.{levels}.block.0.conv1.weight" in shapes:
        levels += 1
    while f"encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    if not levels:
        raise KeyError("encoder.down.0.block.0.conv1.weight")
    return VaeBlocks(levels, layers)


def vae_table(blocks: VaeBlocks) -> KeyTable:
    """Return the names of every module of a VAE with these blocks."""
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [
            (f"{half}.conv_in", f"{half}.conv_in"),
            (f"{half}.norm_out", f"{half}.conv_norm_out"),
            (f"{half}.conv_out", f"{half}.conv_out"),
            *beneath(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", RESNET),
            *beneath(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", ATTENTION),
            *beneath(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", RESNET),
        ]
    for level in range(blocks.levels):
        up = blocks.levels - 1 - level  # the original counts up levels from the finest
        for layer in range(blocks.layers):
            pairs += beneath(
                f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}", RESNET
            )
        for layer in range(blocks.layers + 1):
            pairs += beneath(f"decoder.up.{up}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}", RESNET)
        if level < blocks.levels - 1:
            pairs += [
                (f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"),
                (f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"),
            ]
    return KeyTable(tuple(pairs))


def modern_name(key: str) -> str:
    """Return a diffusers key with the attention names used since diffusers 0.17."""
    for old, new in DEPRECATED_ATTENTION:
        for tensor in ("weight", "bias"):
            if key.endswith(f".attentions.0.{old}.{tensor}"):
                return key[: -len(f"{old}.{tensor}")] + f"{new}.{tensor}"
    return key


def is_attention_weight(library_key: str) -> bool:
    """Say whether the original layout stores this weight as a 1x1 convolution, (out, in, 1, 1)."""
    return ".mid_block.attentions.0.to_" in library_key and library_key.endswith(".weight")
