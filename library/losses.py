"""Distances between prediction and target, and weights by signal-to-noise ratio. Pure functions, all in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import OptionError, did_you_mean

LOSS_TYPES = ("l2", "l1", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")

# Weights that grow without bound at one end of the schedule see the ratio within these limits. The upper one is
# sd-scripts'. The lower one is its mirror image: it binds only where a zero-terminal schedule nears SNR 0 (the plain
# Stable Diffusion schedule ends at 0.0047).
MIN_SNR, MAX_SNR = 1e-3, 1e3

NUM_TIMESTEPS = 1000  # T of every schedule; the exponential Huber schedule spans it


def elementwise(prediction: Tensor, target: Tensor, loss_type: str, huber_c: Tensor | None = None) -> Tensor:
    """Return the loss of each element, not reduced.

    With d = prediction - target: l2 d², l1 |d|, huber 2c(√(d²+c²) - c), smooth_l1 2(√(d²+c²) - c).
    huber tends to d² for a large c, and smooth_l1 to 2|d| for a small one (pseudo-Huber, arXiv:2403.16728).

    Args:
        prediction: (B, C, h, w), any floating type.
        target: (B, C, h, w).
        loss_type: one of LOSS_TYPES.
        huber_c: (B, 1, 1, 1) above 0, the threshold c; needed by huber and smooth_l1, ignored by the others.
    Returns: (B, C, h, w) float32, 0 or more.
    Raises: OptionError for an unknown loss type.
    """
    prediction, target = prediction.float(), target.float()
    if loss_type == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    if loss_type == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    if loss_type not in LOSS_TYPES:
        raise OptionError(f"--loss_type {loss_type} is unknown; choose {choices(LOSS_TYPES, loss_type)}")
    assert huber_c is not None, f"{loss_type} needs a threshold"
    c = huber_c.float()
    squared = F.mse_loss(prediction, target, reduction="none")
    # d² / (√(d²+c²) + c) equals √(d²+c²) - c, without its cancellation for differences far below c
    excess = squared / (torch.sqrt(squared + c * c) + c)
    return 2 * c * excess if loss_type == "huber" else 2 * excess


def huber_c(schedule: str, huber_c: float, huber_scale: float, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return each image's Huber threshold c.

    constant: huber_c; exponential: huber_c^(t/1000), falling from 1 to huber_c; snr: (1-huber_c)/(1+σ)² + huber_c with
    σ = √((1-a)/a), a = alphas_cumprod[t]; each times huber_scale (sd-scripts leaves the scale out of snr).

    Args:
        schedule: one of HUBER_SCHEDULES.
        huber_c: above 0.
        huber_scale: above 0; 1 is neutral.
        timesteps: (B,) int64 in [0, T).
        alphas_cumprod: (T,) in [0, 1], on the device of timesteps.
    Returns: (B,) float32 on the device of timesteps.
    Raises: OptionError for an unknown schedule.
    Source: arXiv:2403.16728.
    """
    if schedule == "constant":
        return torch.full(timesteps.shape, huber_c * huber_scale, device=timesteps.device)
    if schedule == "exponential":
        return torch.pow(huber_c, timesteps.float() / NUM_TIMESTEPS) * huber_scale
    if schedule != "snr":
        raise OptionError(f"--huber_schedule {schedule} is unknown; choose {choices(HUBER_SCHEDULES, schedule)}")
    kept = alphas_cumprod[timesteps]
    sigma = torch.sqrt((1 - kept) / kept)  # infinite at SNR 0, where c is huber_c
    return ((1 - huber_c) / (1 + sigma) ** 2 + huber_c) * huber_scale


def choices(allowed: tuple[str, ...], given: str) -> str:
    """Return 'a, b or c.' and the nearest to given, for a message."""
    return f"{', '.join(allowed[:-1])} or {allowed[-1]}.{did_you_mean(given, allowed)}"


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Return each image's signal-to-noise ratio, a / (1 - a) with a = alphas_cumprod[t].

    Args:
        alphas_cumprod: (T,) in [0, 1), falling.
        timesteps: (B,) int64 in [0, T).
    Returns: (B,), no unit; 0 at the last step of a zero-terminal schedule, infinite only where a is 1.
    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    kept = alphas_cumprod[timesteps]
    return kept / (1 - kept)


def min_snr_weight(snr: Tensor, gamma: float, *, v_parameterization: bool) -> Tensor:
    """Return the min-SNR weight: min(s, γ)/s for noise prediction, min(s, γ)/(s + 1) for velocity.

    Args:
        snr: (B,) 0 or more.
        gamma: γ, above 0.
        v_parameterization: whether the target is the velocity.
    Returns: (B,) in (0, 1] for noise, 1 at SNR 0; in [0, γ/(γ+1)] for velocity, 0 at SNR 0.
    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    if v_parameterization:
        return torch.clamp(snr, max=gamma) / (snr + 1)
    return torch.clamp(gamma / snr, max=1)  # min(s, γ)/s, and 1 where s is 0


def scale_v_pred_weight(snr: Tensor) -> Tensor:
    """Return s/(s + 1): it makes a velocity loss weigh each timestep as a noise loss would.

    Args:
        snr: (B,) 0 or more; taken as at most MAX_SNR, as sd-scripts does.
    Returns: (B,) in [0, 1); 0 at SNR 0, where noise prediction learns nothing of the picture.
    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D.
    """
    capped = snr.clamp(max=MAX_SNR)
    return capped / (capped + 1)


def v_pred_like_weight(snr: Tensor, strength: float) -> Tensor:
    """Return 1 + strength·(s + 1)/s: it adds to a noise loss what a velocity loss would be.

    Args:
        snr: (B,) 0 or more; taken as between MIN_SNR and MAX_SNR.
        strength: above 0.
    Returns: (B,) above 1, at most 1 + 1001·strength.
    Source: Salimans & Ho 2022, arXiv:2202.00512, appendix D (the inverse of the weight above).
    """
    bounded = snr.clamp(MIN_SNR, MAX_SNR)
    return 1 + strength * (bounded + 1) / bounded


def debiased_weight(snr: Tensor, *, v_parameterization: bool) -> Tensor:
    """Return the debiased estimation weight: 1/√s for noise prediction, 1/(s + 1) for velocity.

    Args:
        snr: (B,) 0 or more; taken as between MIN_SNR and MAX_SNR (for velocity as at most MAX_SNR).
        v_parameterization: whether the target is the velocity.
    Returns: (B,) in [0.0316, 31.6] for noise, in [0.001, 1] for velocity.
    Source: Yu et al. 2023, arXiv:2310.08442.
    """
    if v_parameterization:
        return 1 / (snr.clamp(max=MAX_SNR) + 1)
    return snr.clamp(MIN_SNR, MAX_SNR).rsqrt()
