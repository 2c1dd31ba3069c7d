"""What a run measures: losses read back one step late, so that no step waits for the device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError

NUM_FIGURES = 8  # a sum and a number of images for each row of masks.figures


class LossError(UserError):
    """The loss of a step is not a finite number."""


@dataclass(frozen=True)
class MaskFigures:
    """What was measured inside and outside of masks: means over the images that have such a part."""

    inside: float | None  # the loss where the masks are white; grey counts in part; before any weight of images
    outside: float | None  # the loss where they are black
    share: float  # the mean weight of a masked image's cells
    drift: float | None = None  # how far predictions are from the untrained model's where they are held to it

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> MaskFigures | None:
        """Return the means, from masks.figures row by row; None where no image had a mask."""
        pairs = [sums[start : start + 2] for start in range(0, NUM_FIGURES, 2)]
        inside, outside, share, drift = (total / number if number else None for total, number in pairs)
        return None if share is None else cls(inside, outside, share, drift)

    def as_plain(self) -> list[float | None]:
        """Return it as values that JSON can hold; they are the constructor's arguments."""
        return [self.inside, self.outside, self.share, self.drift]


@dataclass(frozen=True)
class LossRecord:
    """What one optimizer step measured."""

    step: int  # 1-based
    epoch: int  # 1-based
    loss: float  # mean over the images of the step, of all processes
    learning_rates: dict[str, float]
    extras: dict[str, float]  # what the trainee measured, such as norms
    is_stop_wanted: bool  # a process was asked to stop; all learn it with the same record
    figures: MaskFigures | None = None  # None: no image of the step had a mask


@dataclass(frozen=True)
class ValidationRecord:
    """What was measured on the images that are held back."""

    step: int  # optimizer steps done
    epoch: int  # 1-based: that of the last step
    loss: float
    training_loss: float  # the mean over the last epoch's worth of steps
    figures: MaskFigures | None = None  # None: no image that is held back has a mask

    @property
    def divergence(self) -> float:
        """By how much the loss is higher than in training."""
        return self.loss - self.training_loss


@dataclass(frozen=True)
class StepLosses:
    """What one optimizer step leaves on the device."""

    step: int
    epoch: int
    losses: list[Tensor]  # (B,) a micro-batch
    names: tuple[str, ...]  # the images, in the order of losses
    learning_rates: dict[str, float]
    extras: dict[str, Tensor]  # scalars
    is_stop_wanted: bool = False
    figures: list[Tensor] = field(default_factory=list)  # (4, 2) a micro-batch with masks, see masks.figures


@dataclass(frozen=True)
class _Pending:
    measured: StepLosses
    # own losses; of all processes their sum, number, wishes to stop and figures; extras: on the way to the host
    values: Tensor
    arrived: torch.cuda.Event | None


class LossReader:
    """Brings losses to the host without making the device wait: each is read when the next one is pushed."""

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None, *, has_masks: bool = False) -> None:
        """Prepare a reader.

        Args:
            reduce: sums a tensor over the processes; None where there is one.
            has_masks: whether any image of the run has a mask, of any process.
        """
        self._reduce = reduce
        self._has_masks = has_masks
        self._pending: deque[_Pending] = deque()

    def push(self, measured: StepLosses) -> Iterator[LossRecord]:
        """Send a step's numbers on their way; return the records that have arrived."""
        losses = torch.cat([loss.detach().float() for loss in measured.losses])
        # made on the device: a copy from ordinary host memory may wait for it
        counts = [losses.new_full((), number) for number in (len(measured.names), measured.is_stop_wanted)]
        total = torch.stack([losses.sum(), *counts])
        if self._has_masks:
            zeros = losses.new_zeros(NUM_FIGURES)  # where no image of the step has a mask
            total = torch.cat([total, sum((each.reshape(-1) for each in measured.figures), zeros)])
        extras = [value.detach().float().reshape(1).to(losses.device) for value in measured.extras.values()]
        values = torch.cat([losses, self._reduce(total) if self._reduce else total, *extras])
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(measured, values, arrived))
        return self._read(keep=1)

    def drain(self) -> Iterator[LossRecord]:
        """Return all records still on their way; waits for the device."""
        return self._read(keep=0)

    def _read(self, keep: int) -> Iterator[LossRecord]:
        while len(self._pending) > keep:
            yield _record(self._pending.popleft())


def _record(pending: _Pending) -> LossRecord:
    if pending.arrived is not None:
        pending.arrived.synchronize()  # a whole step old: it has long passed
    measured, values = pending.measured, pending.values.tolist()
    own, (total, number, stops), rest = values[: (n := len(measured.names))], values[n : n + 3], values[n + 3 :]
    num_figures = len(rest) - len(measured.extras)
    if not math.isfinite(total):
        raise LossError(_broken(measured, own))
    return LossRecord(
        measured.step,
        measured.epoch,
        total / number,
        measured.learning_rates,
        dict(zip(measured.extras, rest[num_figures:], strict=True)),
        stops > 0,
        MaskFigures.of_sums(rest[:num_figures]) if num_figures else None,
    )


