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

from library.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

CELL = 8  # pixels a side that one latent cell stands for, in every family
FULL = CELL * CELL * 255  # the sum of a white cell
LEAST_AREA = 1e-30  # stands for an area of 0 where something is divided by it

Sums = npt.NDArray[np.uint16]  # (h, w), 0 .. FULL
MaskKind = Literal["file", "alpha", "own", "padding", "none"]


@dataclass(frozen=True)
class MaskShape:
    """What is done to a mask before it is used, in the order of the fields; see mask_shaping.shape."""

    labels: tuple[tuple[str, float], ...] = ()  # weights in [0, 1] by label; empty: the mask is no label map
    invert: bool = False
    erode: float = 0.0  # like the next two, pixels of the image file
    dilate: float = 0.0
    feather: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether a mask stays what it is."""
        return self == PLAIN

    def in_words(self) -> str:
        """Return what tells this shape from others, empty for the plain one: a part of fingerprints."""
        if self.is_plain:
            return ""
        labels = ",".join(f"{label}={weight!r}" for label, weight in self.labels)
        return f"{labels} {'inverted ' * self.invert}{self.erode!r} {self.dilate!r} {self.feather!r}"


PLAIN = MaskShape()


@dataclass(frozen=True)
class MaskSource:
    """Where an image's mask comes from: a file, its alpha channel, a class of the user's own, or nowhere (weight 1).

    An image of kind "padding" has no mask of its own: all of it is learnt, but not the canvas that it may leave free.
    """

    kind: MaskKind
    path: Path | None = None  # the mask file; only for kind "file"
    shape: MaskShape = PLAIN

    @property
    def is_given(self) -> bool:
        """Whether somebody says what of the image is learnt."""
        return self.kind not in ("none", "padding")


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


def cell_weights(
    mask: npt.NDArray[np.float32], least: float, cover: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return what the cells of a mask (h, w) in [0, 1] weigh, likewise.

    Args:
        mask: at latent size.
        least: what a cell weighs at least that the picture covers.
        cover: how much of each cell it covers, (h, w) in [0, 1]; the canvas round a placed picture is never learnt.
            None: all of it.
    """
    if not least:
        return mask
    return np.maximum(mask, np.float32(least) if cover is None else np.float32(least) * cover)


def to_weights(sums: Sums) -> Tensor:
    """Return the weights of one shrunk mask (h, w) as a loss takes them: (1, h, w) float32 in [0, 1]."""
    import torch

    return torch.from_numpy(to_array(sums))[None]


