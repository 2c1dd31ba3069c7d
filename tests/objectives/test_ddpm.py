"""The DDPM objective against a full noising step and the loss chains of sd-scripts (tests/data/loss_weights.npz)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library import losses
from library.objectives import ddpm
from library.objectives.ddpm import Ddpm
from library.objectives.objective import Noised
from library.options.loss import LossOptions as Loss
from library.options.noise import NoiseOptions as Noise

DATA = Path(__file__).parent.parent / "data" / "loss_weights.npz"
EVERY_THIRD = torch.arange(0, 1000, 3)  # the timesteps at which the file holds weights


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA).items()}


def noised_at(timesteps: Tensor) -> Noised:
    """Return a batch whose tensors are empty but for its timesteps."""
    nothing = torch.zeros(len(timesteps), 1, 1, 1)
    return Noised(nothing, nothing, nothing, timesteps)


def test_the_schedule_is_stable_diffusions_to_the_last_bit(reference):
    assert torch.equal(ddpm.alphas_cumprod(), reference["sched/alphas_cumprod"])


def test_the_zero_terminal_schedule_is_that_of_the_paper(reference):
    table = ddpm.zero_terminal_snr(ddpm.alphas_cumprod())
    torch.testing.assert_close(table, reference["zsnr/alphas_cumprod"], atol=1e-6, rtol=0)
    assert table[-1] == 0
    torch.testing.assert_close(table[0], ddpm.alphas_cumprod()[0])


def test_the_zero_terminal_betas_are_those_of_sd_scripts(reference):
    betas = ddpm.betas(ddpm.zero_terminal_snr(ddpm.alphas_cumprod()))
    torch.testing.assert_close(betas[::3], reference["zsnr/betas"], atol=5e-6, rtol=0)
    assert betas[-1] == 1


def test_betas_rebuild_their_schedule():
    table = ddpm.alphas_cumprod()
    torch.testing.assert_close(torch.cumprod(1 - ddpm.betas(table), dim=0), table, rtol=1e-4, atol=0)


def test_a_noising_step_is_that_of_sd_scripts(reference):
    objective = Ddpm.from_options(Noise(), Loss(), True)
    latents, timesteps = reference["noise/latents"], reference["step/t"]
    generator = torch.Generator().manual_seed(3)
    noised = objective.noise(latents, generator, timesteps)
    again = replace(noised, noise=reference["step/noise"])  # the reference's draw in place of ours
    signal, spread = ddpm.at(objective.signal, timesteps), ddpm.at(objective.spread, timesteps)
    torch.testing.assert_close(signal * latents + spread * reference["step/noise"], reference["step/noisy"])
    torch.testing.assert_close(noised.noisy, signal * latents + spread * noised.noise)
    torch.testing.assert_close(objective.compare(latents, again).target, reference["step/velocity_target"])


def test_input_perturbation_changes_what_is_seen_and_not_the_target(reference):
    objective = Ddpm.from_options(Noise(ip_noise_gamma=0.1), Loss(), False)
    latents, timesteps = reference["noise/latents"], reference["step_ip/t"]
    signal, spread = ddpm.at(objective.signal, timesteps), ddpm.at(objective.spread, timesteps)
    perturbed = reference["step_ip/noise"] + 0.1 * reference["step_ip/ip_randn"]
    torch.testing.assert_close(signal * latents + spread * perturbed, reference["step_ip/noisy"])

    noised = objective.noise(latents, torch.Generator().manual_seed(3), timesteps)
    seen = (noised.noisy - signal * latents) / spread
    assert (seen - noised.noise).std().item() == pytest.approx(0.1, rel=0.05)
    assert objective.compare(latents, noised).target is noised.noise


def test_noise_prediction_is_compared_with_the_noise():
    objective = Ddpm.from_options(Noise(), Loss(), False)
    noised = objective.noise(torch.zeros(2, 4, 8, 8), torch.Generator().manual_seed(1))
    output = torch.ones(2, 4, 8, 8)
    compared = objective.compare(output, noised)
    assert compared.prediction is output
    assert compared.target is noised.noise
    assert compared.weight is None


def test_half_precision_latents_are_noised_in_float32():
    objective = Ddpm.from_options(Noise(), Loss(), False)
    noised = objective.noise(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
    assert {noised.latents.dtype, noised.noise.dtype, noised.noisy.dtype} == {torch.float32}


def test_the_last_step_of_a_zero_terminal_schedule_shows_noise_alone():
    objective = Ddpm.from_options(Noise(zero_terminal_snr=True), Loss(), True)
    noised = objective.noise(torch.full((1, 4, 8, 8), 9.0), timesteps=torch.tensor([999]))
    assert torch.equal(noised.noisy, noised.noise)


CHAINS = {
    "min_snr5": (Loss(min_snr_gamma=5), False),
    "min_snr5_v": (Loss(min_snr_gamma=5), True),
    "v_scale": (Loss(scale_v_pred_loss_like_noise_pred=True), True),
    "v_scale_minsnr5": (Loss(scale_v_pred_loss_like_noise_pred=True, min_snr_gamma=5), True),
    "vlike0.5_minsnr5": (Loss(v_pred_like_loss=0.5, min_snr_gamma=5), False),
    "debiased_minsnr5": (Loss(debiased_estimation_loss=True, min_snr_gamma=5), False),
    "debiased_v": (Loss(debiased_estimation_loss=True), True),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_losses_are_reweighed_as_by_sd_scripts(reference, chain):
    loss, v_parameterization = CHAINS[chain]
    objective = Ddpm.from_options(Noise(), loss, v_parameterization)
    weighted = objective.reweigh(reference["chain/loss_in"], noised_at(EVERY_THIRD))
    torch.testing.assert_close(weighted, reference[f"chain/{chain}"])


def test_without_weights_losses_stay_as_they_are():
    objective = Ddpm.from_options(Noise(), Loss(), False)
    given = torch.rand(3)
    assert objective.reweigh(given, noised_at(torch.tensor([0, 500, 999]))) is given


def test_zero_terminal_weights_follow_the_schedule_that_is_trained_on(reference):
    objective = Ddpm.from_options(Noise(zero_terminal_snr=True), Loss(min_snr_gamma=5), True)
    weighted = objective.reweigh(reference["chain/loss_in"], noised_at(EVERY_THIRD))
    ratios = reference["zsnr/all_snr_correct_order"]
    expected = reference["chain/loss_in"] * ratios.clamp(max=5) / (ratios + 1)
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(weighted, reference["chain/zsnr_min_snr5_v"], rtol=1e-2)  # the plain schedule's


@pytest.mark.parametrize(
    ("loss", "v_parameterization"),
    [
        (Loss(min_snr_gamma=5, debiased_estimation_loss=True, v_pred_like_loss=1.0), False),
        (Loss(min_snr_gamma=5, debiased_estimation_loss=True, scale_v_pred_loss_like_noise_pred=True), True),
    ],
)
def test_every_weight_of_a_zero_terminal_schedule_is_finite(loss, v_parameterization):
    objective = Ddpm.from_options(Noise(zero_terminal_snr=True), loss, v_parameterization)
    assert objective.loss_weight.isfinite().all()
    assert objective.loss_weight.ge(0).all()


def test_a_huber_threshold_has_one_value_an_image(reference):
    objective = Ddpm.from_options(Noise(), Loss(), False)
    threshold = objective.huber_c(Loss(loss_type="huber"), noised_at(reference["cond/timesteps"]))
    assert threshold.shape == (6, 1, 1, 1)
    torch.testing.assert_close(threshold.flatten(), reference["cond/huber/snr/c0.1_s1/huber_c"])


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_plain_distances_have_no_huber_threshold(loss_type):
    objective = Ddpm.from_options(Noise(), Loss(), False)
    assert objective.huber_c(Loss(loss_type=loss_type), noised_at(torch.tensor([0]))) is None


def test_a_whole_step_can_be_learned_from():
    objective = Ddpm.from_options(Noise(), Loss(loss_type="huber", min_snr_gamma=5), False)
    output = torch.zeros(2, 4, 8, 8, requires_grad=True)
    noised = objective.noise(torch.ones(2, 4, 8, 8), torch.Generator().manual_seed(1))
    compared = objective.compare(output, noised)
    huber = objective.huber_c(Loss(loss_type="huber"), noised)
    loss = losses.elementwise(compared.prediction, compared.target, "huber", huber).mean(dim=(1, 2, 3))
    objective.reweigh(loss, noised).mean().backward()
    assert (output.grad * noised.noise).lt(0).all()  # every element is pulled towards its noise


def test_moving_to_a_device_takes_every_table_along():
    moved = Ddpm.from_options(Noise(), Loss(min_snr_gamma=5), False).to(torch.device("meta"))
    tables = (moved.alphas_cumprod, moved.signal, moved.spread, moved.loss_weight)
    assert all(table.is_meta for table in tables)


def test_zero_terminal_snr_for_noise_prediction_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        Ddpm.from_options(Noise(zero_terminal_snr=True), Loss(), False)
    assert "--v_parameterization" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing():
    gpu = torch.device("cuda")
    loss = Loss(loss_type="huber", min_snr_gamma=5)
    objective = Ddpm.from_options(Noise(noise_offset=0.1, multires_noise_iterations=4), loss, True).to(gpu)
    latents = torch.randn(2, 4, 8, 8, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        noised = objective.noise(latents)
        compared = objective.compare(noised.noisy, noised)
        threshold = objective.huber_c(loss, noised)
        losses.elementwise(compared.prediction, compared.target, "huber", threshold)
        weighted = objective.reweigh(torch.ones(2, device=gpu), noised)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weighted.isfinite().all()
