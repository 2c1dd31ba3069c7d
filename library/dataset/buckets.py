"""Buckets: the sizes an image may be trained at, and the resize and centred crop that bring it there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from library.dataset.geometry import Size, Transform

if TYPE_CHECKING:
    from library.dataset.config import DatasetConfig, SubsetConfig


def assign(config: DatasetConfig, subset: SubsetConfig, source: Size) -> Transform:
    """Return the transform that brings an image of size source into its bucket, cut in the middle.

    Without buckets the resolution is the only bucket. With random_crop and without buckets, an image that is large
    enough keeps its scale, as in sd-scripts.
    """
    if not config.enable_bucket:
        is_large = source[0] >= config.resolution[0] and source[1] >= config.resolution[1]
        resized = source if subset.random_crop and is_large else cover(source, config.resolution)
        return centred(source, resized, config.resolution, subset.resize_interpolation)
    if config.bucket_no_upscale:
        area = config.resolution[0] * config.resolution[1]
        bucket, resized = fit_area(source, area, config.bucket_reso_steps)
    else:
        limits = (config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps)
        bucket = choose(source, sizes_of_area(config.resolution, *limits))
        resized = cover(source, bucket)
    return centred(source, resized, bucket, subset.resize_interpolation)


@lru_cache(maxsize=64)
def sizes_of_area(resolution: Size, shortest: int, longest: int, step: int) -> tuple[Size, ...]:
    """Return all bucket sizes with at most the area of resolution, sorted by width, then height.

    Args:
        resolution: width and height, pixels; only the product counts.
        shortest: smallest side, a multiple of step.
        longest: largest side, a multiple of step.
        step: sides are multiples of it.
    """
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area)) // step * step
    sizes = {(side, side)}
    for width in range(shortest, min(longest, area // shortest) + 1, step):  # a wider one would be too low
        height = min(longest, area // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def rounded_limits(shortest: int, longest: int, step: int) -> tuple[int, int]:
    """Return the limits of a bucket's side: the shortest rounded down, the longest up to a multiple of step."""
    return shortest // step * step, -(-longest // step) * step


def choose(source: Size, sizes: Sequence[Size]) -> Size:
    """Return source itself where it is one of sizes, else the size of nearest aspect (the first of equals)."""
    if source in sizes:
        return source
    aspect = source[0] / source[1]
    return min(sizes, key=lambda size: abs(size[0] / size[1] - aspect))


def cover(source: Size, target: Size) -> Size:
    """Return source scaled, its aspect kept, so that it just covers target."""
    width, height = source
    scale = target[1] / height if width / height > target[0] / target[1] else target[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def fit_area(source: Size, area: int, step: int) -> tuple[Size, Size]:
    """Return (bucket, resized) without enlarging: shrunk to the area where larger, then floored to the step.

    One side is rounded to the step and the other derived from it; of the two ways, the one that keeps the aspect
    better wins. An image with a side below one step gets a bucket of one step there, and has to be enlarged to cover
    it (the reference divides by zero, or makes a bucket of no width).
    """
    resized = source if source[0] * source[1] <= area else _shrink(source, area, step)
    bucket = (max(step, resized[0] // step * step), max(step, resized[1] // step * step))
    if resized[0] < bucket[0] or resized[1] < bucket[1]:
        resized = cover(source, bucket)
    return bucket, resized


def _shrink(source: Size, area: int, step: int) -> Size:
    aspect = source[0] / source[1]
    width = math.sqrt(area * aspect)
    height = area / width
    by_width = _round_down(width, step)
    by_height = _round_down(height, step)
    error_by_width = _aspect_error(by_width, _round_down(by_width / aspect, step), aspect)
    error_by_height = _aspect_error(_round_down(by_height * aspect, step), by_height, aspect)
    if error_by_width < error_by_height:
        return by_width, int(by_width / aspect + 0.5)
    if by_height:
        return int(by_height * aspect + 0.5), by_height
    return max(1, int(width + 0.5)), max(1, int(height + 0.5))  # a strip thinner than one step


def _round_down(length: float, step: int) -> int:
    return int(length + 0.5) // step * step


def _aspect_error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if width and height else math.inf


def centred(source: Size, resized: Size, target: Size, interpolation: str | None = None) -> Transform:
    """Return the transform that resizes source and cuts target from the middle."""
    crop = ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)
    return Transform(source, resized, crop, target, interpolation)
