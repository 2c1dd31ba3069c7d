"""What a training objective provides: how clean latents are noised, and what the denoiser's output is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class HuberOptions(Protocol):
    """The options that decide the Huber threshold."""

    @property
    def loss_type(self) -> str: ...  # noqa: D102
    @property
    def huber_schedule(self) -> str: ...  # noqa: D102
    @property
    def huber_c(self) -> float: ...  # noqa: D102
    @property
    def huber_scale(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Noised:
    """A batch of latents on its way to the denoiser."""

    latents: Tensor  # (B, C, h, w) float32: clean, as the denoiser expects them
    noise: Tensor  # (B, C, h, w) float32: the noise that belongs to the target, without input perturbation
    noisy: Tensor  # (B, C, h, w) float32: what the denoiser sees
    timesteps: Tensor  # (B,) int64, on the device of the latents


@dataclass(frozen=True)
class Compared:
    """The two sides of the loss, and what each image's elements weigh before the mask."""

    prediction: Tensor  # (B, C, h, w)
    target: Tensor  # (B, C, h, w)
    weight: Tensor | None  # (B, 1, 1, 1), or None where every image weighs 1


class Objective(Protocol):
    """Noise, compare, reweigh: the three moments of a training step that depend on the kind of diffusion."""

    def to(self, device: torch.device) -> Objective:
        """Return the objective with its tables on device."""
        ...

    def noise(
        self, latents: Tensor, generator: torch.Generator | None = None, timesteps: Tensor | None = None
    ) -> Noised:
        """Return latents (B, C, h, w) with noise added, at given timesteps (B,) or drawn ones."""
        ...

    def compare(self, output: Tensor, noised: Noised) -> Compared:
        """Return what the denoiser's output (B, C, h, w) is measured against."""
        ...

    def huber_c(self, options: HuberOptions, noised: Noised) -> Tensor | None:
        """Return the Huber threshold of each image as (B, 1, 1, 1), or None for a loss type without one."""
        ...

    def reweigh(self, per_image: Tensor, noised: Noised) -> Tensor:
        """Return losses (B,) weighted by timestep: min-SNR and its relatives."""
        ...
