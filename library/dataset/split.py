"""Which images of a subset are held back for validation, and how often those for regularisation are repeated."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.dataset.scan import Sample


def held_back(images: Sequence[Path], share: float, seed: int | None) -> frozenset[Path]:
    """Return the images of a subset that are not to be trained on: all but the first ceil(n·(1 - share)) of an order.

    Args:
        images: in the order of their names.
        share: from 0 to 1, of the images.
        seed: of the order, which is that of sd-scripts; None: it follows from the names alone, so that it is the same
            in every run, and a new image moves no other one far.
    """
    if not share:
        return frozenset()
    order = list(images)
    if seed is None:
        order.sort(key=lambda image: hashlib.blake2b(image.name.encode("utf-8", "surrogateescape")).digest())
    else:
        random.Random(seed).shuffle(order)
    return frozenset(order[math.ceil(len(order) * (1 - share)) :])


def balanced(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples with regularisation images repeated, or left out, until they are as many as the others.

    In order, each with its own repeats, until the others' number is reached; the rest are not used. If they are too
    few, each gets one repeat more, in order and again, until it is reached.
    """
    regular = [sample for sample in samples if not sample.is_reg]
    wanted = sum(sample.num_repeats for sample in regular)
    chosen: list[Sample] = []
    total = 0
    for sample in samples:
        if sample.is_reg and total < wanted:
            chosen.append(sample)
            total += sample.num_repeats
    if not chosen:
        return regular
    rounds, rest = divmod(max(0, wanted - total), len(chosen))
    return regular + [
        replace(sample, num_repeats=sample.num_repeats + rounds + (number < rest))
        for number, sample in enumerate(chosen)
    ]
