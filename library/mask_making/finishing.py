"""What is done to a mask once it is drawn, and how it meets the one that was there."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from library import mask_shaping
from library.dataset.geometry import Pixels
from library.mask_making.pictures import LEARNT, MASKED_OUT

HALF = 128  # from this grey on a pixel belongs to a spot


@dataclass(frozen=True)
class Finish:
    """The steps, in their order; what is 0, None or False is left out."""

    threshold_mask: int | None = None
    min_area: float = 0.0  # pixels, or below 1 a share of the picture
    fill_holes: bool = False
    invert: bool = False
    shrink: float = 0.0  # pixels, as all that follow
    grow: float = 0.0
    blur: float = 0.0


def finish(mask: Pixels, how: Finish) -> Pixels:
    """Return a mask (H, W) after all steps."""
    if how.threshold_mask is not None:
        mask = np.where(mask >= how.threshold_mask, LEARNT, MASKED_OUT).astype(np.uint8)
    if how.min_area:
        mask = without_small_spots(mask, how.min_area * (mask.size if how.min_area < 1 else 1))
    if how.fill_holes:
        mask = without_holes(mask)
    if how.invert:
        mask = np.asarray(255 - mask, np.uint8)
    if how.shrink:
        mask = mask_shaping.erode(mask, how.shrink)
    if how.grow:
        mask = mask_shaping.dilate(mask, how.grow)
    return mask_shaping.feather(mask, how.blur) if how.blur else mask


def without_small_spots(mask: Pixels, area: float) -> Pixels:
    """Return mask without its spots, connected pixels above half, that have fewer pixels than area.

    A soft edge goes with its spot; grey that belongs to no spot stays.
    """
    _, labels, found, _ = cv2.connectedComponentsWithStats((mask >= HALF).astype(np.uint8), connectivity=8)
    small = found[:, cv2.CC_STAT_AREA] < area
    small[0] = False
    if not small.any():
        return mask
    # soft edges: each grey pixel belongs to the spots that it touches, if all of them go
    grey, parts = cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)
    keeps = np.zeros(grey, bool)
    keeps[parts[(labels > 0) & ~small[labels]]] = True
    has_spot = np.zeros(grey, bool)
    has_spot[parts[labels > 0]] = True
    gone = small[labels] | (has_spot & ~keeps)[parts]
    return np.where(gone, MASKED_OUT, mask).astype(np.uint8)


def without_holes(mask: Pixels) -> Pixels:
    """Return mask with what lies below half, and is not connected with the picture's border, learnt."""
    _, labels = cv2.connectedComponents((mask < HALF).astype(np.uint8), connectivity=4)
    outside = np.zeros(labels.max() + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = True
    outside[0] = True  # what is above half keeps its grey
    return np.where(outside[labels], mask, LEARNT).astype(np.uint8)


def combined(new: Pixels, old: Pixels | None, how: str) -> Pixels:
    """Return the mask that comes of a new one and the one that was there, both of one size.

    Args:
        new: (H, W).
        old: likewise; None: there was none.
        how: "replace"; "add", the greater of both; "intersect", the lesser; "subtract", the old one where the new one
            is black, the lesser of old and 255 - new.
    """
    if how == "replace" or (old is None and how != "subtract"):
        return new
    if how == "add":
        return np.maximum(old if old is not None else new, new)
    return np.minimum(old if old is not None else LEARNT, new if how == "intersect" else 255 - new)
