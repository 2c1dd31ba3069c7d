"""Options of noise and timesteps."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """How noise and timesteps are drawn."""

    noise_offset: float | None = option(
        None, "Strength of a constant added to the noise of each image and channel. 0 is off.", bounds=Bounds(min=0)
    )
    noise_offset_random_strength: bool = option(False, "Multiply --noise_offset by a random number in 0..1 each step.")
    adaptive_noise_scale: float | None = option(
        None, "Add this times each latent channel's mean to --noise_offset; may be negative. 0 is off."
    )
    multires_noise_iterations: int | None = option(
        None, "Number of coarser layers of noise that are added. 0 is off.", bounds=Bounds(min=0)
    )
    multires_noise_discount: float = option(
        0.3, "Strength of each coarser layer relative to the one before.", bounds=Bounds(min=0)
    )
    ip_noise_gamma: float | None = option(
        None,
        "Strength of extra noise on the model's input that the target does not contain. 0 is off.",
        bounds=Bounds(min=0),
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "Multiply --ip_noise_gamma by a random number in 0..1 each step."
    )
    zero_terminal_snr: bool = option(False, "Rescale the noise schedule so that its last step is noise alone.")
    min_timestep: int | None = option(None, "Lowest timestep that is drawn. Unset: 0.", bounds=Bounds(min=0, max=999))
    max_timestep: int | None = option(
        None, "Timesteps are drawn below this one. Unset: 1000.", bounds=Bounds(min=0, max=1000)
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if low > high:
            raise OptionError(f"--min_timestep {low} is above --max_timestep {high}. Swap them.")
