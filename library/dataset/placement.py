"""Random placement: a picture scaled, turned and moved in its bucket, and what fills the canvas that it leaves free."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from library.masks import MaskSource

if TYPE_CHECKING:
    from library.dataset.geometry import Box, Pixels, Size, Transform

LEAST_KEPT = 0.8  # of the weighted region's area that stays in the bucket
TRIES = 24  # places that are drawn until one keeps that much
SMALLER = 0.9  # times the scale, while no place does

Corners = npt.NDArray[np.float64]  # (4, 2): x, y
Point = tuple[float, float]  # x, y


@dataclass(frozen=True)
class Placement:
    """Says of a transform that the picture need not fill its bucket: the cut may begin outside of it."""

    angle: float = 0.0  # degrees, counter-clockwise, by which the resized picture is turned before the cut

    def in_words(self) -> str:
        """Return what tells it from others in fingerprints."""
        return f"placed {self.angle!r}"


def mask_of(mask: MaskSource, random_placement: bool) -> MaskSource:
    """Return an image's mask, which with random placement is that of the free canvas if it has none of its own."""
    return MaskSource("padding") if random_placement and mask.kind == "none" else mask


class PlacementSettings(Protocol):
    """The settings of a subset that say how pictures are placed."""

    @property
    def placement_scale(self) -> tuple[float, float]:
        """Least and greatest scale; at 1 the turned picture just fits into its bucket."""

    @property
    def placement_rotate(self) -> float:
        """Most degrees, either way."""


def turned_size(size: Size, angle: float) -> Size:
    """Return width and height of the smallest upright canvas that holds a picture of a size, turned by an angle."""
    width, height = _turned_extents(size, angle)
    return math.ceil(width - 1e-6), math.ceil(height - 1e-6)


def _turned_extents(size: Size, angle: float) -> tuple[float, float]:
    cosine, sine = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return size[0] * cosine + size[1] * sine, size[0] * sine + size[1] * cosine


def draw(
    transform: Transform,
    settings: PlacementSettings,
    rng: random.Random,
    region: Box | None,
    *,
    spread: float = 1.0,
) -> Transform:
    """Return transform with the picture placed at random in its bucket.

    A side that fits into the bucket stays whole; of one that does not, the bucket shows a part without free canvas.
    Where less than LEAST_KEPT of the weighted region would be seen in all places tried, the scale becomes smaller.

    Args:
        transform: the sample's own; source, target, interpolation and flip are kept.
        settings: what the subset asks for.
        rng: of this draw, or of this variant.
        region: the weighted region in pixels of the source; None: all of it.
        spread: share of the places, round the middle, among which one is drawn.
    """
    source, target = transform.source, transform.target
    least, most = settings.placement_scale
    scale = rng.uniform(least, most)
    angle = rng.uniform(-settings.placement_rotate, settings.placement_rotate) if settings.placement_rotate else 0.0
    width, height = _turned_extents(source, angle)
    fit = min(target[0] / width, target[1] / height)
    box = region or (0, 0, *source)
    while True:
        resized = (max(1, int(source[0] * fit * scale + 0.5)), max(1, int(source[1] * fit * scale + 0.5)))
        placed = replace(transform, resized=resized, placement=Placement(angle), reach=None)
        canvas = turned_size(resized, angle)
        ranges = [_starts(canvas[axis] - target[axis], spread) for axis in (0, 1)]
        for _ in range(TRIES):
            crop = (rng.randint(*ranges[0]), rng.randint(*ranges[1]))
            found = replace(placed, crop=crop)
            if scale <= 1 or share_seen(found, box) >= LEAST_KEPT:
                return found
        scale = max(1.0, scale * SMALLER)  # at 1 all of it is seen


