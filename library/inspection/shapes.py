"""Checks of sizes: pictures turned, enlarged, cut, of extreme proportions, and buckets that do not fill a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from library.dataset import buckets, looks
from library.dataset.geometry import Size, Transform
from library.dataset.plan import group_by_bucket
from library.dataset.problems import Problem
from library.dataset.scan import Sample
from library.inspection.kinds import found
from library.inspection.scene import Scene

ENLARGED = 2.0  # times: beyond it a picture is mush
EXTREME = 4.0  # longer side to shorter
MOST_CUT = 0.5  # share of the picture's area
ROOMIER = "Set smaller bucket_reso_steps or a wider range of bucket sides, or cut it yourself."


def turned(scene: Scene) -> Iterator[Problem]:
    """Yield pictures that an EXIF mark turns."""
    for sample in _each(scene):
        if sample.orientation != 1:
            reason = f"is turned upright, as its EXIF orientation {sample.orientation} says."
            yield found("image-turned", sample.path, reason, joint="pictures are turned as their EXIF mark says")


def enlarged(scene: Scene) -> Iterator[Problem]:
    """Yield pictures that are enlarged a lot to fill their bucket."""
    for sample in _filling(scene):
        transform = sample.transform
        scale = transform.resized[0] / transform.source[0]
        if scale >= ENLARGED and _aspect(sample) <= EXTREME:
            (width, height), target = transform.source, "{}x{}".format(*transform.target)
            reason = f"has {width}x{height} pixels and is enlarged {scale:.1f} times, to fill {target}."
            is_zoomed = sample.subset.mask_aware_zoom > 1 and transform.resized != _covering(transform)
            remedy = "Lower mask_aware_zoom, or find a larger original." if is_zoomed else ""
            yield found("image-enlarged", sample.path, reason, remedy=remedy, joint="pictures are enlarged a lot")


def extreme(scene: Scene) -> Iterator[Problem]:
    """Yield pictures much longer in one direction than in the other."""
    for sample in _filling(scene):
        if _aspect(sample) > EXTREME:
            width, height = sample.transform.source
            share = share_cut(sample)
            outcome = f"{share:.0%} is cut away." if share else "It is small in its bucket."
            reason = f"is {width}x{height}, {_aspect(sample):.1f} to 1. {outcome}"
            yield found("image-aspect", sample.path, reason, joint="pictures are of extreme proportions")


def cut(scene: Scene) -> Iterator[Problem]:
    """Yield pictures of which most is cut away; where each draw may show another part, none."""
    for sample in _filling(scene):
        share = 0.0 if looks.is_cut_anew(sample) else share_cut(sample)
        if share > MOST_CUT and _aspect(sample) <= EXTREME:
            target = "{}x{}".format(*sample.transform.target)
            reason = f"{share:.0%} of it is cut away to fit into {target}."
            remedy = ROOMIER if scene.configs[sample.dataset].enable_bucket else ""
            joint = "pictures lose more than half to the cut"
            yield found("image-cut", sample.path, reason, remedy=remedy, joint=joint)


def short_batches(scene: Scene) -> Iterator[Problem]:
    """Yield buckets with fewer pictures, repeats counted, than a batch holds."""
    for bucket in group_by_bucket(scene.configs, scene.scan.samples):
        if bucket.num_draws < bucket.batch_size:
            paths = tuple(scene.scan.samples[number].path for number in bucket.samples)
            size = "{}x{}".format(*bucket.size)
            reason = (
                f"bucket {size} holds {bucket.num_draws} of the {bucket.batch_size} pictures of a batch, repeats "
                "counted: its batches are short, and weigh each of its pictures more."
            )
            source = scene.scan.samples[bucket.samples[0]].subset.source
            joint = "buckets hold fewer pictures than a batch"
            yield found("bucket-short", source, reason, files=paths, joint=joint, name=size)


def _aspect(sample: Sample) -> float:
    return max(sample.transform.source) / min(sample.transform.source)


def share_cut(sample: Sample) -> float:
    """Return the share of a picture that does not fit into its bucket.

    What mask_aware_zoom cuts is meant; random_placement brings in the whole picture.
    """
    transform = sample.transform
    if sample.subset.random_placement:
        return 0.0
    is_zoomed = sample.subset.mask_aware_crop and sample.subset.mask_aware_zoom > 1
    resized = _covering(transform) if is_zoomed else transform.resized
    return max(0.0, 1 - math.prod(transform.target) / math.prod(resized))


def _covering(transform: Transform) -> Size:
    """Return the least size of the picture at which it fills its bucket."""
    return buckets.cover(transform.source, transform.target)


def _filling(scene: Scene) -> Iterator[Sample]:
    """Yield those that fill their bucket, whereas placed ones are shown whole, or at a scale that is asked for."""
    yield from (sample for sample in _each(scene) if not sample.subset.random_placement)


def _each(scene: Scene) -> Iterator[Sample]:
    """Yield the samples of files, each in each size once."""
    seen = set()
    for sample in scene.of_files:
        key = (sample.path, sample.transform)
        if key not in seen:
            seen.add(key)
            yield sample
