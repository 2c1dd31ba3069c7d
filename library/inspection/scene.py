"""What the checks look at: the configs, what the scan found, and what the pixels tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from library.dataset.config import DatasetConfig
from library.dataset.problems import Problem
from library.dataset.scan import Sample, Scan
from library.inspection.facts import Looked


@dataclass(frozen=True)
class Scene:
    """A dataset as the checks see it."""

    configs: Sequence[DatasetConfig]
    scan: Scan
    looked: Sequence[Looked] = field(default=(), repr=False)  # of all samples, or of none

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, those held back last."""
        return self.scan.samples + self.scan.validation

    @property
    def of_files(self) -> tuple[Sample, ...]:
        """All samples that are files, and not made by a class of the user's."""
        return tuple(sample for sample in self.samples if sample.give is None)

    @property
    def looked_once(self) -> tuple[Looked, ...]:
        """What was found of each picture with each of its masks, once."""
        first: dict[object, Looked] = {}
        for looked in self.looked:
            first.setdefault((looked.sample.path, looked.sample.mask), looked)
        return tuple(first.values())


Check = Callable[[Scene], Iterator[Problem]]
