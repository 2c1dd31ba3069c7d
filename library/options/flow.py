"""Options of training on a flow, as Stable Diffusion 3 is: which timesteps are drawn, and what they weigh."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.options.declare import check_values, option
from library.options.values import Bounds

# Beyond these "mode" has no density: it would turn back, or leave 0 … 1 (Esser et al. 2024, arXiv:2403.03206, 3.1)
MODE_SCALES = Bounds(min=-1, max=2 / (math.pi - 2))


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Which timesteps of a flow are drawn, and how they are weighed."""

    weighting_scheme: str = option(
        "uniform",
        "Timesteps of a flow. logit_normal and mode draw some more often than others, sigma_sqrt and cosmap weigh "
        "their losses, none and uniform do neither.",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(
        0.0, "Where --weighting_scheme logit_normal draws most, before the logistic function; above 0 is noisier."
    )
    logit_std: float = option(
        1.0, "How widely --weighting_scheme logit_normal draws, before the logistic function.", bounds=Bounds(min=0)
    )
    mode_scale: float = option(
        1.29,
        "How much more often --weighting_scheme mode draws the middle; 0 is uniform, below 0 the ends.",
        bounds=MODE_SCALES,
    )
    training_shift: float = option(
        1.0, "Move the timesteps that are drawn towards noise; 1 leaves them, below 1 is towards pictures.",
        bounds=Bounds(above=0),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
