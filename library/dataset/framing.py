"""Mask-aware crops: the bucket, the scale and the cut that keep the weighted region of a picture whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.dataset import buckets
from library.dataset.geometry import Box, Size, Transform
from library.dataset.problems import Joint, Problem

if TYPE_CHECKING:
    from library.dataset.config import DatasetConfig, SubsetConfig
    from library.dataset.scan import Sample

MARGIN = 1 / 32  # of the bucket's side, left on each side of a region that is shown closer

Frame = tuple[Size, Size]  # a bucket, and the resized picture that covers it


def assign(
    config: DatasetConfig, subset: SubsetConfig, source: Size, region: Box | None, *, is_bucket_fixed: bool = False
) -> Transform:
    """Return the transform that brings an image into its bucket, with mask_aware_crop round its weighted region.

    Of all buckets in which the region stays whole it is the one of nearest aspect (with bucket_no_upscale, the one
    that is largest and cuts least off), and the cut is moved from the middle as little as needed. Where there is none,
    it is the bucket that shows most of the region.

    Args:
        config: of the dataset.
        subset: of the image.
        source: size of the image.
        region: what its mask lets be learnt, in pixels of the image; None: no mask, an empty one, or not asked for.
        is_bucket_fixed: the bucket was chosen before the region was known.
    """
    plain = buckets.assign(config, subset, source)
    if region is None or not subset.mask_aware_crop or region == (0, 0, *source):
        return plain
    frames = [(plain.target, plain.resized)] if is_bucket_fixed else _frames(config, source, plain)
    target, covering = max(frames, key=lambda frame: _share(source, frame, region))  # the first of equals
    resized = _scaled(config, subset, source, region, target, covering, plain)
    is_closer = subset.mask_aware_zoom > 1 and resized != covering
    return _cut(replace(plain, target=target, resized=resized), region, is_closer, subset.random_crop)


def _frames(config: DatasetConfig, source: Size, plain: Transform) -> Sequence[Frame]:
    """Return all buckets an image may go to, the preferred ones first."""
    if not config.enable_bucket:
        return [(plain.target, buckets.cover(source, plain.target))]
    if config.bucket_no_upscale:
        return [(plain.target, plain.resized), *_without_enlarging(config, source)]
    limits = (config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps)
    aspect = source[0] / source[1]
    sizes = sorted(
        buckets.sizes_of_area(config.resolution, *limits),
        key=lambda size: (size != plain.target, abs(size[0] / size[1] - aspect)),
    )
    return [(size, buckets.cover(source, size)) for size in sizes]


def _without_enlarging(config: DatasetConfig, source: Size) -> Sequence[Frame]:
    """Return the buckets whose one side shows a whole side of the image, which is not enlarged.

    Where any bucket shows a region whole, one of these does: it is as wide, and as high or higher, or the other way
    round. First is the one that is largest and cuts least off.
    """
    area, step = config.resolution[0] * config.resolution[1], config.bucket_reso_steps
    frames: set[Frame] = set()
    for axis in (0, 1):
        for side in range(step, source[axis] + 1, step):
            other = min(source[1 - axis] * side // source[axis], area // side) // step * step
            if other:
                bucket = (side, other) if axis == 0 else (other, side)
                frames.add((bucket, buckets.cover(source, bucket)))
    return sorted(frames, key=lambda frame: (-(math.prod(frame[0]) ** 2) / math.prod(frame[1]), frame))


def _share(source: Size, frame: Frame, region: Box) -> float:
    """Return how much of the region the bucket can show at best, from 0 to 1 of its area."""
    target, resized = frame
    share = 1.0
    for axis in (0, 1):
        start, end = _span(source, resized, region, axis)
        share *= min(1.0, target[axis] / (end - start))
    return share


def _span(source: Size, resized: Size, region: Box, axis: int) -> tuple[int, int]:
    """Return the first and last but one pixel of the resized image, along an axis, that show some of the region."""
    start = region[axis] * resized[axis] // source[axis]
    return start, -(-region[axis + 2] * resized[axis] // source[axis])


def _scaled(
    config: DatasetConfig,
    subset: SubsetConfig,
    source: Size,
    region: Box,
    target: Size,
    covering: Size,
    plain: Transform,
) -> Size:
    """Return the size that the image gets: as it covers its bucket, or closer where settings and region allow that."""
    covers = covering[0] / source[0]
    scale = covers * subset.mask_aware_zoom
    if config.enable_bucket and config.bucket_no_upscale:
        scale = min(scale, 1.0)
    if plain.target == target:
        scale = max(scale, plain.resized[0] / source[0])  # random_crop keeps the image's own scale without buckets
    for axis in (0, 1):
        scale = min(scale, target[axis] * (1 - 2 * MARGIN) / (region[axis + 2] - region[axis]))
    if scale <= covers:
        return covering
    width, height = (max(target[axis], int(source[axis] * scale + 0.5)) for axis in (0, 1))
    return width, height


def _cut(transform: Transform, region: Box, is_closer: bool, random_crop: bool) -> Transform:
    """Return transform with its cut moved as little from the middle as shows most of the region."""
    crop: list[int] = []
    least: list[int] = []
    most: list[int] = []
    for axis in (0, 1):
        length, target = transform.resized[axis], transform.target[axis]
        start, end = _span(transform.source, transform.resized, region, axis)
        margin = min(int(target * MARGIN), (target - (end - start)) // 2) if is_closer else 0
        last = length - target
        first, second = sorted((start - max(0, margin), end + max(0, margin) - target))
        first, second = max(0, min(first, last)), max(0, min(second, last))
        crop.append(max(first, min(last // 2, second)))
        least.append(first)
        most.append(second)
    reach = (least[0], least[1], most[0], most[1]) if random_crop else None
    return replace(transform, crop=(crop[0], crop[1]), reach=reach)


def kept(transform: Transform, region: Box) -> float:
    """Return how much of the region's area lies within the cut, from 0 to 1; half-covered pixels count as cut off."""
    share = 1.0
    for axis in (0, 1):
        start, end = _span(transform.source, transform.resized, region, axis)
        left = transform.crop[axis]
        share *= max(0, min(end, left + transform.target[axis]) - max(start, left)) / (end - start)
    return share


def cut_off(configs: Sequence[DatasetConfig], samples: Iterable[Sample]) -> Iterator[Problem]:
    """Yield a warning for each image of which mask_aware_crop cannot keep the weighted region whole."""
    for sample in samples:
        is_asked = sample.subset.mask_aware_crop and sample.region != (0, 0, *sample.transform.source)
        if sample.region is None or not is_asked:
            continue
        share = kept(sample.transform, sample.region)
        if share < 1:
            percent = math.floor(share * 100)
            what = "images have more to be learnt than any cut of theirs shows (mask_aware_crop)"
            is_bucketed = configs[sample.dataset].enable_bucket
            room = "smaller bucket_reso_steps, or a wider range of bucket sides" if is_bucketed else "enable_bucket"
            remedy = f"There is more room with {room}."
            message = (
                f"{sample.path}: mask_aware_crop keeps {percent}% of what its mask lets be learnt, no bucket shows it "
                f"whole. {remedy}"
            )
            joint = Joint(what, f"{sample.path.name} ({percent}% kept)", remedy)
            yield Problem("warning", sample.path, message, joint, "mask-cut-away", remedy)
