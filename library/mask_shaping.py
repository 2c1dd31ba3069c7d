"""Masks shaped before they are used: label maps read, and masks inverted, shrunk, grown and softened.

Lengths are pixels of the image. A mask may be a rescaled copy of its image: its lengths are then scaled alike.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from library.masks import MaskShape

Mask = npt.NDArray[np.uint8]  # (H, W), 0 black to 255 white
SIGMAS = 4  # of the bell that feather blurs with, in its width: what is left outside is a twentieth


def shape(pixels: Mask, how: MaskShape, image_size: tuple[int, int]) -> Mask:
    """Return a mask (H, W) inverted, eroded, dilated and feathered, in this order, as its settings say.

    The border of the picture is no edge: what a mask lets through there goes on outside, as does what it does not.

    Args:
        pixels: (H, W) uint8; a label map has become weights before.
        how: the settings; labels are not looked at.
        image_size: width and height of the image, in whose pixels lengths are.
    """
    scale = pixels.shape[1] / image_size[0]
    shaped = np.asarray(255 - pixels, np.uint8) if how.invert else pixels
    if how.erode:
        shaped = erode(shaped, how.erode * scale)
    if how.dilate:
        shaped = dilate(shaped, how.dilate * scale)
    if how.feather:
        shaped = feather(shaped, how.feather * scale)
    return shaped


def erode(pixels: Mask, radius: float) -> Mask:
    """Return a mask (H, W) shrunk: each pixel is the darkest of those whose centres are within radius (pixels)."""
    return np.asarray(255 - dilate(np.asarray(255 - pixels, np.uint8), radius), np.uint8)


def dilate(pixels: Mask, radius: float) -> Mask:
    """Return a mask (H, W) grown: each pixel is the brightest of those whose centres are within radius (pixels).

    The disc is cut into rows. The brightest of a row of any length is that of two rows of a power of two, which lie
    over each other: so the time grows with the radius and not with the disc.
    """
    reach = math.floor(radius)
    if reach < 1:
        return pixels
    height, width = pixels.shape
    spans = [np.pad(pixels, ((0, 0), (reach, reach)))]  # spans[k][:, x]: the brightest of the 2^k pixels from x on
    while 2 ** len(spans) <= 2 * reach + 1:
        half = 2 ** (len(spans) - 1)
        spans.append(np.maximum(spans[-1][:, :-half], spans[-1][:, half:]))
    grown = np.zeros_like(pixels)
    for down in range(min(reach, height - 1) + 1):
        aside = math.floor(math.sqrt(radius * radius - down * down))
        level = (2 * aside + 1).bit_length() - 1
        first, second = reach - aside, reach + aside + 1 - 2**level
        row = np.maximum(spans[level][:, first : first + width], spans[level][:, second : second + width])
        np.maximum(grown[down:], row[: height - down], out=grown[down:])
        np.maximum(grown[: height - down], row[down:], out=grown[: height - down])
    return grown


def feather(pixels: Mask, width: float) -> Mask:
    """Return a mask (H, W) with soft edges: half at the old edge, all but a twentieth of the change within width."""
    if width < 0.5:  # of a pixel: no edge of whole pixels becomes softer
        return pixels
    blurred = cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), width / SIGMAS, borderType=cv2.BORDER_REPLICATE)
    return np.rint(blurred).clip(0, 255).astype(np.uint8)
