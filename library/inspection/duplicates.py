"""Checks for pictures that are there twice: the same file, or nearly the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from library.dataset.problems import Problem
from library.inspection.facts import Looked
from library.inspection.kinds import found
from library.inspection.scene import Scene

ALIKE = 0.98  # correlation of the brightness of coarse squares
MOST_BITS = 0.12  # share of the steps between finer squares that may go the other way
ROWS = 512  # compared with all others at a time


def duplicates(scene: Scene) -> Iterator[Problem]:
    """Yield the later of each two pictures that are the same, or nearly; ones without any detail do not count."""
    pictures = _pictures(scene)
    by_digest: dict[bytes, Looked] = {}
    different = []
    for looked in pictures:
        assert looked.picture is not None
        first = by_digest.setdefault(looked.picture.file.digest, looked)
        if first is looked:
            different.append(looked)
        else:
            yield _problem(first, looked, is_same=True)
    for first, second in _nearly_alike(different):
        yield _problem(first, second, is_same=False)


def _pictures(scene: Scene) -> list[Looked]:
    """Return each file once, those that are trained on first, regularisation images behind them."""
    by_path: dict[Path, Looked] = {}
    for looked in scene.looked:
        if looked.picture is not None and looked.picture.profile is not None:
            path = looked.sample.path.resolve()
            known = by_path.get(path)
            if known is None or _rank(looked) < _rank(known):
                by_path[path] = looked
    return sorted(by_path.values(), key=_rank)


def _rank(looked: Looked) -> tuple[bool, bool]:
    return looked.sample.is_validation, looked.sample.is_reg


def _nearly_alike(pictures: list[Looked]) -> Iterator[tuple[Looked, Looked]]:
    """Yield for each picture the first that is nearly the same, if there is one."""
    profiles = np.array([each.picture.profile for each in pictures if each.picture])
    if len(pictures) < 2:
        return
    told = set()
    for start in range(0, len(pictures), ROWS):
        likeness = profiles[start : start + ROWS] @ profiles.T
        for row, column in zip(*np.nonzero(likeness > ALIKE), strict=True):
            second, first = int(start + row), int(column)
            if first < second and second not in told and _bits_differ(pictures[first], pictures[second]) < MOST_BITS:
                told.add(second)
                yield pictures[first], pictures[second]


def _bits_differ(first: Looked, second: Looked) -> float:
    assert first.picture is not None
    assert second.picture is not None
    return float((first.picture.bits != second.picture.bits).mean())


def _problem(first: Looked, second: Looked, *, is_same: bool) -> Problem:
    a, b = first.sample, second.sample
    how = "is the same file as" if is_same else "is nearly the same picture as"
    code = "image-duplicate" if is_same else "image-similar"
    what = f"{how} {a.path.name}" + (f" in {a.path.parent}" if a.path.parent != b.path.parent else "")
    if b.is_validation and not a.is_validation:
        return found("validation-leak", b.path, f"{what}, which is trained on.", files=(a.path,))
    if b.is_reg and not a.is_reg:
        return found("reg-duplicate", b.path, f"{what}, which is no regularisation image.", files=(a.path,))
    joint = "pictures are there twice" if is_same else "pictures are nearly the same as another"
    return found(code, b.path, f"{what}.", files=(a.path,), joint=joint)
