"""Options of the learning rate's course."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_pairs, check_values, option
from library.options.values import Bounds, int_or_ratio


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How the learning rate changes over the run."""

    lr_scheduler: str = option(
        "constant",
        "Course of the learning rate: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, "
        "polynomial, inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, piecewise_constant, adafactor:LR.",
    )
    lr_scheduler_type: str = option(
        "", "Class of torch.optim.lr_scheduler, or dotted path of one, instead of --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] | None = option(None, "key=value settings of the schedule.")
    lr_warmup_steps: int | float = option(
        0,
        "Steps until the full learning rate: 100, or a ratio of all steps: 0.1 or 10%.",
        parse=int_or_ratio,
        bounds=Bounds(min=0),
    )
    lr_decay_steps: int | float = option(
        0,
        "Steps of the fall at the end of warmup_stable_decay: 100, 0.1 or 10%.",
        parse=int_or_ratio,
        bounds=Bounds(min=0),
    )
    lr_scheduler_num_cycles: int = option(1, "Cycles of cosine_with_restarts.", bounds=Bounds(min=1))
    lr_scheduler_power: float = option(1.0, "Exponent of polynomial.", bounds=Bounds(above=0))
    lr_scheduler_timescale: int | None = option(
        None, "Time scale of inverse_sqrt in steps; unset: the warm-up, or 10000 without one.", bounds=Bounds(min=1)
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        "Lowest learning rate of cosine_with_min_lr and warmup_stable_decay, as part of the full one.",
        bounds=Bounds(min=0, max=1),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        check_pairs(self.lr_scheduler_args, "--lr_scheduler_args")
        has_warmup = self.lr_scheduler_type == "" and self.lr_scheduler.split(":")[0] not in ("constant", "adafactor")
        if self.lr_warmup_steps and not has_warmup:
            flag = "--lr_scheduler_type" if self.lr_scheduler_type else "--lr_scheduler"
            raise OptionError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: {flag} {self.lr_scheduler_type or self.lr_scheduler} "
                "has no warm-up. Leave it out, or choose a schedule like constant_with_warmup."
            )
