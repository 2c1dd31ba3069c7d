"""The plan of a run: which images form which batch, a pure function of samples, seed and epoch.

An epoch draws every image num_repeats times. A batch holds images of one bucket of one dataset; the last of a bucket
may be short. Several processes share each batch, which is then so many times larger: the plan is the same for all of
them, and equal to that of one process with the larger batch. An optimizer step never spans two epochs: the last of an
epoch may take fewer batches than --gradient_accumulation_steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from library.dataset.config import DatasetConfig
from library.dataset.geometry import Size
from library.dataset.scan import Sample


@dataclass(frozen=True)
class Draw:
    """One image, drawn once."""

    sample: int  # its index
    repeat: int  # from 0, within the epoch
    epoch: int  # from 1
    step: int  # the optimizer step it belongs to, from 0


@dataclass(frozen=True)
class Bucket:
    """The images of one dataset that are trained at one size, and so may share a batch."""

    dataset: int
    size: Size
    batch_size: int  # of all processes together
    samples: tuple[int, ...]  # indices
    repeats: tuple[int, ...]  # of each, in an epoch

    @property
    def num_draws(self) -> int:
        """Images in an epoch, repeats counted."""
        return sum(self.repeats)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_draws // self.batch_size)


@dataclass(frozen=True)
class RunPlan:
    """The order of all draws."""

    buckets: tuple[Bucket, ...]
    seed: int
    gradient_accumulation_steps: int = 1

    @cached_property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch."""
        return sum(bucket.num_batches for bucket in self.buckets)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.batches_per_epoch // self.gradient_accumulation_steps)

    def first_batch_of(self, step: int) -> int:
        """Return the number, over all epochs, of the first batch of an optimizer step (from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + step_in_epoch * self.gradient_accumulation_steps

    def ends_step(self, batch: int) -> bool:
        """Return whether the optimizer steps after this batch, numbered from 0 over all epochs."""
        in_epoch = batch % self.batches_per_epoch + 1
        return in_epoch == self.batches_per_epoch or in_epoch % self.gradient_accumulation_steps == 0

    def batches(self, start_batch: int = 0) -> Iterator[tuple[Draw, ...]]:
        """Yield the batches without end, from the one numbered start_batch (from 0, over all epochs)."""
        epoch, skipped = divmod(start_batch, self.batches_per_epoch)
        while True:
            batches = self._epoch(epoch + 1)
            for number in range(skipped, self.batches_per_epoch):
                step = epoch * self.steps_per_epoch + number // self.gradient_accumulation_steps
                yield tuple(Draw(sample, repeat, epoch + 1, step) for sample, repeat in batches[number])
            epoch, skipped = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Return the batches of an epoch: (sample, repeat) of each draw."""
        order = random.Random(f"order {self.seed} {epoch}")  # as it is in every process
        batches = []
        for bucket in self.buckets:
            draws = [
                (sample, repeat)
                for sample, repeats in zip(bucket.samples, bucket.repeats, strict=True)
                for repeat in range(repeats)
            ]
            order.shuffle(draws)
            size = bucket.batch_size
            batches += [draws[start : start + size] for start in range(0, len(draws), size)]
        order.shuffle(batches)
        return batches


def make_plan(
    configs: Sequence[DatasetConfig],
    samples: Sequence[Sample],
    *,
    seed: int,
    gradient_accumulation_steps: int = 1,
    num_processes: int = 1,
) -> RunPlan:
    """Return the plan of a run over samples, of which there must be one at least; batch sizes are for each process."""
    assert samples, "a scan without samples has errors, which are raised before"
    return RunPlan(tuple(group_by_bucket(configs, samples, num_processes)), seed, gradient_accumulation_steps)


def validation_batches(
    configs: Sequence[DatasetConfig], samples: Sequence[Sample], *, first_index: int, limit: int | None, step: int
) -> list[tuple[Draw, ...]]:
    """Return the batches in which samples that are held back are looked at, by bucket and name.

    Args:
        configs: of the datasets.
        samples: held back.
        first_index: of the first of samples, among all images of the run.
        limit: the most batches, spread evenly over all; None takes all.
        step: stands in each draw: token warm-up is as far as after so many optimizer steps.
    """
    batches = []
    for bucket in group_by_bucket(configs, samples):
        drawn = [Draw(first_index + index, repeat=0, epoch=1, step=step) for index in bucket.samples]
        batches += [tuple(drawn[i : i + bucket.batch_size]) for i in range(0, len(drawn), bucket.batch_size)]
    count = len(batches) if limit is None else min(limit, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]


def group_by_bucket(
    configs: Sequence[DatasetConfig], samples: Sequence[Sample], num_processes: int = 1
) -> list[Bucket]:
    """Return the buckets that hold samples, by dataset, then size; num_processes share each batch."""
    members: dict[tuple[int, Size], list[int]] = {}
    for index, sample in enumerate(samples):
        members.setdefault((sample.dataset, sample.transform.target), []).append(index)
    return [
        Bucket(
            dataset=dataset,
            size=size,
            batch_size=configs[dataset].batch_size * num_processes,
            samples=tuple(indices),
            repeats=tuple(samples[index].num_repeats for index in indices),
        )
        for (dataset, size), indices in sorted(members.items())
    ]


def rng(seed: int, draw: Draw, name: str) -> random.Random:
    """Return the generator of one draw's caption and augmentation: of seed, epoch, image and repeat alone.

    Args:
        seed: of the run.
        draw: of which epoch and repeat count, not the index: a new image leaves the others' draws alone.
        name: tells the image from the others, on any machine: its folder's name and its own.
    """
    return random.Random(f"draw {seed} {draw.epoch} {draw.repeat} {name}")
