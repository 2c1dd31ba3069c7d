"""Every draw of noise and timestep, in one order that is a contract: the same generator state gives the same training.

The order of draws for one batch; a step whose option is off draws nothing:
    1. noise: normal, like the latents
    2. noise offset: its strength, uniform (noise_offset_random_strength); then normal (B, C, 1, 1)
    3. multi-resolution noise: all octave ratios, uniform; then one normal tensor an octave, finest first
    4. timesteps: uniform integers (B,), unless they are given
    5. input perturbation: its strength, uniform (ip_noise_gamma_random_strength); then normal, like the latents

For a flow:
    1. noise: normal, like the latents
    2. timesteps: one number an image (B,), normal with the scheme logit_normal, else uniform, unless they are given

Numbers that steer (strengths, ratios, timesteps) are drawn on the CPU, where reading them waits for nothing; tensors
are drawn on the device of the latents. A CPU generator that is given for latents elsewhere first draws one integer,
which seeds a generator of that device; so its state alone decides the whole batch. Without a generator, torch's own
generators of CPU and device are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from library.options.flow import FlowOptions
    from library.options.noise import NoiseOptions

Generator = torch.Generator | None


@dataclass(frozen=True)
class Drawn:
    """The random part of one batch."""

    noise: Tensor  # (B, C, h, w) float32: what the target is made of
    input_noise: Tensor  # (B, C, h, w) float32: what is added to the latents; other than noise with ip_noise_gamma
    timesteps: Tensor  # (B,) int64, on the device of the latents


def draw(
    latents: Tensor,
    options: NoiseOptions,
    num_timesteps: int,
    generator: Generator = None,
    timesteps: Tensor | None = None,
) -> Drawn:
    """Return noise and timesteps for latents, drawn in this module's order.

    Args:
        latents: (B, C, h, w) float32, as the denoiser expects them; their mean steers adaptive_noise_scale.
        options: strengths; None or 0 switches a kind of noise off.
        num_timesteps: T.
        generator: on the CPU, for any device.
        timesteps: (B,) int64 to use in place of drawn ones, as validation does.
    """
    on_device = device_generator(latents.device, generator)
    noise = normal(latents, latents.shape, on_device)
    if options.noise_offset:
        strength = options.noise_offset * uniform(generator, enabled=options.noise_offset_random_strength)
        shift = normal(latents, (*latents.shape[:2], 1, 1), on_device)
        noise = noise + offset_strength(latents, strength, options.adaptive_noise_scale) * shift
    if options.multires_noise_iterations:
        ratios = (2 + 2 * torch.rand(options.multires_noise_iterations, generator=generator)).tolist()
        noise = pyramid(noise, ratios, options.multires_noise_discount, on_device)
    if timesteps is None:
        low, high = timestep_range(options.min_timestep, options.max_timestep, num_timesteps)
        timesteps = torch.randint(low, high, latents.shape[:1], generator=generator)
    input_noise = noise
    if options.ip_noise_gamma:
        strength = options.ip_noise_gamma * uniform(generator, enabled=options.ip_noise_gamma_random_strength)
        input_noise = noise + strength * normal(latents, latents.shape, on_device)
    return Drawn(noise, input_noise, moved(timesteps, latents.device))


def draw_flow(
    latents: Tensor,
    options: FlowOptions,
    bounds: tuple[int, int],
    generator: Generator = None,
    timesteps: Tensor | None = None,
) -> Drawn:
    """Return noise and timesteps of a flow for latents, drawn in this module's order.

    Args:
        latents: (B, C, h, w) float32, as the denoiser expects them.
        options: which timesteps are drawn more often than others.
        bounds: (low, high) from `timestep_range`.
        generator: on the CPU, for any device.
        timesteps: (B,) int64 to use in place of drawn ones, as validation does.
    """
    noise = normal(latents, latents.shape, device_generator(latents.device, generator))
    if timesteps is None:
        draw_one = torch.randn if options.weighting_scheme == "logit_normal" else torch.rand
        drawn = draw_one(latents.shape[:1], generator=generator)
        timesteps = flow_timesteps(shifted(flow_density(drawn, options), options.training_shift), bounds)
    return Drawn(noise, noise, moved(timesteps, latents.device))


def flow_density(drawn: Tensor, options: FlowOptions) -> Tensor:
    """Return drawn numbers spread over 0 … 1 as the scheme wants timesteps, 1 being noise.

    logit_normal: logistic(mean + std·n); mode: 1 - u - scale·(cos²(pi·u/2) - 1 + u); others: u.

    Args:
        drawn: (B,) float32; n of N(0, 1) for logit_normal, else u of U(0, 1).
        options: the scheme and its numbers.
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """
    if options.weighting_scheme == "logit_normal":
        return torch.sigmoid(options.logit_mean + options.logit_std * drawn)
    if options.weighting_scheme == "mode":
        return 1 - drawn - options.mode_scale * (torch.cos(math.pi * drawn / 2) ** 2 - 1 + drawn)
    return drawn


def shifted(places: Tensor, shift: float) -> Tensor:
    """Return places (B,) in 0 … 1 moved towards noise: s·u / (1 + (s - 1)·u); ends stay where they are."""
    return places * shift / (1 + (shift - 1) * places)


def flow_timesteps(places: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Return the timesteps (B,) int64 at places (B,) between low (0) and high (1), which itself is left out."""
    low, high = bounds
    return torch.floor(places * (high - low) + low).long().clamp(low, high - 1)