def _starts(room: int, spread: float) -> tuple[int, int]:
    """Return the least and the most start of the cut on a canvas that is larger than the bucket by room, or smaller."""
    least, most = sorted((0, room))
    inwards = int((most - least) / 2 * (1 - spread) + 0.5)
    return min(least + inwards, (least + most) // 2), max(most - inwards, (least + most) // 2)


def share_seen(transform: Transform, box: Box) -> float:
    """Return how much of a box of the source's pixels the bucket of a placed picture shows, from 0 to 1 of its area."""
    corners = [(float(x), float(y)) for x, y in _to_bucket(transform, box)]
    seen = corners
    for axis, end in enumerate(transform.target):
        seen = _clipped(_clipped(seen, axis, 0, 1), axis, end, -1)
    area = _area(corners)
    return min(1.0, _area(seen) / area) if area > 0 else 1.0


def _clipped(corners: Sequence[Point], axis: int, bound: float, side: int) -> list[Point]:
    """Return what of a convex shape lies above a bound of one axis (side 1), or below it (-1).

    OpenCV's intersectConvexConvex loses parts of shapes whose edges nearly coincide.
    """
    kept: list[Point] = []
    for here, there in zip(corners, (*corners[1:], *corners[:1]), strict=True):
        inside, beyond = (side * (point[axis] - bound) for point in (here, there))
        if inside >= 0:
            kept.append(here)
        if inside * beyond < 0:
            share = inside / (inside - beyond)
            kept.append((here[0] + share * (there[0] - here[0]), here[1] + share * (there[1] - here[1])))
    return kept


def _area(corners: Sequence[Point]) -> float:
    pairs = zip(corners, (*corners[1:], *corners[:1]), strict=True)
    return abs(sum(x * below - beside * y for (x, y), (beside, below) in pairs)) / 2


def _to_bucket(transform: Transform, box: Box) -> Corners:
    """Return where the corners of a box of the source's pixels stand in the bucket, before it is mirrored."""
    left, top, right, bottom = box
    (width, height), resized = transform.source, transform.resized
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], np.float64)
    corners *= (resized[0] / width, resized[1] / height)
    matrix = _matrix(transform)
    return np.asarray(corners @ matrix[:, :2].T + matrix[:, 2], np.float64)


def _matrix(transform: Transform) -> npt.NDArray[np.float64]:
    """Return (2, 3): from the resized picture to the bucket, in coordinates that begin at the corner of a pixel."""
    assert transform.placement is not None
    angle = math.radians(transform.placement.angle)
    cosine, sine = math.cos(angle), math.sin(angle)
    (width, height), canvas = transform.resized, turned_size(transform.resized, transform.placement.angle)
    turn = np.array([(cosine, sine), (-sine, cosine)])  # rows point down: this is counter-clockwise
    middle = np.array([canvas[0] / 2 - transform.crop[0], canvas[1] / 2 - transform.crop[1]])
    return np.column_stack((turn, middle - turn @ np.array([width / 2, height / 2])))


def warp(transform: Transform, resized: Pixels) -> Pixels:
    """Return a resized picture (H, W, C), or its mask (H, W), as its bucket shows it, not yet mirrored.

    Beyond its edge a picture goes on in the colours of the edge, so that half-covered pixels have them; a mask is 0.
    A picture that is not turned is moved by whole pixels: they stay exactly what they are.
    """
    matrix = _matrix(transform)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV's coordinates begin in the middle of a pixel
    is_mask = resized.ndim == 2
    border = cv2.BORDER_CONSTANT if is_mask else cv2.BORDER_REPLICATE
    flags = cv2.INTER_LINEAR if is_mask else cv2.INTER_CUBIC
    return np.asarray(cv2.warpAffine(resized, matrix, transform.target, flags=flags, borderMode=border), np.uint8)


def mean_colour(rgb: Pixels, shown: Pixels) -> npt.NDArray[np.float64]:
    """Return the mean colour (3,) of those of pixels (H, W, 3) that are not 0 in (H, W) uint8; mid-grey if all are."""
    return np.array(cv2.mean(rgb, shown)[:3]) if shown.any() else np.full(3, 127.5)


def over_canvas(rgb: Pixels, coverage: Pixels, canvas: npt.NDArray[np.float64] | Pixels) -> Pixels:
    """Return pixels (H, W, 3) over a canvas, seen where coverage (H, W), 0 to 255, says that they are not there.

    The canvas is a colour (3,), or pixels (H, W, 3).
    """
    below = np.empty_like(rgb)
    below[:] = np.rint(canvas)
    is_edge = (coverage > 0) & (coverage < 255)
    share = (coverage[is_edge].astype(np.float32) / 255)[:, None]
    blended = np.rint(rgb[is_edge] * share + below[is_edge] * (1 - share)).astype(np.uint8)
    over = np.asarray(cv2.copyTo(rgb, coverage, below), np.uint8)
    over[is_edge] = blended
    return over
