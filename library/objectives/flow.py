"""Rectified flow, as Stable Diffusion 3 is trained: a straight way from picture to noise, whose velocity is learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import losses, noise
from library.objectives.objective import Compared, HuberOptions, Noised

if TYPE_CHECKING:
    from library.options.flow import FlowOptions
    from library.options.noise import NoiseOptions


@dataclass(frozen=True)
class Flow:
    """The flow objective with its tables, ready for one device. Built by `from_options`, placed once by `to`.

    The loss is taken of the picture that a velocity points to, as in sd-scripts: with weight 1 it is sigma² times the
    loss of the velocity itself, which the scheme sigma_sqrt gives back.
    """

    flow: FlowOptions
    bounds: tuple[int, int]  # timesteps are drawn from low <= t < high
    alphas_cumprod: Tensor  # (T,) float32: the picture's share of the variance
    weight: Tensor | None  # (T,) float32: what each timestep's loss counts; None where all count 1

    @classmethod
    def from_options(cls, flow: FlowOptions, options: NoiseOptions) -> Flow:
        """Return the objective on the CPU.

        Args:
            flow: scheme and shift.
            options: for the bounds of the timesteps; the rest of it does not apply to a flow.
        """
        bounds = noise.timestep_range(options.min_timestep, options.max_timestep, losses.NUM_TIMESTEPS)
        sigmas = sigmas_at(torch.arange(losses.NUM_TIMESTEPS))
        return cls(flow, bounds, share_of_picture(sigmas), loss_weight(flow.weighting_scheme, sigmas))

    def to(self, device: torch.device) -> Flow:
        """Return the objective with its tables on device."""
        weight = None if self.weight is None else self.weight.to(device)
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device), weight=weight)

    def noise(
        self, latents: Tensor, generator: torch.Generator | None = None, timesteps: Tensor | None = None
    ) -> Noised:
        """Return latents with noise: sigma·noise + (1 - sigma)·x, sigma = t / 1000.

        Args:
            latents: (B, C, h, w) as the denoiser expects them.
            generator: on the CPU; see library/noise.py for the order of draws. None: torch's own.
            timesteps: (B,) int64 in [0, T) to use in place of drawn ones.
        """
        latents = latents.float()
        drawn = noise.draw_flow(latents, self.flow, self.bounds, generator, timesteps)
        sigma = _per_image(sigmas_at(drawn.timesteps))
        noisy = sigma * drawn.noise + (1 - sigma) * latents
        return Noised(latents, drawn.noise, noisy, drawn.timesteps)

    def compare(self, output: Tensor, noised: Noised) -> Compared:
        """Return the picture that the velocity points to, x_t - sigma·v, beside the one it should: the latents."""
        prediction = noised.noisy - _per_image(sigmas_at(noised.timesteps)) * output.float()
        weight = None if self.weight is None else _per_image(self.weight[noised.timesteps])
        return Compared(prediction, noised.latents, weight)

    def huber_c(self, options: HuberOptions, noised: Noised) -> Tensor | None:
        """Return the Huber threshold of each image as (B, 1, 1, 1), or None for l2 and l1.

        The schedule snr takes a flow's own ratio of noise to picture, sigma / (1 - sigma).
        """
        if options.loss_type in ("l2", "l1"):
            return None
        threshold = losses.huber_c(
            options.huber_schedule, options.huber_c, options.huber_scale, noised.timesteps, self.alphas_cumprod
        )
        return _per_image(threshold)

    def reweigh(self, per_image: Tensor, noised: Noised) -> Tensor:
        """Return the losses (B,) as they are: a flow's weights meet the elements, in `compare`."""
        return per_image


def sigmas_at(timesteps: Tensor) -> Tensor:
    """Return the share of noise at timesteps (B,) in [0, T]: (B,) float32 in [0, 1], never in a coarser format."""
    return timesteps.float() / losses.NUM_TIMESTEPS


def share_of_picture(sigmas: Tensor) -> Tensor:
    """Return the picture's share of the variance, (1 - sigma)² / ((1 - sigma)² + sigma²), from 1 down to 0.

    A flow's place among noise schedules: its signal-to-noise ratio is this, a / (1 - a).
    """
    return (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)


def loss_weight(scheme: str, sigmas: Tensor) -> Tensor | None:
    """Return what the loss at each share of noise counts, (T,), or None if all count 1.

    sigma_sqrt: 1 / sigma²; cosmap: 2 / (pi·(1 - 2·sigma + 2·sigma²)). At sigma = 0, where nothing can be learnt as the
    picture is given, sigma_sqrt is that of the first timestep after it; in sd-scripts 0 times infinity spoils the step.

    Args:
        scheme: of --weighting_scheme.
        sigmas: (T,) in [0, 1].
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.
    """
    if scheme == "sigma_sqrt":
        return sigmas.clamp(min=1 / losses.NUM_TIMESTEPS) ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return None


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
