"""Options of the loss on images that are held back from training."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option, settle
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Which images are held back, and when their loss is computed."""

    validation_split: float = option(
        0.0, "Share of each subset's images that is held back from training; a data set config can set it by subset."
    )
    validation_seed: int | None = option(
        None,
        "Seed of the choice of these images and of the draws made for their loss; unset: names choose, --seed draws.",
    )
    validate_every_n_steps: int | None = option(
        None, "Compute their loss every N optimizer steps too. 0 is off.", bounds=Bounds(min=0)
    )
    validate_every_n_epochs: int | None = option(
        None, "Compute their loss every N epochs instead of every epoch. 0 is every epoch.", bounds=Bounds(min=0)
    )
    max_validation_steps: int | None = option(
        None, "Batches that are looked at each time, over all processes. 0 is no limit.", bounds=Bounds(min=0)
    )

    def __post_init__(self) -> None:
        """Check the values; 0 is as good as none."""
        check_values(self)
        for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
            if getattr(self, name) == 0:
                settle(self, name, None)
