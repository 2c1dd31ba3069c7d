"""What the masks of a batch make of it: weights of cells and images, regions to measure, and what is held in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from library import masks
from library.dataset.config import SubsetConfig
from library.masks import Sums

Cells = npt.NDArray[np.float32]  # (h, w)


@dataclass(frozen=True)
class Shown:
    """One image of a batch, as far as its mask is concerned."""

    subset: SubsetConfig
    mask: Sums | None  # (h, w); None: the image weighs 1 everywhere
    weight: float  # of its loss, whatever its mask
    cover: Sums | None = None  # (h, w), how much of each cell the picture covers; None: all of it

    @property
    def cells(self) -> Cells | None:
        """What its cells weigh: the mask, but where there is some of the picture, no less than mask_weight_min."""
        if self.mask is None:
            return None
        cover = None if self.cover is None else masks.to_array(self.cover)
        return masks.cell_weights(masks.to_array(self.mask), self.subset.mask_weight_min, cover)


@dataclass(frozen=True)
class Weighed:
    """Fields of a batch; see library/batch.py."""

    masks: Tensor | None
    weights: Tensor
    kept_tokens: Tensor | None
    regions: Tensor | None
    prior: Tensor | None


def weigh(images: Sequence[Shown], *, token_reach: int | None, prior_every: int) -> Weighed:
    """Return what masks make of a batch.

    Args:
        images: of the batch; their masks are of one size.
        token_reach: see masks.kept_tokens; None: all tokens are computed.
        prior_every: how many times the loss counts that holds the untrained prediction; 0: it is not due.
    """
    cells = [image.cells for image in images]
    scales = [_scale(image.subset, each) for image, each in zip(images, cells, strict=True)]
    weights = torch.tensor(
        [image.weight * scale for image, scale in zip(images, scales, strict=True)], dtype=torch.float32
    )
    shape = next((each.shape for each in cells if each is not None), None)
    if shape is None:
        return Weighed(None, weights, None, None, None)
    white = np.ones(shape, np.float32)
    stacked = _stacked([white if each is None else each for each in cells])
    kept = None if token_reach is None else masks.kept_tokens(stacked, token_reach)
    computed = None if kept is None else masks.computed_cells(kept, *shape).numpy()[:, 0]
    here = [white if computed is None else computed[index] for index in range(len(images))]
    held = [_held(*each, prior_every) for each in zip(images, cells, here, strict=True)]
    return Weighed(
        masks=stacked,
        weights=weights,
        kept_tokens=kept,
        regions=torch.stack([_regions(image, each, shape) for image, each in zip(images, here, strict=True)]),
        prior=_stacked(held) if any(each.any() for each in held) else None,
    )


def _scale(subset: SubsetConfig, cells: Cells | None) -> float:
    return 1.0 if cells is None else masks.area_scale(cells, subset.mask_area_norm, subset.mask_area_floor)


def _regions(image: Shown, computed: Cells, shape: tuple[int, ...]) -> Tensor:
    """Return what is inside and outside of an image's mask, among the cells that are computed: (2, h, w)."""
    if image.mask is None:
        return torch.zeros(2, *shape)
    inside = masks.to_weights(image.mask)
    return torch.cat([inside, (1 - inside) * torch.from_numpy(computed)])


def _held(image: Shown, cells: Cells | None, computed: Cells, every: int) -> Cells:
    """Return how strongly the cells of an image are held to the untrained prediction: (h, w), 0 or more.

    The weight of the image is in it; so is the scale by area, of the cells that are held.
    """
    subset = image.subset
    if cells is None or not (subset.mask_prior_weight and every):
        return np.zeros_like(computed)
    free = (1 - cells) * computed
    scale = masks.area_scale(free, subset.mask_area_norm, subset.mask_area_floor)
    return free * np.float32(subset.mask_prior_weight * every * image.weight * scale)


def _stacked(arrays: Sequence[Cells]) -> Tensor:
    """Return arrays (h, w) as (B, 1, h, w)."""
    return torch.from_numpy(np.stack(arrays)[:, None])
