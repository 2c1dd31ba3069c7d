"""Looks: the ways of showing one sample. A cache holds them all, and each draw takes one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from library.dataset import placement
from library.isolation import KEEP, Fill, FillKind

if TYPE_CHECKING:
    from pathlib import Path

    from library.dataset.geometry import Transform
    from library.dataset.scan import Sample


@dataclass(frozen=True)
class Look:
    """One way of showing a sample."""

    transform: Transform
    fill: Fill


def looks_of(sample: Sample) -> tuple[Look, ...]:
    """Return all looks of a sample, one at least; the first stands for them on sheets."""
    return tuple(look_of(sample, number) for number in range(num_looks(sample)))


def num_looks(sample: Sample) -> int:
    """Return how many looks a sample has."""
    return (sample.subset.placement_variants if sample.subset.random_placement else 1) * len(fills_of(sample))


def look_of(sample: Sample, number: int) -> Look:
    """Return one look of a sample, numbered from 0, without making the others."""
    is_placed = sample.subset.random_placement
    transform = _placed(sample, number // len(fills_of(sample))) if is_placed else sample.transform
    return Look(transform, fill_of(sample, number))


def fill_of(sample: Sample, number: int) -> Fill:
    """Return the fill of one look of a sample, numbered from 0."""
    fills = fills_of(sample)
    return fills[number % len(fills)]


def is_cut_anew(sample: Sample) -> bool:
    """Return whether each draw may show another part of a sample, so that one cut does not stand for all."""
    subset = sample.subset
    return subset.random_crop or subset.random_placement or subset.face_crop_aug_range is not None


def _placed(sample: Sample, number: int) -> Transform:
    """Return one of the placements that a cache holds: whatever run it is made in, the same."""
    rng = random.Random(f"placement {seed_of(sample.path)} {number}")
    return placement.draw(sample.transform, sample.subset, rng, sample.region)


def fills_of(sample: Sample) -> tuple[Fill, ...]:
    """Return what may stand where a sample is masked out; one that is named twice is drawn twice as often."""
    if sample.mask.kind == "none":
        return (KEEP,)
    seen: Counter[str] = Counter()
    fills = []
    for kind in sample.subset.mask_fill:
        fills.append(Fill(cast("FillKind", kind), seen[kind]))
        seen[kind] += kind == "noise"  # only noise differs from time to time
    return tuple(fills)


def seed_of(path: Path) -> str:
    """Return what noise in an image is drawn from: its folder's name and its own, whatever its format and content."""
    return f"{path.parent.name}/{path.stem}"


def draw(num_looks: int, rng: random.Random) -> int:
    """Return the number of this draw's look; rng is of this draw alone."""
    return int(rng.random() * num_looks) if num_looks > 1 else 0


def is_shown_masked(sample: Sample, rng: random.Random) -> bool:
    """Return whether this draw's mask counts: --unmasked_probability takes it away, but never in validation."""
    if not sample.mask.is_given:
        return False
    probability = 0.0 if sample.is_validation else sample.subset.unmasked_probability
    return rng.random() >= probability
