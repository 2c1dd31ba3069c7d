"""The maths of adding LoRA updates to weights: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def delta(down: Tensor, up: Tensor, shape: torch.Size) -> Tensor:
    """Return up @ down in float32, in the shape of the weight it changes.

    Args:
        down: (R, in) or (R, in, k, k).
        up: (out, R) or (out, R, 1, 1).
        shape: of the weight, (out, in) or (out, in, k, k). A 1x1 kernel and a Linear are the same thing here.
    """
    return (up.float().flatten(1) @ down.float().flatten(1)).view(shape)


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return weight + scale * up @ down, computed in float32, in float32."""
    return weight.float().add(delta(down, up, weight.shape), alpha=scale)


def delta_norm(down: Tensor, up: Tensor) -> Tensor:
    """Return the Frobenius norm of up @ down without forming it, a float32 scalar on their device.

    |UD|² = trace(DᵀUᵀUD) = sum(UᵀU * DDᵀ): two R x R products instead of one out x in.
    """
    down, up = down.float().flatten(1), up.float().flatten(1)
    return torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0).sqrt()
