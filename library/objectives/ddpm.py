"""Denoising diffusion as Stable Diffusion 1, 2 and XL are trained: predict the noise, or the velocity."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library import losses, noise
from library.objectives.objective import Compared, HuberOptions, Noised

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

log = logging.getLogger(__name__)

BETA_START, BETA_END = 0.00085, 0.012  # v1-inference.yaml: linear_start, linear_end, of √β


@dataclass(frozen=True)
class Ddpm:
    """The DDPM objective with its tables, ready for one device. Built by `from_options`, placed once by `to`."""

    options: NoiseOptions
    v_parameterization: bool
    alphas_cumprod: Tensor  # (T,) float32: share of the picture's variance kept at t
    signal: Tensor  # (T,) float32: √alphas_cumprod, factor of the latents
    spread: Tensor  # (T,) float32: √(1 - alphas_cumprod), factor of the noise
    loss_weight: Tensor | None  # (T,) float32: product of all signal-to-noise weights; None without any

    @classmethod
    def from_options(cls, options: NoiseOptions, loss: LossOptions, v_parameterization: bool) -> Ddpm:
        """Return the objective on the CPU.

        Raises: OptionError for timestep bounds that leave nothing to draw.
        """
        noise.timestep_range(options.min_timestep, options.max_timestep, losses.NUM_TIMESTEPS)
        if options.zero_terminal_snr and not v_parameterization:
            log.warning(
                "--zero_terminal_snr without --v_parameterization: at the last timestep the noise is all there is to "
                "see, so predicting it teaches nothing"
            )
        table = alphas_cumprod()
        if options.zero_terminal_snr:
            table = zero_terminal_snr(table)
        weight = loss_weight(table, loss, v_parameterization)
        return cls(options, v_parameterization, table, table.sqrt(), (1 - table).sqrt(), weight)

    def to(self, device: torch.device) -> Ddpm:
        """Return the objective with its tables on device."""
        tables: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tables)

    def noise(
        self, latents: Tensor, generator: torch.Generator | None = None, timesteps: Tensor | None = None
    ) -> Noised:
        """Return latents with noise added: √a·x + √(1-a)·noise, a = alphas_cumprod[t].

        Args:
            latents: (B, C, h, w) as the denoiser expects them, on the device of the tables.
            generator: on the CPU; see library/noise.py for the order of draws. None: torch's own.
            timesteps: (B,) int64 in [0, T) to use in place of drawn ones.
        """
        latents = latents.float()
        drawn = noise.draw(latents, self.options, len(self.alphas_cumprod), generator, timesteps)
        noisy = at(self.signal, drawn.timesteps) * latents + at(self.spread, drawn.timesteps) * drawn.input_noise
        return Noised(latents, drawn.noise, noisy, drawn.timesteps)

    def compare(self, output: Tensor, noised: Noised) -> Compared:
        """Return the output beside its target: the noise, or the velocity √a·noise - √(1-a)·x.

        Source of the velocity: Salimans & Ho 2022, arXiv:2202.00512.
        """
        if not self.v_parameterization:
            return Compared(output, noised.noise, None)
        signal, spread = at(self.signal, noised.timesteps), at(self.spread, noised.timesteps)
        return Compared(output, signal * noised.noise - spread * noised.latents, None)

    def huber_c(self, options: HuberOptions, noised: Noised) -> Tensor | None:
        """Return the Huber threshold of each image as (B, 1, 1, 1), or None for l2 and l1."""
        if options.loss_type in ("l2", "l1"):
            return None
        threshold = losses.huber_c(
            options.huber_schedule, options.huber_c, options.huber_scale, noised.timesteps, self.alphas_cumprod
        )
        return threshold[:, None, None, None]

    def reweigh(self, per_image: Tensor, noised: Noised) -> Tensor:
        """Return losses (B,) times their timestep's weight: min-SNR, v scaling, v-like and debiased, multiplied."""
        if self.loss_weight is None:
            return per_image
        return per_image * self.loss_weight[noised.timesteps]


def at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Return the entries of table (T,) at timesteps (B,), shaped (B, 1, 1, 1)."""
    return table[timesteps][:, None, None, None]


def alphas_cumprod() -> Tensor:
    """Return Stable Diffusion's noise schedule, (T,) float32 from 0.99915 down to 0.00466: √β is linear."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, losses.NUM_TIMESTEPS) ** 2
    return torch.cumprod(1 - betas, dim=0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return the schedule (T,) stretched so that nothing of the picture is left at its end; its start is kept.

    Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


def betas(alphas_cumprod: Tensor) -> Tensor:
    """Return the variance that each step adds, (T,) float32 in (0, 1]: what samplers are built from."""
    kept = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - kept


def loss_weight(alphas_cumprod: Tensor, options: LossOptions, v_parameterization: bool) -> Tensor | None:
    """Return the product of the chosen signal-to-noise weights at every timestep, (T,), or None if none is chosen.

    The ratios are those of the schedule that is trained on, a zero-terminal one included (sd-scripts keeps those of
    the plain schedule).
    """
    ratios = losses.snr(alphas_cumprod, torch.arange(len(alphas_cumprod)))
    weights = []
    if options.min_snr_gamma:
        weights.append(losses.min_snr_weight(ratios, options.min_snr_gamma, v_parameterization=v_parameterization))
    if options.scale_v_pred_loss_like_noise_pred:
        weights.append(losses.scale_v_pred_weight(ratios))
    if options.v_pred_like_loss:
        weights.append(losses.v_pred_like_weight(ratios, options.v_pred_like_loss))
    if options.debiased_estimation_loss:
        weights.append(losses.debiased_weight(ratios, v_parameterization=v_parameterization))
    return torch.stack(weights).prod(dim=0) if weights else None
