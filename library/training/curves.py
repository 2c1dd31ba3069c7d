"""The shapes of learning-rate schedules: pure functions from a step to a factor of the learning rate.

Each curve takes the run's length and the group's rate, then keyword arguments, which are those that --lr_scheduler_args
may set. Formulas and argument names are those of transformers.optimization and, for piecewise_constant,
diffusers.optimization; with one difference, in polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Factor = Callable[[int], float]  # of a group's rate, at step 0, 1, ...


@dataclass(frozen=True)
class Length:
    """A run in optimizer steps."""

    total: int
    warmup: int
    decay: int

    def rise(self, step: int) -> float | None:
        """Return the factor while the rate warms up from 0, None after."""
        return step / max(1, self.warmup) if step < self.warmup else None

    def progress(self, step: int) -> float:
        """Return which part of the time after the warm-up has passed: 0 at its start, 1 at the end of the run."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def cosine_wave(progress: float, num_cycles: float) -> float:
    """Return a wave from 1 at progress 0: half a cycle ends at 0, a whole one at 1."""
    return 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))


def raised(factor: float, floor: float) -> float:
    """Return a factor in [0, 1] squeezed into [floor, 1]."""
    return max(0.0, factor * (1 - floor) + floor)


def after_warmup(length: Length, fall: Factor) -> Factor:
    """Return a linear warm-up from 0, then fall."""

    def factor(step: int) -> float:
        rise = length.rise(step)
        return fall(step) if rise is None else rise

    return factor


def constant(length: Length, rate: float) -> Factor:
    """Return 1 throughout."""
    return lambda step: 1.0


def constant_with_warmup(length: Length, rate: float) -> Factor:
    """Return a warm-up to 1."""
    return after_warmup(length, lambda step: 1.0)


def linear(length: Length, rate: float) -> Factor:
    """Return a straight fall from 1 to 0."""
    return after_warmup(length, lambda step: max(0.0, 1 - length.progress(step)))


def cosine(length: Length, rate: float, *, num_cycles: float = 0.5) -> Factor:
    """Return a cosine from 1, with num_cycles waves."""
    return after_warmup(length, lambda step: cosine_wave(length.progress(step), num_cycles))


def cosine_with_restarts(length: Length, rate: float, *, num_cycles: int = 1) -> Factor:
    """Return num_cycles falls from 1 to 0, each a half cosine."""

    def fall(step: int) -> float:
        progress = length.progress(step)
        return 0.0 if progress >= 1 else cosine_wave(num_cycles * progress % 1, 0.5)

    return after_warmup(length, fall)


def polynomial(length: Length, rate: float, *, power: float = 1.0, lr_end: float = 1e-7) -> Factor:
    """Return a fall from 1 to lr_end / rate; power 1 is straight.

    Every group ends at lr_end; sd-scripts' groups end at lr_end times their share of --learning_rate.

    Raises: ValueError for a rate that is not above lr_end.
    """
    if rate <= lr_end:
        raise ValueError(f"the learning rate {rate:g} must be above lr_end, {lr_end:g}")
    end = lr_end / rate
    return after_warmup(length, lambda step: (1 - end) * max(0.0, 1 - length.progress(step)) ** power + end)


def inverse_sqrt(length: Length, rate: float, *, timescale: int | None = None) -> Factor:
    """Return √(timescale / (timescale + steps since the warm-up)); timescale is the warm-up's length, or 10000."""
    scale = timescale or length.warmup or 10_000
    return after_warmup(length, lambda step: 1 / math.sqrt((step + scale - length.warmup) / scale))


def floor_of(rate: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    """Return the lowest factor, from an absolute rate or a ratio.

    Raises: ValueError unless exactly one is given.
    """
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("give the lowest rate: --lr_scheduler_min_lr_ratio 0.1, or min_lr=1e-6 in --lr_scheduler_args")
    return min_lr / rate if min_lr is not None else min_lr_rate or 0.0


def cosine_with_min_lr(
    length: Length,
    rate: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Factor:
    """Return a cosine from 1 to the lowest rate."""
    floor = floor_of(rate, min_lr, min_lr_rate)
    return after_warmup(length, lambda step: raised(cosine_wave(length.progress(step), num_cycles), floor))


def cosine_warmup_with_min_lr(
    length: Length,
    rate: float,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Factor:
    """Return a cosine from 1 to the lowest rate; its warm-up starts above 0: at warmup_lr_rate, or one step up."""
    floor = floor_of(rate, min_lr, min_lr_rate)

    def factor(step: int) -> float:
        if step >= length.warmup:
            return raised(cosine_wave(length.progress(step + 1), num_cycles), floor)
        if warmup_lr_rate is None:
            return (step + 1) / length.warmup
        return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, length.warmup - 1)

    return factor


# how a ramp from 0 to 1 rises, by its progress
_RAMPS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 1 - cosine_wave(progress, 0.5),
    "1-sqrt": lambda progress: 1 - math.sqrt(1 - progress),
}
_FALLS: Mapping[str, Callable[[float, float], float]] = {
    "linear": lambda progress, num_cycles: 1 - progress,
    "cosine": cosine_wave,
    "1-sqrt": lambda progress, num_cycles: 1 - math.sqrt(progress),
}


def warmup_stable_decay(
    length: Length,
    rate: float,
    *,
    num_cycles: float = 0.5,
    min_lr_ratio: float = 0.0,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> Factor:
    """Return a rise from the lowest rate, 1 for what the decay leaves of the run, and a fall back to the lowest rate.

    Raises: ValueError for an unknown type.
    """
    for name, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in _RAMPS:
            raise ValueError(f"{name}='{kind}' must be one of {', '.join(_RAMPS)}")
    start = length.total - length.decay

    def factor(step: int) -> float:
        if step < length.warmup:
            return raised(_RAMPS[warmup_type](step / length.warmup), min_lr_ratio)
        if step < start:
            return 1.0
        if step < length.total:
            return raised(_FALLS[decay_type]((step - start) / length.decay, num_cycles), min_lr_ratio)
        return min_lr_ratio

    return factor


def piecewise_constant(length: Length, rate: float, *, step_rules: str = "") -> Factor:
    """Return the factors of step_rules: "1:10,0.1:50,0.01" is 1 before step 10, 0.1 before step 50, then 0.01.

    Raises: ValueError where the rules cannot be read.
    """
    try:
        *rules, last = str(step_rules).split(",")
        pairs = [rule.split(":") for rule in rules]
        bounds = sorted((int(until), float(factor)) for factor, until in pairs)
        final = float(last)
    except ValueError:
        raise ValueError(
            f"give --lr_scheduler_args \"step_rules='1:10,0.1:50,0.01'\" (factor:until step, ..., last factor), "
            f"got '{step_rules}'"
        ) from None
    return lambda step: next((factor for until, factor in bounds if step < until), final)


CURVES: Mapping[str, Callable[..., Factor]] = {
    curve.__name__: curve
    for curve in (
        constant,
        constant_with_warmup,
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        inverse_sqrt,
        cosine_with_min_lr,
        cosine_warmup_with_min_lr,
        warmup_stable_decay,
        piecewise_constant,
    )
}
