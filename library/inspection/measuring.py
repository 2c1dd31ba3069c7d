"""Measures of pixels: of a picture, of its transparency, of a mask before and after it is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from library.dataset.geometry import Pixels, Transform
from library.inspection.facts import AlphaFacts, Bits, Profile, Strokes
from library.masks import CELL

SQUARES = 16  # a side, in which a picture is compared with others
FLAT = 2.0  # a standard deviation below it is no detail, of 255
WHITE = 128  # from here on a mask pixel is taken for white
STEP = 4  # between neighbours, that is no smooth shade, of 255
FINE = 512  # pixels of the shorter side, from which on half of the mask's resolution shows its specks
SPECK = 1 / 200  # side of a speck at most, of the mask's shorter side
NEARLY = (1, 24)  # distance to black or white that JPEG leaves around edges
COLOURED = 16  # difference of channels that is no rounding
THIN = 0.5  # a latent cell with more weight keeps what is painted there

Weights = npt.NDArray[np.float32]  # (h, w) in [0, 1]


def alpha_facts(rgb: Pixels, alpha: Pixels) -> AlphaFacts:
    """Return what the transparency (H, W) of a picture (H, W, 3) is like."""
    least, most = int(alpha.min()), int(alpha.max())
    is_hidden = alpha == 0
    hidden = float(is_hidden.mean()) if least == 0 else 0.0
    detail = 0.0
    both = is_hidden[:, 1:] & is_hidden[:, :-1]
    if hidden and both.any():
        steps = cv2.absdiff(np.ascontiguousarray(rgb[:, 1:, 1]), np.ascontiguousarray(rgb[:, :-1, 1]))
        detail = float((steps[both] > STEP).mean())
    return AlphaFacts(least, most, hidden, detail)


def likeness(rgb: Pixels, alpha: Pixels | None) -> tuple[Profile | None, Bits]:
    """Return what a picture (H, W, 3) is compared by: its profile, None without detail, and its bits; see facts.

    What is transparent counts as grey, whatever colours it hides.
    """
    small = cv2.resize(rgb, (SQUARES * 2, SQUARES * 2), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    if alpha is not None:
        opacity = cv2.resize(alpha, (SQUARES * 2, SQUARES * 2), interpolation=cv2.INTER_AREA) / np.float32(255)
        grey = grey * opacity + 127 * (1 - opacity)
    bits = np.concatenate([(grey[:, 1:] > grey[:, :-1] + 1).ravel(), (grey[1:] > grey[:-1] + 1).ravel()])
    profile = cv2.resize(grey, (SQUARES, SQUARES), interpolation=cv2.INTER_AREA).ravel()
    profile = profile - profile.mean()
    length = float(np.linalg.norm(profile))
    return (None if length < FLAT * SQUARES else np.asarray(profile / length, np.float32)), bits


def coloured(image: Image.Image) -> float:
    """Return the share of the pixels of a picture whose red differs from green or blue."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith(("I", "F")):
        return 0.0
    rgb = np.asarray(image.convert("RGBA" if image.mode == "P" else "RGB"))
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    differs = np.maximum(cv2.absdiff(red, green), cv2.absdiff(red, blue)) > COLOURED
    return float(differs.mean())


def transparency(image: Image.Image) -> tuple[int, int] | None:
    """Return the least and the most opacity of a picture, None if it has no transparency."""
    if not image.has_transparency_data or image.mode.startswith(("I", "F")):
        return None
    least, most = image.convert("RGBA").getchannel(3).getextrema()
    assert isinstance(least, int)
    assert isinstance(most, int)
    return least, most


def ringing(mask: Pixels) -> float:
    """Return the share of the pixels of a mask that are nearly black or nearly white, but not quite."""
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
    low, high = NEARLY
    return float(counts[low : high + 1].sum() + counts[255 - high : 255 - low + 1].sum()) / mask.size


