"""Options of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How prediction and target are compared, and how timesteps are weighed."""

    loss_type: str = option(
        "l2",
        "Distance between prediction and target, element by element.",
        choices=("l1", "l2", "huber", "smooth_l1"),
    )
    huber_schedule: str = option(
        "snr",
        "How the turning point of huber and smooth_l1 depends on the timestep.",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "Turning point of huber and smooth_l1, before its schedule.", bounds=Bounds(above=0))
    huber_scale: float = option(1.0, "Factor of the constant and exponential huber schedules.", bounds=Bounds(above=0))
    min_snr_gamma: float | None = option(
        None,
        "Cap the weight of easy timesteps at this signal-to-noise ratio; 5 is usual. 0 is off.",
        bounds=Bounds(min=0),
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "Weigh timesteps of velocity prediction as noise prediction would. Needs --v_parameterization."
    )
    v_pred_like_loss: float | None = option(
        None,
        "Add this much of a loss weighed as velocity prediction's. Not with --v_parameterization. 0 is off.",
        bounds=Bounds(min=0),
    )
    debiased_estimation_loss: bool = option(
        False, "Weigh noisy timesteps more, by the inverse root of the signal-to-noise ratio."
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
