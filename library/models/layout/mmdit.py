"""Names of the MMDiT of SD3 and SD3.5: the original layout, which is that of our module too, beside diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.models.layout.keys import KeyTable, beneath

PREFIX = "model.diffusion_model."  # in a full checkpoint
POSITIONS = "pos_embed"
HEAD_WIDTH = 64  # of every model of the family

OUTSIDE = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("pos_embed", "pos_embed.pos_embed"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
)
BLOCK = (
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
)
FUSED = {  # what diffusers keeps in three
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


@dataclass(frozen=True)
class MmditShape:
    """The sizes of an MMDiT, which its tensors' shapes tell."""

    depth: int  # joint blocks; 24 or 38
    width: int  # 1536 or 2432
    channels: int  # of latents; 16
    patch: int  # latent cells a side of a token; 2
    context_width: int  # 4096
    pooled_width: int  # 2048
    mlp_width: int  # 4 * width
    has_qk_norm: bool
    num_dual: int  # the first blocks of this number have a second attention among the picture's tokens
    position_side: int  # of the square table of positions; 192 or 384 tokens

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return self.width // HEAD_WIDTH

    @property
    def name(self) -> str:
        """Return which model this is: "medium" (SD3), "5-medium" or "5-large" (SD3.5)."""
        if not self.has_qk_norm:
            return "medium"
        return "5-medium" if self.num_dual else "5-large"


def depth_of(shapes: Mapping[str, tuple[int, ...]], blocks: str = "joint_blocks.") -> int:
    """Return the number of blocks that tensor names (without PREFIX) speak of, also where some are missing."""
    numbers = {name[len(blocks) :].partition(".")[0] for name in shapes if name.startswith(blocks)}
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


@dataclass(frozen=True)
class Stored:
    """Where diffusers keeps an original tensor."""

    names: tuple[str, ...]  # one, or three to be put one below the other
    is_swapped: bool = False  # the halves, shift and scale, stand the other way round


class DiffusersNames:
    """Diffusers' names of an MMDiT of some depth."""

    def __init__(self, depth: int) -> None:
        pairs = list(OUTSIDE)
        self._fused: dict[str, tuple[str, ...]] = {}
        for index in range(depth):
            ours, theirs = f"joint_blocks.{index}", f"transformer_blocks.{index}"
            pairs += beneath(ours, theirs, BLOCK)
            for fused, parts in FUSED.items():
                self._fused[f"{ours}.{fused}"] = tuple(f"{theirs}.{part}" for part in parts)
        self._table = KeyTable(tuple(pairs))
        # their AdaLayerNormContinuous takes scale before shift
        self._swapped = ("final_layer.adaLN_modulation.1", f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1")

    def of(self, name: str) -> Stored:
        """Return where diffusers keeps the tensor of this original name (without PREFIX)."""
        module, _, tensor = name.rpartition(".")
        if module in self._fused:
            return Stored(tuple(f"{part}.{tensor}" for part in self._fused[module]))
        translated = self._table.to_library(name)
        assert translated is not None, name
        return Stored((translated,), module in self._swapped)

    def originals(self) -> list[str]:
        """Return the original names that any model of this depth may have."""
        layers = [ours for ours, _ in self._table.pairs] + list(self._fused)
        return [POSITIONS, *(f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias"))]