def specks(mask: Pixels) -> int:
    """Return the number of small islands in a mask (H, W), white on black or black on white."""
    is_white = (mask >= WHITE).astype(np.uint8)
    halved = min(mask.shape) >= FINE
    largest = max(2.0, min(mask.shape) * SPECK / (1 + halved)) ** 2
    total = 0
    for part in (is_white, np.asarray(1 - is_white, np.uint8)):
        if halved:  # so that islands stay: four times faster
            part = np.ascontiguousarray(cv2.dilate(part, np.ones((2, 2), np.uint8))[::2, ::2])
        count, _, stats, _ = cv2.connectedComponentsWithStats(part, connectivity=8)
        total += int((stats[1:count, cv2.CC_STAT_AREA] <= largest).sum())
    return total


def lost(mask: Pixels, cut: Pixels, transform: Transform) -> float:
    """Return the share of a mask's white, in [0, 1], that lies outside of the cut; 0 of a black mask."""
    width, height = transform.resized
    whole = float(mask.mean()) * width * height
    return 0.0 if whole == 0 else min(1.0, max(0.0, 1 - float(cut.sum(dtype=np.float64)) / whole))


def strokes(cut: Pixels, weights: Weights, transform: Transform) -> Strokes | None:
    """Return the parts of a mask that lose most of their weight at latent size, None if there are none.

    A stroke w pixels wide through cells of 8 has a weight of w/8 there. What an opening by a disc of one cell takes
    away is thin; the rest of a cell next to one of more weight is the edge of something large.

    Args:
        cut: (H, W) uint8, the mask in its bucket.
        weights: (h, w) of its cells.
        transform: of the image.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (CELL - 1, CELL - 1))
    thin = cv2.subtract(cut, cv2.morphologyEx(cut, cv2.MORPH_OPEN, disc))
    in_cells = cv2.resize(thin, weights.shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    nearby = cv2.dilate(weights, np.ones((3, 3), np.uint8))
    is_thin = (nearby < THIN) & (in_cells > 1 / CELL / 2) & (in_cells > 0.8 * weights)
    num_cells = int(is_thin.sum())
    total = float(weights.sum())
    if not num_cells or not total:
        return None
    scale = transform.source[0] / transform.resized[0]
    width = min(float(np.median(in_cells[is_thin])) * CELL, CELL)
    dilate = max(1, math.ceil((CELL - width) / 2 * scale))
    return Strokes(float(in_cells[is_thin].sum()) / total, num_cells, width * scale, dilate)


def label_shares(image: Image.Image, table: dict[str, float]) -> tuple[tuple[tuple[str, float], ...], frozenset[str]]:
    """Return which labels a map has that a table does not list, with their shares of the pixels, and those it lists.

    Label 0 and black need not be listed: they stand for what is nothing. With an "other" nothing has to be.
    """
    unlisted, listed = [], set()
    for number, colour, share in _labels(image):
        if number in table or colour in table:
            listed |= {number, colour} & table.keys()
        elif (number or colour) not in ("0", "#000000"):
            unlisted.append((number or colour, share))
    is_complete = "other" in table
    return () if is_complete else tuple(unlisted), frozenset(listed)


def _labels(image: Image.Image) -> Iterator[tuple[str, str, float]]:
    """Yield number, colour ('' where a picture has none) and share of the pixels of each label in a map."""
    if image.mode == "1" or image.mode.startswith(("I", "F")):
        numbers, counts = np.unique(np.asarray(image).astype(np.int64), return_counts=True)
        for value, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            yield str(value), "", count / counts.sum()
        return
    colours = np.asarray(image.convert("RGBA" if image.mode in ("P", "PA") else "RGB"))[..., :3].astype(np.int64)
    codes = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    is_numbered = image.mode in ("P", "PA", "L", "LA")
    if is_numbered:
        codes |= np.asarray(image.getchannel(0), np.int64) << 24
    values, counts = np.unique(codes, return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield (str(value >> 24) if is_numbered else ""), f"#{value & 0xFFFFFF:06x}", count / codes.size
