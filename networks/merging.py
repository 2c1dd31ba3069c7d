"""The maths of adding LoRA updates to weights: tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def concatenated(parts: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Return (down, up) whose product is exactly the sum of factor * up @ down over the parts; ranks add up.

    A factor is shared out to both sides, so that neither grows out of a narrow number format. 1 leaves both alone.

    Args:
        parts: (down (R, in) or (R, in, k, k), up (out, R) or (out, R, 1, 1), factor), of the same in, out and k.

    Returns: down and up in the shapes of the first part, float32.
    """
    first_down, first_up, _ = parts[0]
    downs, ups = [], []
    for down, up, factor in parts:
        root = math.sqrt(abs(factor))
        downs.append(down.float().flatten(1) * root)
        ups.append(up.float().flatten(1) * math.copysign(root, factor))
    joined_down, joined_up = torch.cat(downs), torch.cat(ups, dim=1)
    return _in_shapes_of(first_down, first_up, joined_down, joined_up)


def singular(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (out, R), S (R,), Vh (R, in * k * k)) of up @ down, R no larger than the matrix; largest first.

    The product is never formed: the factors' QR decompositions leave an R x R matrix. Computed in float64, in which
    the small singular values are still right.
    """
    dtype = torch.float32 if down.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    up_basis, up_rest = torch.linalg.qr(up.flatten(1).to(dtype))
    down_basis, down_rest = torch.linalg.qr(down.flatten(1).to(dtype).T)
    u, s, vh = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    return up_basis @ u, s, vh @ down_basis.T


def cut(decomposed: tuple[Tensor, Tensor, Tensor], rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (down (rank, n), up (out, rank)), float32, with scale * up @ down the best matrix of that rank.

    Both get the root of the singular values, so that neither side grows out of a narrow number format.

    Args:
        decomposed: U, S, Vh.
        rank: at least 1, at most the length of S.
        scale: alpha / rank of the file to be written, above 0.
    """
    u, s, vh = decomposed
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()


def residual(singular_values: Tensor, rank: int) -> float:
    """Return which share of a matrix's Frobenius norm its best approximation of that rank leaves out, 0 to 1."""
    total = singular_values.square().sum().item()
    return math.sqrt(singular_values[rank:].square().sum().item() / total) if total > 0 else 0.0


def shuffled(down: Tensor, up: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return down and up with their ranks in another order, which changes nothing in the product."""
    order = torch.randperm(down.shape[0], generator=generator)
    return down[order], up[:, order]


def _in_shapes_of(like_down: Tensor, like_up: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    rank = down.shape[0]
    return down.reshape(rank, *like_down.shape[1:]), up.reshape(like_up.shape[0], rank, *like_up.shape[2:])


def shaped(down: Tensor, up: Tensor, inner: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return flat factors in the shapes of files: inner is (in,) for a Linear, (in, k, k) for a convolution."""
    down = down.reshape(down.shape[0], *inner)
    return down, up[:, :, None, None] if len(inner) == 3 else up
