"""The samplers: each of them must find a picture that the denoiser knows exactly."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from library.errors import OptionError
from library.options.declare import declared
from library.options.sampling import SamplingOptions
from library.training.schedulers import (
    ALIASES,
    SAMPLERS,
    build_scheduler,
    check_sampler,
    lms_weights,
    takes_generator,
)

pytestmark = [  # diffusers' sigma-based schedulers with numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
PICTURE = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)


def alphas_cumprod(zero_terminal_snr: bool) -> Tensor:
    """Return SD's schedule, worked out here: (1000,), falling."""
    products = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    if zero_terminal_snr:
        roots = products.sqrt()
        products = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        products[-1] = 2**-24  # diffusers keeps the sigma-based samplers finite with this
    return products


def perfect_denoiser(prediction_type: str, zero_terminal_snr: bool) -> Callable[[Tensor, float], Tensor]:
    """Return the exact prediction for data that is PICTURE and nothing else."""
    products = alphas_cumprod(zero_terminal_snr)
    log_sigmas = 0.5 * torch.log((1 - products) / products)

    def predict(noisy: Tensor, timestep: float) -> Tensor:
        low = int(timestep)
        high = min(low + 1, 999)
        sigma = math.exp(log_sigmas[low] + (log_sigmas[high] - log_sigmas[low]) * (timestep - low))
        signal = 1 / math.sqrt(1 + sigma**2)
        spread = sigma * signal
        noise = (noisy - signal * PICTURE) / spread
        return noise if prediction_type == "epsilon" else signal * noise - spread * PICTURE

    return predict


def sample(name: str, prediction_type: str, zero_terminal_snr: bool = False) -> Tensor:
    scheduler = build_scheduler(name, prediction_type, zero_terminal_snr)
    scheduler.set_timesteps(20)
    predict = perfect_denoiser(prediction_type, zero_terminal_snr and SAMPLERS[name].knows_zero_snr)
    generator = torch.Generator().manual_seed(0)
    own_noise = {"generator": generator} if takes_generator(scheduler) else {}
    noisy = torch.randn(PICTURE.shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(noisy, timestep), float(timestep))
        noisy = scheduler.step(output, timestep, noisy, return_dict=False, **own_noise)[0]
    return noisy


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_finds_the_picture(name: str, prediction_type: str) -> None:
    # 0.08: the noise of SD's smallest sigma, 0.03, at which ddim, pndm and dpmsolver end
    assert (sample(name, prediction_type) - PICTURE).abs().max() < 0.08


@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if kind.knows_zero_snr])
def test_samplers_that_know_zero_snr_start_at_the_last_timestep(name: str) -> None:
    scheduler = build_scheduler(name, "v_prediction", zero_terminal_snr=True)
    scheduler.set_timesteps(20)
    assert float(scheduler.timesteps[0]) == 999
    assert (sample(name, "v_prediction", zero_terminal_snr=True) - PICTURE).abs().max() < 0.08


def test_the_weights_of_one_slope_are_eulers() -> None:
    assert lms_weights(np.array([5.0, 3.0])) == [-2.0]


def test_the_weights_of_equal_steps_are_adams_and_bashforths() -> None:
    weights = lms_weights(np.array([4.0, 3.0, 2.0, 1.0, 0.0]))
    assert np.allclose(weights, [9 / 24, -37 / 24, 59 / 24, -55 / 24])


def test_the_weights_integrate_a_cubic_exactly() -> None:
    sigmas = np.array([9.0, 5.5, 3.0, 2.2, 1.0])

    def slope(sigma: np.ndarray) -> np.ndarray:
        return 2 * sigma**3 - sigma + 4

    def integral(sigma: float) -> float:
        return sigma**4 / 2 - sigma**2 / 2 + 4 * sigma

    moved = float(np.dot(lms_weights(sigmas), slope(sigmas[:-1])))
    assert moved == pytest.approx(integral(1.0) - integral(2.2))


def test_the_option_offers_what_the_table_has() -> None:
    choices = next(option.choices for option in declared(SamplingOptions) if option.name == "sample_sampler")
    assert set(choices) == {*SAMPLERS, *ALIASES}


@pytest.mark.parametrize(("alias", "name"), [("k_euler_a", "euler_a"), ("k_lms", "lms"), ("ddim", "ddim")])
def test_aliases_are_known(alias: str, name: str) -> None:
    assert check_sampler(alias) == name


def test_an_unknown_sampler_is_refused_with_the_choices() -> None:
    with pytest.raises(OptionError, match=r"--sample_sampler: unknown sampler dimm\. Did you mean ddim\? Samplers: "):
        check_sampler("dimm")


# ---- flow ----------------------------------------------------------------------------------------------------------
def euler_places(steps: int) -> list[float]:
    """Return the shares of noise from 1 to 0 that SD3's own sampler goes through, worked out here."""

    def shifted(sigma: float) -> float:
        return 3 * sigma / (1 + 2 * sigma)

    last = shifted(1 / 1000)
    return [shifted(1 + (last - 1) * number / (steps - 1)) for number in range(steps)] + [0.0]


def test_a_flow_goes_through_the_timesteps_of_sd3s_own_sampler() -> None:
    scheduler = build_scheduler("ddim", "flow")
    scheduler.set_timesteps(7)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(euler_places(7)[:-1]) * 1000)


def test_a_flow_is_followed_by_eulers_method() -> None:
    def velocity(noisy: Tensor, sigma: float) -> Tensor:
        return noisy * sigma - 0.5 * noisy**2

    scheduler = build_scheduler("euler_a", "flow")
    scheduler.set_timesteps(5)
    noisy = expected = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = velocity(scheduler.scale_model_input(noisy, timestep), float(timestep) / 1000)
        noisy = scheduler.step(output, timestep, noisy, return_dict=False)[0]
    places = euler_places(5)
    for here, there in pairwise(places):
        expected = expected + (there - here) * velocity(expected, here)
    torch.testing.assert_close(noisy, expected, rtol=1e-4, atol=1e-5)


def test_a_flow_whose_velocity_is_known_ends_in_the_picture() -> None:
    scheduler = build_scheduler("ddim", "flow")
    scheduler.set_timesteps(4)
    start = noisy = torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        noisy = scheduler.step(start - PICTURE, timestep, noisy)[0]
    torch.testing.assert_close(noisy, PICTURE, rtol=0, atol=1e-5)
