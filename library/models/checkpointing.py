"""Gradient checkpointing whose checkpoints wait in main memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def offloaded(block: nn.Module, *inputs: Any) -> Any:
    """Return what a block makes of its inputs; only these are kept for the backward pass, and in main memory.

    A stand-in for the function that diffusers and transformers call for each checkpointed block. Inputs that are in
    main memory already are not copied.

    Args:
        block: recomputed in the backward pass.
        inputs: tensors and whatever else the block takes.
    """
    is_on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in inputs)
    with save_on_cpu(pin_memory=is_on_gpu):
        return checkpoint(block.__call__, *inputs, use_reentrant=False)