def device_generator(device: torch.device, generator: Generator) -> Generator:
    """Return a generator of device whose state follows from generator's; None stays None."""
    if generator is None or generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def normal(like: Tensor, shape: Sequence[int], generator: Generator) -> Tensor:
    """Return float32 N(0, 1) of shape, on the device of like."""
    return torch.randn(tuple(shape), generator=generator, device=like.device)


def uniform(generator: Generator, *, enabled: bool) -> float:
    """Return one number of U(0, 1) from the CPU; 1, without a draw, where it is not enabled."""
    return torch.rand((), generator=generator).item() if enabled else 1.0


def offset_strength(latents: Tensor, strength: float, adaptive_noise_scale: float | None) -> Tensor | float:
    """Return how strong the noise offset is: strength + scale·|mean of the channel|, at least 0.

    Args:
        latents: (B, C, h, w).
        strength: noise_offset, after a random strength.
        adaptive_noise_scale: None or 0 leaves the strength as it is; may be negative.
    Returns: (B, C, 1, 1), or strength itself.
    """
    if not adaptive_noise_scale:
        return strength
    return (strength + adaptive_noise_scale * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)


def pyramid(noise: Tensor, ratios: Sequence[float], discount: float, generator: Generator = None) -> Tensor:
    """Return noise with coarser octaves added, scaled to a standard deviation of 1 over the whole batch.

    Octave i is normal noise of side / ratio_i^i, enlarged bilinearly, times discount^i; octave 0 has full resolution.
    The last octave is the first one with a side of 1.

    Args:
        noise: (B, C, h, w).
        ratios: one an octave, each in [2, 4).
        discount: in (0, 1).
        generator: of the device of noise.
    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    height, width = noise.shape[2:]
    for octave, ratio in enumerate(ratios):
        size = max(1, int(height / ratio**octave)), max(1, int(width / ratio**octave))
        coarse = normal(noise, (*noise.shape[:2], *size), generator)
        noise = noise + F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**octave
        if 1 in size:
            break
    return noise / noise.std()


def timestep_range(min_timestep: int | None, max_timestep: int | None, num_timesteps: int) -> tuple[int, int]:
    """Return (low, high) so that timesteps are drawn from low <= t < high; equal bounds fix the timestep.

    Raises: OptionError for bounds outside [0, T] or in the wrong order.
    """
    low = 0 if min_timestep is None else min_timestep
    high = num_timesteps if max_timestep is None else max_timestep
    if not 0 <= low <= high <= num_timesteps or low == num_timesteps:
        raise OptionError(
            f"--min_timestep {low} and --max_timestep {high} leave no timestep to train: "
            f"they must satisfy 0 <= min <= max <= {num_timesteps} (min below {num_timesteps})."
        )
    return (low, low + 1) if low == high else (low, high)


def moved(timesteps: Tensor, device: torch.device) -> Tensor:
    """Return timesteps on device; the host does not wait for the copy."""
    if device.type == "cuda" and timesteps.device.type == "cpu":
        timesteps = timesteps.pin_memory()
    return timesteps.to(device, non_blocking=True)
