"""The samplers of --sample_sampler: diffusers' schedulers, set up for the noise schedule of SD 1.x, 2.x and XL.

A flow, as SD3 is, has one sampler: Euler's method.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import OptionError, did_you_mean

LMS_ORDER = 4
FLOW_SHIFT = 3.0  # scheduler_config.json of stable-diffusion-3-medium and of 3.5


class LmsScheduler:
    """Linear multistep sampling over Euler's sigmas: past slopes are fitted by a polynomial, which is integrated.

    diffusers' own LMSDiscreteScheduler integrates numerically and needs scipy for it; the integral has a closed form.
    """

    order = 1  # predictions a step, as diffusers means it

    def __init__(self, **settings: Any) -> None:
        """Take the settings of diffusers' EulerDiscreteScheduler."""
        from diffusers import EulerDiscreteScheduler  # here, so that errors in a dataset need not wait for diffusers

        self.euler: Any = EulerDiscreteScheduler(**settings)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps and sigmas as Euler does, and begin a new picture."""
        self.euler.set_timesteps(num_inference_steps, device=device)
        self.timesteps: Tensor = self.euler.timesteps  # (T,), falling
        self.sigmas: Tensor = self.euler.sigmas  # (T + 1,), ends in 0
        self.init_noise_sigma: Tensor = self.euler.init_noise_sigma
        self.index = 0
        self.slopes: list[Tensor] = []  # d sample / d sigma at the last sigmas, oldest first

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the sample with the variance that the denoiser expects."""
        scaled: Tensor = sample / (self.sigmas[self.index] ** 2 + 1) ** 0.5
        return scaled

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the sample at the next, smaller sigma, and the finished picture as it looks from here."""
        sigma = self.sigmas[self.index]
        if self.euler.config.prediction_type == "v_prediction":
            finished = sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
        else:
            finished = sample - sigma * model_output
        self.slopes = [*self.slopes, (sample - finished) / sigma][-LMS_ORDER:]
        first = self.index + 1 - len(self.slopes)
        weights = lms_weights(self.sigmas[first : self.index + 2].double().numpy())
        for weight, slope in zip(weights, self.slopes, strict=True):
            sample = sample + weight * slope
        self.index += 1
        return sample, finished


class FlowScheduler:
    """Euler's method along a flow, from noise to picture, with the calls that the other schedulers have."""

    init_noise_sigma = 1.0

    def __init__(self) -> None:
        """Take diffusers' scheduler, with the shift that SD3 was published with."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.euler: Any = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps, and begin a new picture."""
        self.euler.set_timesteps(num_inference_steps, device=device)
        self.timesteps: Tensor = self.euler.timesteps  # (T,) float32, falling from 1000

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the sample, which is as the denoiser expects it."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the sample at the next timestep."""
        stepped: tuple[Tensor] = self.euler.step(model_output, timestep, sample, return_dict=False)
        return stepped


def lms_weights(sigmas: np.ndarray) -> list[float]:
    """Return how much each known slope counts for the step from sigmas[-2] to sigmas[-1].

    Args:
        sigmas: (order + 1,): where the slopes were taken, oldest first, and the sigma to go to.
    Returns: (order,): the integrals of the Lagrange polynomials over that step.
    """
    nodes, start, end = sigmas[:-1], sigmas[-2], sigmas[-1]
    weights = []
    for position, node in enumerate(nodes):
        others = np.delete(nodes, position)
        integral = (
            np.polynomial.Polynomial.fromroots(others).integ() if len(others) else np.polynomial.Polynomial([0, 1])
        )
        weights.append(float((integral(end) - integral(start)) / np.prod(node - others)))
    return weights


@dataclass(frozen=True)
class SamplerKind:
    """A class of diffusers.schedulers, or our own, and what it is given beside the noise schedule."""

    scheduler: str | type
    settings: Mapping[str, Any] = field(default_factory=dict)
    knows_zero_snr: bool = False


# steps_offset, set_alpha_to_one and skip_prk_steps: as in the scheduler config that SD 1.5 was published with
SAMPLERS: Mapping[str, SamplerKind] = {
    "ddim": SamplerKind("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, True),
    "pndm": SamplerKind("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": SamplerKind(LmsScheduler, {}, True),
    "euler": SamplerKind("EulerDiscreteScheduler", {}, True),
    "euler_a": SamplerKind("EulerAncestralDiscreteScheduler", {}, True),
    "heun": SamplerKind("HeunDiscreteScheduler"),
    "dpm_2": SamplerKind("KDPM2DiscreteScheduler"),
    "dpm_2_a": SamplerKind("KDPM2AncestralDiscreteScheduler"),
    "dpmsolver": SamplerKind(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, True
    ),
    "dpmsolver++": SamplerKind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, True),
    "dpmsingle": SamplerKind("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
ALIASES: Mapping[str, str] = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


def check_sampler(name: str, place: str = "--sample_sampler") -> str:
    """Return the sampler's name in the table. Raises: OptionError with the choices; place says where it stands."""
    known = ALIASES.get(name, name)
    if known not in SAMPLERS:
        choices = [*SAMPLERS, *ALIASES]
        raise OptionError(
            f"{place}: unknown sampler {name}.{did_you_mean(name, choices)} Samplers: {', '.join(choices)}."
        )
    return known


def build_scheduler(name: str, prediction_type: str = "epsilon", zero_terminal_snr: bool = False) -> Any:
    """Return a fresh diffusers scheduler for one picture.

    Args:
        name: a name of SAMPLERS or ALIASES; does not matter for a flow.
        prediction_type: "epsilon", "v_prediction" or "flow".
        zero_terminal_snr: the model was trained on a schedule that ends in pure noise; sampling then starts at its very
            last timestep. Samplers that cannot do so (knows_zero_snr) use the ordinary schedule.
    """
    if prediction_type == "flow":
        return FlowScheduler()
    from diffusers import schedulers

    kind = SAMPLERS[check_sampler(name)]
    build = getattr(schedulers, kind.scheduler) if isinstance(kind.scheduler, str) else kind.scheduler
    settings = dict(kind.settings)
    if zero_terminal_snr and kind.knows_zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with warnings.catch_warnings():
        # diffusers announces that "dpmsolver" goes in its 1.0; our requirements stay below
        warnings.simplefilter("ignore", FutureWarning)
        return build(
            num_train_timesteps=1000,
            beta_start=0.00085,  # v1-inference.yaml, linear_start and linear_end
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            **settings,
        )


def takes_generator(scheduler: Any) -> bool:
    """Return whether the scheduler draws noise of its own between steps."""
    return "generator" in inspect.signature(scheduler.step).parameters