def kept_tokens(masks: Tensor, reach: int, patch: int = 2, multiple: int = 64) -> Tensor | None:
    """Return which tokens of each image are computed: those near to what is learnt, or None for all.

    A token is near if one of its cells is no further than reach from a cell with a weight above 0, diagonal steps
    counted as one. All images of a batch keep as many as the one that needs the most; the others keep the next nearest.

    Args:
        masks: (B, 1, h, w) in [0, 1], on the CPU.
        reach: latent cells, at least 0.
        patch: latent cells a side that one token stands for.
        multiple: of which the number of tokens is one, so that there are few shapes; or it is that of all tokens.
    Returns: (B, K) int64, each row rising, tokens counted row by row; None if all are kept.

    Raises: OptionError for pictures that do not divide into tokens.
    """
    import torch

    height, width = masks.shape[2] // patch, masks.shape[3] // patch
    distances = np.stack([_token_distances(mask, patch) for mask in masks[:, 0].numpy()])  # (B, N)
    most = max(1, int((distances <= reach).sum(axis=1).max()))
    num_kept = min(-(-most // multiple) * multiple, height * width)
    if num_kept == height * width:
        return None
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :num_kept]
    return torch.from_numpy(np.sort(nearest, axis=1).astype(np.int64))


def _token_distances(mask: npt.NDArray[np.float32], patch: int) -> npt.NDArray[np.float32]:
    """Return (N,): cells from each token to the nearest weight above 0, infinite where there is none; mask: (h, w)."""
    import cv2

    height, width = mask.shape
    if height % patch or width % patch:
        raise OptionError(
            f"--mask_token_drop: {width * CELL}x{height * CELL} pixels do not divide into tokens of {patch * CELL}. "
            f"Choose a resolution of multiples of {patch * CELL}."
        )
    is_black = (mask <= 0).astype(np.uint8)
    cells: npt.NDArray[np.float32] = np.full(mask.shape, np.inf, dtype=np.float32)
    if not is_black.all():
        cells = np.asarray(cv2.distanceTransform(is_black, cv2.DIST_C, 3), dtype=np.float32)
    return cells.reshape(height // patch, patch, width // patch, patch).min(axis=(1, 3)).reshape(-1)


def weigh(loss: Tensor, masks: Tensor | None) -> Tensor:
    """Return loss with each latent cell weighed by its mask; the only place where a mask meets a loss.

    As sd-scripts: the weights are not normalised, so a mean over the result counts the masked cells too.

    Args:
        loss: (B, C, h, w), element by element.
        masks: (B, 1, h, w) in [0, 1], or other weights of 0 or more; None leaves the loss as it is.
    """
    return loss if masks is None else loss * masks.to(loss.dtype)


def area_scale(weights: npt.NDArray[np.float32], exponent: float, floor: float) -> float:
    """Return what makes up for the area that counts: 1 / max(mean weight, floor)^exponent, exactly 1 at exponent 0.

    At 1 a small region pulls as hard as a whole picture, at 0 in proportion to its area.

    Args:
        weights: (h, w) in [0, 1].
        exponent: in [0, 1].
        floor: the least mean weight to divide by, above 0: so it is finite for black masks too.
    """
    if exponent == 0:
        return 1.0
    return max(float(weights.mean(dtype=np.float64)), floor) ** -exponent


def computed_cells(kept: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Return which cells belong to tokens that are computed: (B, 1, h, w) float32, 1 or 0.

    Args:
        kept: (B, K) int64 from `kept_tokens`.
        height: latent cells, a multiple of patch; so is width.
        width: latent cells.
        patch: latent cells a side that one token stands for.
    """
    import torch

    rows, columns = height // patch, width // patch
    tokens = torch.zeros(len(kept), rows * columns).scatter_(1, kept, 1.0).view(-1, 1, rows, columns)
    return tokens.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def figures(loss: Tensor, masks: Tensor, regions: Tensor, drift: Tensor | None, held: Tensor | None) -> Tensor:
    """Return what is measured inside and outside of masks: (4, 2) float32, each the sum over images and their number.

    In this order: the loss inside, the mean of loss weighed by the mask; the loss outside; the mean weight; and the
    drift, by how far the prediction has moved from the untrained model's where it is held to that. An image counts
    where it has such a part.

    Args:
        loss: (B, C, h, w), element by element.
        masks: (B, 1, h, w) in [0, 1], the weights.
        regions: (B, 2, h, w) in [0, 1]: inside and outside; 0 in images without a mask.
        drift: (B, C, h, w), element by element; None where the untrained model has not predicted.
        held: (B, 1, h, w) 0 or more: how strongly cells are held; None with drift.
    """
    import torch

    regions = regions.to(loss.dtype)
    areas = regions.sum(dim=(2, 3))  # (B, 2)
    is_masked = (areas.sum(dim=1, keepdim=True) > 0).to(loss.dtype)
    sums = [(loss.detach().mean(dim=1, keepdim=True) * regions).sum(dim=(2, 3))]
    sums += [masks.to(loss.dtype).mean(dim=(2, 3)) * is_masked]
    if drift is not None and held is not None:
        sums += [(drift.detach().mean(dim=1, keepdim=True) * held).sum(dim=(2, 3))]
        weights = torch.cat([areas, is_masked, held.sum(dim=(2, 3))], dim=1)  # (B, 4)
    else:
        weights = torch.cat([areas, is_masked, torch.zeros_like(is_masked)], dim=1)
        sums += [torch.zeros_like(is_masked)]
    means = torch.cat(sums, dim=1) / weights.clamp(min=LEAST_AREA)  # 0 where there is nothing to weigh
    return torch.stack([means.sum(dim=0), (weights > 0).to(loss.dtype).sum(dim=0)], dim=1)
