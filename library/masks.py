"""Masks: where one comes from, how it is shrunk to latent size, and how it weighs a loss.

White is learnt, black is not. Reading a dataset needs this file without torch, so torch is imported only by the
functions that need tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

CELL = 8  # pixels a side that one latent cell stands for, in every family
FULL = CELL * CELL * 255  # the sum of a white cell

Sums = npt.NDArray[np.uint16]  # (h, w), 0 .. FULL
MaskKind = Literal["file", "alpha", "own", "none"]


@dataclass(frozen=True)
class MaskSource:
    """Where an image's mask comes from: a file, its alpha channel, a class of the user's own, or nowhere (weight 1)."""

    kind: MaskKind
    path: Path | None = None  # the mask file; only for kind "file"


def shrink(pixels: npt.NDArray[np.uint8]) -> Sums:
    """Return a mask at latent size, exactly: the sum of each cell's 8x8 pixels.

    Args:
        pixels: (H, W) uint8, the mask in its bucket; both sides multiples of 8.
    Returns: (h, w) uint16 from 0 (black) to FULL (white): two bytes a cell instead of 64, and nothing is rounded.
    """
    height, width = pixels.shape
    assert (height % CELL, width % CELL) == (0, 0), f"a bucket of {width}x{height} has no whole latent cells"
    rows = pixels.reshape(height // CELL, CELL, width).sum(axis=1, dtype=np.uint16)  # two steps: six times faster
    return rows.reshape(height // CELL, width // CELL, CELL).sum(axis=2, dtype=np.uint16)


def to_array(sums: Sums) -> npt.NDArray[np.float32]:
    """Return the weights of shrunk masks: float32 of the same shape in [0, 1], the mean of each cell's pixels."""
    return sums.astype(np.float32) / np.float32(FULL)


def to_weights(sums: Sums) -> Tensor:
    """Return the weights of one shrunk mask (h, w) as a loss takes them: (1, h, w) float32 in [0, 1]."""
    import torch

    return torch.from_numpy(to_array(sums))[None]


def weigh(loss: Tensor, masks: Tensor | None) -> Tensor:
    """Return loss with each latent cell weighed by its mask; the only place where a mask meets a loss.

    As sd-scripts: the weights are not normalised, so a mean over the result counts the masked cells too.

    Args:
        loss: (B, C, h, w), element by element.
        masks: (B, 1, h, w) in [0, 1], or None to leave the loss as it is.
    """
    return loss if masks is None else loss * masks.to(loss.dtype)
