"""Options of the sample images during training."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option, settle


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """When sample images are made, and from which prompts."""

    sample_prompts: str | None = option(None, "File of prompts: .txt, .toml or .json.", is_path=True)
    sample_every_n_steps: int | None = option(None, "Make sample images every N steps. 0 or less is off.")
    sample_every_n_epochs: int | None = option(
        None, "Make sample images every N epochs; decides instead of --sample_every_n_steps. 0 or less is off."
    )
    sample_at_first: bool = option(False, "Make sample images before the first step too.")
    sample_sampler: str = option(
        "ddim",
        "Sampler of prompts that name none.",
        choices=(
            "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
            "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check the values; an interval of 0 or less is none."""
        check_values(self)
        for name in ("sample_every_n_steps", "sample_every_n_epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                settle(self, name, None)
        asked = [
            name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first") if getattr(self, name)
        ]
        if asked and self.sample_prompts is None:
            raise OptionError(f"--{asked[0]} has no prompts to make images from. Add --sample_prompts=FILE.")
