"""The flow objective against what sd-scripts drew, noised and measured (tests/data/sd3_flow.npz)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library import losses, noise
from library.objectives import flow
from library.objectives.flow import Flow
from library.objectives.objective import Noised
from library.options.flow import FlowOptions
from library.options.loss import LossOptions as Loss
from library.options.noise import NoiseOptions as Noise

DATA = Path(__file__).parent.parent / "data" / "sd3_flow.npz"
SCHEMES = ("uniform", "sigma_sqrt", "cosmap", "logit_normal", "mode")


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA).items()}


def objective(scheme: str = "uniform", bounds: Noise | None = None, **numbers: float) -> Flow:
    return Flow.from_options(FlowOptions(weighting_scheme=scheme, **numbers), bounds or Noise())


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noised_at(*timesteps: int) -> Noised:
    """Return a batch whose tensors are empty but for its timesteps."""
    nothing = torch.zeros(len(timesteps), 1, 1, 1)
    return Noised(nothing, nothing, nothing, torch.tensor(timesteps))


def step(reference: dict[str, Tensor], scheme: str) -> Noised:
    """Return the batch of a whole step of sd-scripts, with its noise and timesteps."""
    timesteps = reference[f"step/{scheme}/timesteps"].long()
    drawn = objective(scheme).noise(reference["step/latents"], seeded(), timesteps)
    sigma = flow.sigmas_at(timesteps)[:, None, None, None]
    given = reference[f"step/{scheme}/noise"]
    return replace(drawn, noise=given, noisy=sigma * given + (1 - sigma) * drawn.latents)


def test_latents_are_noised_along_a_straight_line_as_by_sd_scripts(reference):
    latents, place = reference["noisy/latents"], "noisy/shift3_tNone-None_fp32"
    timesteps = reference[f"{place}/timesteps"].long()
    assert torch.equal(flow.sigmas_at(timesteps), reference[f"{place}/sigmas"])
    noised = objective().noise(latents, seeded(), timesteps)
    sigma = reference[f"{place}/sigmas"][:, None, None, None]
    assert torch.equal(noised.noisy, sigma * noised.noise + (1 - sigma) * latents)
    torch.testing.assert_close(sigma * reference["noisy/noise"] + (1 - sigma) * latents, reference[f"{place}/x"])


def test_validation_has_the_timesteps_that_it_gives():
    noised = objective("logit_normal").noise(torch.ones(2, 1, 2, 2), seeded(), torch.tensor([200, 800]))
    assert noised.timesteps.tolist() == [200, 800]
    torch.testing.assert_close(noised.noisy[0], 0.2 * noised.noise[0] + 0.8)


def test_timesteps_stay_within_the_bounds_of_the_options():
    bounded = objective("mode", Noise(min_timestep=200, max_timestep=210))
    timesteps = bounded.noise(torch.zeros(500, 1, 1, 1), seeded()).timesteps
    assert timesteps.dtype == torch.int64
    assert set(timesteps.tolist()) == set(range(200, 210))


def test_half_precision_changes_neither_timesteps_nor_what_is_compared(reference):
    full = step(reference, "uniform")
    half = objective().noise(reference["step/latents"].bfloat16(), seeded(), full.timesteps)
    assert {half.latents.dtype, half.noise.dtype, half.noisy.dtype} == {torch.float32}
    assert half.timesteps.tolist() == full.timesteps.tolist()
    assert objective().compare(torch.zeros(4, 16, 4, 6, dtype=torch.bfloat16), full).prediction.dtype == torch.float32


def test_timesteps_are_not_rounded_where_sd_scripts_rounds_them_to_bf16(reference):
    drawn = reference["noisy/shift1_tNone-None_fp32/u"]
    ours = noise.flow_timesteps(drawn, (0, 1000))
    theirs = reference["noisy/shift1_tNone-None_bf16/timesteps"]
    assert not torch.equal(ours.float(), theirs)
    assert torch.equal(ours.bfloat16().float(), theirs)


def test_the_velocity_becomes_the_picture_that_it_points_to(reference):
    noised = step(reference, "uniform")
    compared = objective().compare(0.3 * noised.noisy + 0.1, noised)
    torch.testing.assert_close(compared.prediction, reference["step/uniform/pred"])
    assert compared.target is noised.latents
    assert compared.weight is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_of_a_whole_step_is_that_of_sd_scripts(reference, scheme):
    noised = step(reference, scheme)
    compared = objective(scheme).compare(0.3 * noised.noisy + 0.1, noised)
    loss = losses.elementwise(compared.prediction, compared.target, "l2")
    weight = torch.ones(4, 1, 1, 1) if compared.weight is None else compared.weight
    torch.testing.assert_close(weight.flatten(), reference[f"step/{scheme}/weighting"])
    torch.testing.assert_close((loss * weight).mean((1, 2, 3)), reference[f"step/{scheme}/loss_per_sample"])


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_sd_scripts(reference, scheme):
    weights = flow.loss_weight(scheme, reference["weighting/sigmas"])
    torch.testing.assert_close(weights, reference[f"weighting/{scheme}"])


@pytest.mark.parametrize("scheme", ["none", "uniform", "logit_normal", "mode"])
def test_schemes_without_weights_have_none(scheme):
    assert objective(scheme).weight is None


def test_sigma_sqrt_gives_the_loss_of_the_velocity_itself():
    noised = objective("sigma_sqrt").noise(
        torch.randn(3, 2, 4, 4, generator=seeded(1)), seeded(), torch.tensor([50, 500, 999])
    )
    velocity = torch.randn(3, 2, 4, 4, generator=seeded(2))
    compared = objective("sigma_sqrt").compare(velocity, noised)
    loss = (compared.weight * (compared.prediction - compared.target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(
        loss, ((velocity - (noised.noise - noised.latents)) ** 2).mean((1, 2, 3)), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_picture_itself_at_timestep_0_costs_nothing_and_spoils_nothing(scheme):
    noised = objective(scheme).noise(torch.randn(2, 2, 4, 4, generator=seeded(1)), seeded(), torch.tensor([0, 0]))
    output = torch.randn(2, 2, 4, 4, generator=seeded(2)).requires_grad_()
    compared = objective(scheme).compare(output, noised)
    loss = losses.elementwise(compared.prediction, compared.target, "l2")
    loss = loss if compared.weight is None else loss * compared.weight
    loss.sum().backward()
    assert loss.eq(0).all()
    assert output.grad.eq(0).all()


def test_losses_are_not_reweighed_by_timestep():
    given = torch.rand(3)
    assert objective("cosmap").reweigh(given, noised_at(0, 500, 999)) is given


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1]),
        ("exponential", [1.0, math.sqrt(0.1), 0.1**0.999]),
        ("snr", [1.0, 0.9 * 0.25 + 0.1, 0.9 * 0.001**2 + 0.1]),  # (1 - c)·(1 - sigma)² + c
    ],
)
def test_the_huber_threshold_follows_its_schedule(schedule, expected):
    options = Loss(loss_type="huber", huber_schedule=schedule)
    threshold = objective().huber_c(options, noised_at(0, 500, 999))
    assert threshold.shape == (3, 1, 1, 1)
    torch.testing.assert_close(threshold.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_plain_distances_have_no_huber_threshold(loss_type):
    assert objective().huber_c(Loss(loss_type=loss_type), noised_at(500)) is None


def test_moving_to_a_device_takes_every_table_along():
    moved = objective("sigma_sqrt").to(torch.device("meta"))
    assert moved.alphas_cumprod.is_meta
    assert moved.weight.is_meta
    assert objective().to(torch.device("meta")).weight is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_on_a_gpu_waits_for_nothing_and_is_decided_by_a_cpu_generator(scheme):
    gpu = torch.device("cuda")
    placed = objective(scheme, training_shift=3.0).to(gpu)
    latents, loss = torch.randn(4, 2, 8, 8, device=gpu), Loss(loss_type="huber")
    torch.cuda.set_sync_debug_mode("error")
    try:
        noised, again = placed.noise(latents, seeded()), placed.noise(latents, seeded())
        compared = placed.compare(noised.noisy, noised)
        losses.elementwise(compared.prediction, compared.target, "huber", placed.huber_c(loss, noised))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(noised.noisy, again.noisy)
    assert torch.equal(noised.timesteps, again.timesteps)
