"""Which images of a subset are held back for validation."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path


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
