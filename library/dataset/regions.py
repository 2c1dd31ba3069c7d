"""The weighted region of each picture: the box round all that its mask lets be learnt, in pixels of the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from library.dataset import files, images
from library.dataset.geometry import Box, Pixels, Size
from library.dataset.images import Decoded
from library.dataset.problems import Problem
from library.errors import DataError
from library.masks import MaskSource

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig

BLACK = 2  # of 255: what is no lighter is taken for black, as lossy files have it
SPECK = 1 / 1000  # of all that is learnt: a spot of a smaller area does not widen the box


def are_needed(subset: SubsetConfig) -> bool:
    """Return whether a subset's settings ask where the mask is, so that all masks have to be read at the scan."""
    return subset.mask_aware_crop or (subset.random_placement and max(subset.placement_scale) > 1)


def of_mask(mask: Pixels, size: Size) -> Box | None:
    """Return the box round what a mask lets be learnt, None if that is nothing.

    Args:
        mask: (H, W) uint8, perhaps a rescaled copy: of the proportions of the picture.
        size: of the picture, in whose pixels the box is, rounded outwards.
    """
    count, _, found, _ = cv2.connectedComponentsWithStats((mask > BLACK).astype(np.uint8), connectivity=8)
    spots = found[1:count].astype(np.int64)  # 0 is the background
    if not len(spots):
        return None
    areas = spots[:, cv2.CC_STAT_AREA]
    spots = spots[areas >= areas.sum() * SPECK] if areas.max() >= areas.sum() * SPECK else spots
    left, top = spots[:, cv2.CC_STAT_LEFT], spots[:, cv2.CC_STAT_TOP]
    right, bottom = left + spots[:, cv2.CC_STAT_WIDTH], top + spots[:, cv2.CC_STAT_HEIGHT]
    (width, height), (mask_height, mask_width) = size, mask.shape
    return (
        int(left.min()) * width // mask_width,
        int(top.min()) * height // mask_height,
        -(-int(right.max()) * width // mask_width),
        -(-int(bottom.max()) * height // mask_height),
    )


def read(path: Path, source: MaskSource, size: Size) -> Box | None:
    """Return the weighted region of an image file of a size; None if nothing of it is learnt, or it has no mask.

    Raises: DataError for a mask that cannot be read.
    """
    return of_image(images.read_image(path, want_alpha=True) if source.kind == "alpha" else None, source, size)


def of_image(image: Decoded | None, source: MaskSource, size: Size) -> Box | None:
    """Return the weighted region by a mask as it is shaped; see images.mask_of. Raises: DataError."""
    mask = images.mask_of(image, source, size)
    return None if mask is None else of_mask(mask, size)


def idle(subset: SubsetConfig, masks: Iterable[MaskSource]) -> list[Problem]:
    """Return a warning if mask_aware_crop is on and none of a subset's images has a mask."""
    if not subset.mask_aware_crop or any(mask.is_given for mask in masks):
        return []
    message = f"{subset.source}: mask_aware_crop has no effect, none of its images has a mask."
    return [Problem("warning", subset.source, message, code="mask-settings-idle")]


def of_subset(
    subset: SubsetConfig, masks: Mapping[Path, MaskSource], sizes: Mapping[Path, Size], problems: list[Problem]
) -> dict[Path, Box]:
    """Return the weighted region of each image that has one, where the subset's settings ask for it.

    Args:
        subset: of the images.
        masks: of each image; several are read at a time.
        sizes: of each image.
        problems: gets what is wrong.
    """
    if not are_needed(subset):
        return {}
    paths = [path for path, source in masks.items() if source.kind in ("file", "alpha")]
    problems += idle(subset, masks.values())
    found = files.read_all(lambda path: read(path, masks[path], sizes[path]), paths, label="reading masks")
    boxes: dict[Path, Box] = {}
    for path, box in zip(paths, found, strict=True):
        if isinstance(box, DataError):
            problems.append(Problem("error", masks[path].path or path, str(box), code="mask-unreadable"))
        elif box is not None:
            boxes[path] = box
    return boxes
