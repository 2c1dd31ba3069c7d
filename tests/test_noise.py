"""The draws of a batch: their order, formulas (tests/data, from sd-scripts) and statistics."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library import noise
from library.errors import OptionError
from library.options.flow import FlowOptions
from library.options.noise import NoiseOptions as Options

DATA = Path(__file__).parent / "data" / "loss_weights.npz"
FLOW_DATA = Path(__file__).parent / "data" / "sd3_flow.npz"
SHAPE = (2, 4, 16, 12)


EVERYTHING = Options(
    noise_offset=0.1,
    noise_offset_random_strength=True,
    adaptive_noise_scale=0.05,
    multires_noise_iterations=3,
    ip_noise_gamma=0.2,
    ip_noise_gamma_random_strength=True,
)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents() -> Tensor:
    return torch.randn(SHAPE, generator=seeded(1))


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA).items()}


def test_the_order_of_all_draws_is_the_documented_one():
    drawn = noise.draw(latents(), EVERYTHING, 1000, seeded())

    same = seeded()
    plain = torch.randn(SHAPE, generator=same)
    strength = 0.1 * torch.rand((), generator=same)
    shift = torch.randn(2, 4, 1, 1, generator=same)
    expected = plain + (strength + 0.05 * latents().mean((2, 3), keepdim=True).abs()) * shift
    ratios = (2 + 2 * torch.rand(3, generator=same)).tolist()
    for octave, ratio in enumerate(ratios):
        size = max(1, int(16 / ratio**octave)), max(1, int(12 / ratio**octave))
        coarse = torch.randn(2, 4, *size, generator=same)
        expected = expected + 0.3**octave * F.interpolate(coarse, (16, 12), mode="bilinear")
        if min(size) == 1:
            break
    expected = expected / expected.std()
    timesteps = torch.randint(0, 1000, (2,), generator=same)
    gamma = 0.2 * torch.rand((), generator=same)
    perturbed = expected + gamma * torch.randn(SHAPE, generator=same)

    torch.testing.assert_close(drawn.noise, expected)
    assert drawn.timesteps.tolist() == timesteps.tolist()
    torch.testing.assert_close(drawn.input_noise, perturbed)


def test_options_that_are_off_draw_nothing():
    drawn = noise.draw(latents(), Options(noise_offset=0.0, ip_noise_gamma=0.0), 1000, seeded())
    same = seeded()
    assert torch.equal(drawn.noise, torch.randn(SHAPE, generator=same))
    assert torch.equal(drawn.timesteps, torch.randint(0, 1000, (2,), generator=same))
    assert drawn.input_noise is drawn.noise


def test_a_random_strength_that_is_off_draws_nothing():
    drawn = noise.draw(latents(), Options(noise_offset=0.1), 1000, seeded())
    same = seeded()
    expected = torch.randn(SHAPE, generator=same) + 0.1 * torch.randn(2, 4, 1, 1, generator=same)
    torch.testing.assert_close(drawn.noise, expected)


def test_given_timesteps_are_used_and_none_are_drawn():
    given = torch.tensor([3, 999])
    drawn = noise.draw(latents(), Options(ip_noise_gamma=0.1), 1000, seeded(), given)
    same = seeded()
    plain = torch.randn(SHAPE, generator=same)
    assert drawn.timesteps.tolist() == [3, 999]
    torch.testing.assert_close(drawn.input_noise, plain + 0.1 * torch.randn(SHAPE, generator=same))


def test_without_a_generator_torchs_own_decides():
    torch.manual_seed(5)
    first = noise.draw(latents(), EVERYTHING, 1000)
    torch.manual_seed(5)
    second = noise.draw(latents(), EVERYTHING, 1000)
    assert torch.equal(first.input_noise, second.input_noise)
    assert torch.equal(first.timesteps, second.timesteps)


def test_input_perturbation_leaves_the_target_noise_alone():
    plain = noise.draw(latents(), Options(), 1000, seeded())
    perturbed = noise.draw(latents(), Options(ip_noise_gamma=0.1), 1000, seeded())
    assert torch.equal(plain.noise, perturbed.noise)
    assert (perturbed.input_noise - perturbed.noise).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("octaves_and_discount", ["it6_d0.3", "it10_d0.8", "it1_d0.3"])
def test_pyramid_noise_is_that_of_sd_scripts(reference, octaves_and_discount):
    octaves, discount = octaves_and_discount[2:].split("_d")
    generator = seeded(12)
    start = torch.randn(2, 4, 32, 24, generator=generator)
    draws = random.Random(13)
    ratios = [draws.random() * 2 + 2 for _ in range(int(octaves))]
    torch.testing.assert_close(start, reference["pyramid/it6_d0.3/in"])
    torch.testing.assert_close(
        noise.pyramid(start, ratios, float(discount), generator), reference[f"pyramid/{octaves_and_discount}/out"]
    )


def test_pyramid_noise_stops_at_the_first_octave_with_a_side_of_1():
    generator = seeded()
    noise.pyramid(torch.zeros(1, 1, 8, 64), [4.0] * 8, 0.5, generator)
    same = seeded()
    for size in ((8, 64), (2, 16), (1, 4)):  # 8/4² is 0.5, so octave 2 has the side 1 and is the last
        torch.randn(1, 1, *size, generator=same)
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize(
    ("name", "offset", "adaptive"),
    [("off0.05", 0.05, None), ("off0.1_ad0.05", 0.1, 0.05), ("off0.0357", 0.0357, None), ("off0.05_ad-1", 0.05, -1.0)],
)
def test_noise_offset_is_that_of_sd_scripts(reference, name, offset, adaptive):
    strength = noise.offset_strength(reference["noise/latents"][:1], offset, adaptive)
    shifted = reference["noise/off0.05/in"] + strength * reference["noise/off0.05/offset_randn"]
    torch.testing.assert_close(shifted, reference[f"noise/{name}/out"])


def test_pyramid_noise_has_the_statistics_of_sd_scripts():
    options = Options(multires_noise_iterations=10, multires_noise_discount=0.8)
    generator = seeded()
    images = [noise.draw(torch.zeros(1, 4, 64, 64), options, 1000, generator).noise for _ in range(100)]
    drawn = torch.cat(images)
    assert drawn.std().item() == pytest.approx(1.01, abs=0.02)
    assert drawn.mean(dim=(2, 3)).std().item() == pytest.approx(0.285, abs=0.04)  # 400 images of sd-scripts: 0.2852
    assert (drawn[..., 1:] * drawn[..., :-1]).mean().item() == pytest.approx(0.267, abs=0.04)  # there 0.2673


def test_a_random_offset_strength_is_one_number_a_batch():
    options = Options(noise_offset=10.0, noise_offset_random_strength=True)
    means = torch.stack(
        [
            noise.draw(torch.zeros(2, 4, 64, 64), options, 1000, seeded(seed)).noise.mean(dim=(2, 3))
            for seed in range(40)
        ]
    )
    spreads = means.std(dim=(1, 2)) / 10  # of one batch: its strength
    assert 0.4 < spreads.mean().item() < 0.6
    assert spreads.std().item() > 0.2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (None, None, (0, 1000)),
        (0, 1000, (0, 1000)),
        (200, 800, (200, 800)),
        (None, 500, (0, 500)),
        (0, 1, (0, 1)),
        (500, 500, (500, 501)),
        (0, 0, (0, 1)),
    ],
)
def test_timestep_bounds_are_lower_inclusive_and_upper_exclusive(low, high, expected):
    assert noise.timestep_range(low, high, 1000) == expected


@pytest.mark.parametrize(("low", "high"), [(-1, None), (None, 1001), (800, 200), (1000, 1000)])
def test_timestep_bounds_that_leave_nothing_are_refused(low, high):
    with pytest.raises(OptionError, match="--min_timestep"):
        noise.timestep_range(low, high, 1000)


def test_drawn_timesteps_fill_their_range():
    generator = seeded()
    options = Options(min_timestep=200, max_timestep=210)
    drawn = noise.draw(torch.zeros(500, 1, 1, 1), options, 1000, generator).timesteps
    assert set(drawn.tolist()) == set(range(200, 210))


# ---- flow ----------------------------------------------------------------------------------------------------------
DENSITIES = {
    "logit_normal_m0_s1_mode1.29": FlowOptions(weighting_scheme="logit_normal"),
    "logit_normal_m0.5_s0.7_mode1.29": FlowOptions(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=0.7),
    "logit_normal_m-0.5_s1.3_mode1.29": FlowOptions(weighting_scheme="logit_normal", logit_mean=-0.5, logit_std=1.3),
    "mode_m0_s1_mode1.29": FlowOptions(weighting_scheme="mode"),
    "mode_m0_s1_mode0.8": FlowOptions(weighting_scheme="mode", mode_scale=0.8),
    **{
        f"{scheme}_m0_s1_mode1.29": FlowOptions(weighting_scheme=scheme)
        for scheme in ("sigma_sqrt", "cosmap", "none", "uniform")
    },
}


@pytest.fixture(scope="module")
def flow_reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(FLOW_DATA).items()}


@pytest.mark.parametrize("scheme", ["uniform", "mode", "logit_normal"])
def test_a_flow_draws_noise_and_then_one_number_an_image(scheme):
    options = FlowOptions(weighting_scheme=scheme, training_shift=3.0)
    drawn = noise.draw_flow(latents(), options, (0, 1000), seeded())
    same = seeded()
    assert torch.equal(drawn.noise, torch.randn(SHAPE, generator=same))
    number = torch.randn(2, generator=same) if scheme == "logit_normal" else torch.rand(2, generator=same)
    place = noise.flow_density(number, options)
    assert drawn.timesteps.tolist() == (1000 * 3 * place / (1 + 2 * place)).floor().long().tolist()
    assert drawn.input_noise is drawn.noise


def test_a_flow_with_given_timesteps_draws_none():
    generator = seeded()
    drawn = noise.draw_flow(latents(), FlowOptions(), (0, 1000), generator, torch.tensor([3, 999]))
    same = seeded()
    torch.randn(SHAPE, generator=same)
    assert drawn.timesteps.tolist() == [3, 999]
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize("density", DENSITIES)
def test_a_flow_spreads_its_numbers_as_sd_scripts_does(flow_reference, density):
    raw = flow_reference[f"density/{density}/raw"]
    options = DENSITIES[density]
    if options.weighting_scheme == "logit_normal":  # there the generator's draw has mean and deviation already
        raw = (raw - options.logit_mean) / options.logit_std
    torch.testing.assert_close(noise.flow_density(raw, options), flow_reference[f"density/{density}/u"])


@pytest.mark.parametrize("density", DENSITIES)
def test_the_timesteps_of_a_flow_are_spread_as_those_of_sd_scripts(flow_reference, density):
    drawn = noise.draw_flow(torch.zeros(50_000, 1, 1, 1), DENSITIES[density], (0, 1000), seeded()).timesteps
    levels = flow_reference["quantile_levels"]
    spread = torch.quantile(drawn.float(), levels) / 1000
    torch.testing.assert_close(spread, flow_reference[f"density/{density}/quantiles"], atol=0.01, rtol=0)


@pytest.mark.parametrize("shift", ["1", "1.5", "3", "0.5"])
@pytest.mark.parametrize("bounds", ["None-None", "200-800", "0-1000"])
def test_shifted_timesteps_are_those_of_sd_scripts(flow_reference, shift, bounds):
    low, high = (None, None) if bounds == "None-None" else map(int, bounds.split("-"))
    place = f"noisy/shift{shift}_t{bounds}_fp32"
    moved = noise.shifted(flow_reference[f"{place}/u"], float(shift))
    timesteps = noise.flow_timesteps(moved, noise.timestep_range(low, high, 1000))
    assert torch.equal(timesteps.float(), flow_reference[f"{place}/timesteps"])


@pytest.mark.parametrize("mode_scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_keeps_every_number_between_0_and_1(mode_scale):
    options = FlowOptions(weighting_scheme="mode", mode_scale=mode_scale)
    places = noise.flow_density(torch.linspace(0, 1, 1001), options)
    assert places.min() >= -1e-6
    assert places.max() <= 1 + 1e-6
    assert places.diff().max() <= 1e-6  # and never turns back


def test_a_place_at_the_very_end_has_the_last_timestep():
    ends = torch.tensor([-1e-7, 0.0, 1.0, 1 + 1e-7])
    assert noise.flow_timesteps(ends, (0, 1000)).tolist() == [0, 0, 999, 999]
    assert noise.flow_timesteps(ends, (500, 501)).tolist() == [500] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cpu_generator_decides_the_draws_on_a_gpu_without_a_synchronisation():
    on_gpu = latents().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = noise.draw(on_gpu, EVERYTHING, 1000, seeded())
        second = noise.draw(on_gpu, EVERYTHING, 1000, seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.noise.is_cuda
    assert first.timesteps.is_cuda
    assert torch.equal(first.input_noise, second.input_noise)
    assert torch.equal(first.timesteps, second.timesteps)
