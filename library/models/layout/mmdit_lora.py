"""The LoRA modules of SD3: their paths in the MMDiT and in T5, in the order of LoRA files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ATTENTION, EMBEDDING, T5 = "attention", "embedding", "t5"  # kinds of LoraTarget

# In a joint block: the text's side before the picture's. A side lacks what it does not compute: the last text side has
# no more than qkv and modulation, and only some picture sides of SD3.5 medium have a second attention.
SIDES = ("context_block", "x_block")
SIDE_LORA = ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")

# Outside the blocks: the groups that the six numbers of emb_dims are for, in their order.
EMBEDDING_LORA = (
    ("context_embedder",),
    ("t_embedder.mlp.0", "t_embedder.mlp.2"),
    ("x_embedder.proj",),
    ("y_embedder.mlp.0", "y_embedder.mlp.2"),
    ("final_layer.adaLN_modulation.1",),
    ("final_layer.linear",),
)
T5_LORA = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


@dataclass(frozen=True)
class MmditPath:
    """One module that a LoRA may adapt, if the MMDiT has it."""

    path: str  # in the original checkpoint; with "." as "_" the name in LoRA files
    kind: str  # ATTENTION in the joint blocks, EMBEDDING outside
    block: int | None  # which joint block it is in


def lora_paths(depth: int) -> Iterator[MmditPath]:
    """Yield every path that an MMDiT of so many joint blocks can have, in the order of LoRA files."""
    for block in range(depth):
        for side in SIDES:
            for name in SIDE_LORA:
                yield MmditPath(f"joint_blocks.{block}.{side}.{name}", ATTENTION, block)
    for group in EMBEDDING_LORA:
        for path in group:
            yield MmditPath(path, EMBEDDING, None)


def t5_lora_paths(layers: int) -> Iterator[str]:
    """Yield the paths of T5's LoRA modules, in the order of LoRA files."""
    for index in range(layers):
        for name in T5_LORA:
            yield f"encoder.block.{index}.{name}"