def _broken(measured: StepLosses, losses: list[float]) -> str:
    names = sorted({name for name, loss in zip(measured.names, losses, strict=True) if not math.isfinite(loss)})
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"step {measured.step}: the loss is not a finite number for "
        f"{', '.join(names[:5]) + more if names else 'an image of another process'}. Training stopped and nothing was "
        "saved after it. Look at these images, lower the learning rate, or use bf16 and --no_half_vae."
    )


@dataclass
class Window:
    """The mean of the last values, of which some may be missing."""

    size: int
    _recent: deque[float | None] = field(default_factory=deque)
    _sum: float = 0.0
    _count: int = 0

    def add(self, value: float | None) -> None:
        """Take a value, or that there is none, and let the oldest go."""
        self._recent.append(value)
        if value is not None:
            self._sum += value
            self._count += 1
        if len(self._recent) > self.size and (gone := self._recent.popleft()) is not None:
            self._sum -= gone
            self._count -= 1

    @property
    def mean(self) -> float | None:
        """The mean of the values; None without any."""
        return self._sum / self._count if self._count else None


@dataclass
class LossHistory:
    """The curve so far, with the mean over the last epoch's window as the progress bar shows it."""

    window: int  # optimizer steps in an epoch
    records: list[LossRecord] = field(default_factory=list)
    validations: list[ValidationRecord] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)  # as time.monotonic tells it
    num_before: int = 0  # records that begin found
    _losses: Window = field(init=False, repr=False)
    _inside: Window = field(init=False, repr=False)
    _outside: Window = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the windows."""
        self._losses, self._inside, self._outside = (Window(self.window) for _ in range(3))

    def add(self, record: LossRecord) -> None:
        """Append a record."""
        self.records.append(record)
        self._losses.add(record.loss)
        self._inside.add(None if record.figures is None else record.figures.inside)
        self._outside.add(None if record.figures is None else record.figures.outside)

    def begin(self) -> None:
        """Count time and steps from now on."""
        self.started_s = time.monotonic()
        self.num_before = len(self.records)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of what is done meanwhile: previews and saving are no part of a step."""
        before = time.monotonic()
        yield
        self.started_s += time.monotonic() - before

    @property
    def num_timed(self) -> int:
        """Steps since begin: those of an earlier run that this one resumes do not count."""
        return len(self.records) - self.num_before

    def as_plain(self) -> list[Any]:
        """Return the records as values that JSON can hold."""
        return [[r.step, r.epoch, r.loss, r.learning_rates, r.extras, *_plain_figures(r.figures)] for r in self.records]

    def replay(self, plain: Iterable[Any]) -> None:
        """Take records that as_plain made, so that averages go on as if the run had not stopped."""
        for step, epoch, loss, learning_rates, extras, *more in plain:
            figures = _figures(more)
            self.add(LossRecord(step, epoch, loss, learning_rates, extras, is_stop_wanted=False, figures=figures))

    def validations_as_plain(self) -> list[Any]:
        """Return what was measured on held-back images as values that JSON can hold."""
        return [[r.step, r.epoch, r.loss, r.training_loss, *_plain_figures(r.figures)] for r in self.validations]

    def replay_validations(self, plain: Iterable[Any]) -> None:
        """Take what validations_as_plain made."""
        self.validations += [
            ValidationRecord(step, epoch, loss, training_loss, _figures(more))
            for step, epoch, loss, training_loss, *more in plain
        ]

    @property
    def seconds(self) -> float:
        """Since the first step began."""
        return time.monotonic() - self.started_s

    @property
    def average(self) -> float:
        """The mean loss over the last epoch's worth of steps; 0 before the first."""
        return self._losses.mean or 0.0

    @property
    def inside(self) -> float | None:
        """The mean loss inside of masks over the last epoch's worth of steps; None where none was measured."""
        return self._inside.mean

    @property
    def outside(self) -> float | None:
        """The mean loss outside of masks, likewise."""
        return self._outside.mean

    def epoch_average(self, epoch: int) -> float:
        """The mean loss of one epoch; 0 if it has no record."""
        values = [record.loss for record in self.records if record.epoch == epoch]
        return sum(values) / len(values) if values else 0.0


def _plain_figures(figures: MaskFigures | None) -> list[list[float | None]]:
    """Return what stands at the end of a plain record: nothing where nothing was measured."""
    return [] if figures is None else [figures.as_plain()]


def _figures(plain: Sequence[Any]) -> MaskFigures | None:
    """Return what `_plain_figures` made plain."""
    return MaskFigures(*plain[0]) if plain else None
