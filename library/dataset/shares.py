"""Who gets what share: which samples are trained on and which held back, and how often regularisation images occur."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.problems import Joint, Problem

if TYPE_CHECKING:
    from library.dataset.scan import Sample


def divide(datasets: Sequence[Sequence[Sample]]) -> tuple[list[Sample], list[Sample], list[Problem]]:
    """Return the samples to be trained on, balanced, those held back, and a warning for each that is thereby left out.

    An image that is held back anywhere is trained on nowhere, whatever way its folder is named in another subset.
    """
    validation = [sample for samples in datasets for sample in samples if sample.is_validation]
    if not validation:
        return [sample for samples in datasets for sample in _balanced(samples)], [], []
    folders = {folder: folder.resolve() for folder in {s.path.parent for samples in datasets for s in samples}}

    def identity(sample: Sample) -> Path:
        path = folders[sample.path.parent] / sample.path.name
        return path.resolve() if path.is_symlink() else path

    held = {identity(sample) for sample in validation}
    trained: list[Sample] = []
    for samples in datasets:
        trained += _balanced([sample for sample in samples if identity(sample) not in held])
    shared = []
    twice = {s.path for samples in datasets for s in samples if identity(s) in held and not s.is_validation}
    for path in sorted(twice):
        joint = Joint("images are held back for validation in one subset, so others do not train on them", path.name)
        message = f"{path}: held back for validation in one subset, so no other trains on it."
        shared.append(Problem("warning", path, message, joint, "validation-shared"))
    return trained, validation, shared


def balanced_again(samples: Iterable[Sample]) -> list[Sample]:
    """Return samples that are trained on, of which some have been taken away since, balanced anew."""
    datasets: dict[int, list[Sample]] = {}
    for sample in samples:
        datasets.setdefault(sample.dataset, []).append(replace(sample, num_repeats=sample.subset.num_repeats))
    return [sample for dataset in datasets.values() for sample in _balanced(dataset)]


def _balanced(samples: Sequence[Sample]) -> list[Sample]:
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
