"""Distances and weights, against numbers from sd-scripts (tests/data/loss_weights.npz) and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library import losses
from library.errors import OptionError

DATA = Path(__file__).parent / "data" / "loss_weights.npz"
EVERY_THIRD = torch.arange(0, 1000, 3)  # the timesteps at which the file holds weights


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA).items()}


@pytest.fixture(scope="module")
def ratios(reference) -> Tensor:
    return losses.snr(reference["sched/alphas_cumprod"], EVERY_THIRD)


def huber_cases() -> list[tuple[str, str, float, float]]:
    return [
        (loss_type, schedule, c, scale)
        for loss_type in ("huber", "smooth_l1")
        for schedule in losses.HUBER_SCHEDULES
        for c, scale in ((0.1, 1.0), (0.3, 1.0), (0.1, 0.5))
        if not (schedule == "snr" and scale != 1)  # sd-scripts ignores the scale there
    ]


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_plain_distances_are_those_of_sd_scripts(reference, loss_type):
    loss = losses.elementwise(reference["cond/pred"], reference["cond/target"], loss_type)
    torch.testing.assert_close(loss.mean(dim=(1, 2, 3)), reference[f"cond/{loss_type}/loss"])
    torch.testing.assert_close(loss[0, 0], reference[f"cond/{loss_type}/loss_sample0_ch0"])


@pytest.mark.parametrize(("loss_type", "schedule", "c", "scale"), huber_cases())
def test_huber_distances_are_those_of_sd_scripts(reference, loss_type, schedule, c, scale):
    key = f"cond/{loss_type}/{schedule}/c{c:g}_s{scale:g}"
    threshold = losses.huber_c(schedule, c, scale, reference["cond/timesteps"], reference["sched/alphas_cumprod"])
    loss = losses.elementwise(
        reference["cond/pred"], reference["cond/target"], loss_type, threshold[:, None, None, None]
    )
    torch.testing.assert_close(threshold, reference[f"{key}/huber_c"])
    torch.testing.assert_close(loss.mean(dim=(1, 2, 3)), reference[f"{key}/loss"])
    if f"{key}/loss_sample0_ch0" in reference:
        torch.testing.assert_close(loss[0, 0], reference[f"{key}/loss_sample0_ch0"])


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_scale_multiplies_the_snr_schedule_too(reference, loss_type):
    at = reference["cond/timesteps"], reference["sched/alphas_cumprod"]
    unscaled = reference[f"cond/{loss_type}/snr/c0.1_s0.5/huber_c"]  # without the scale in sd-scripts
    torch.testing.assert_close(losses.huber_c("snr", 0.1, 0.5, *at), unscaled * 0.5)


def test_a_huber_threshold_at_snr_0_is_huber_c():
    threshold = losses.huber_c("snr", 0.1, 1.0, torch.tensor([0]), torch.tensor([0.0]))
    torch.testing.assert_close(threshold, torch.tensor([0.1]))


def test_a_small_difference_is_not_lost_beside_a_large_threshold():
    difference = torch.full((1, 1, 1, 1), 1e-4)
    loss = losses.elementwise(difference, torch.zeros(1, 1, 1, 1), "huber", torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(loss, torch.full((1, 1, 1, 1), 1e-8))  # 2c(√(d²+c²) - c) ≈ d² for d much below c


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_equal_prediction_and_target_give_no_loss_and_a_finite_gradient(loss_type):
    prediction = torch.ones(1, 1, 2, 2, requires_grad=True)
    loss = losses.elementwise(prediction, torch.ones(1, 1, 2, 2), loss_type, torch.full((1, 1, 1, 1), 0.1))
    loss.sum().backward()
    assert loss.eq(0).all()
    assert prediction.grad.eq(0).all()


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_half_precision_is_compared_in_float32(loss_type):
    prediction, target = torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1).half()
    loss = losses.elementwise(prediction, target, loss_type, torch.ones(1, 1, 1, 1).half())
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()  # 300² is beyond float16


def test_an_unknown_loss_type_names_the_nearest():
    with pytest.raises(OptionError, match=r"--loss_type hubber .*Did you mean huber\?"):
        losses.elementwise(torch.zeros(1), torch.zeros(1), "hubber")


def test_an_unknown_huber_schedule_names_the_nearest():
    with pytest.raises(OptionError, match=r"--huber_schedule exponent .*Did you mean exponential\?"):
        losses.huber_c("exponent", 0.1, 1.0, torch.tensor([0]), torch.ones(1))


def test_the_signal_to_noise_ratio_is_that_of_sd_scripts(reference, ratios):
    torch.testing.assert_close(ratios, reference["sched/all_snr"][EVERY_THIRD])


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("gamma", [1, 5, 20])
def test_min_snr_weights_are_those_of_sd_scripts(reference, ratios, gamma, kind):
    weight = losses.min_snr_weight(ratios, gamma, v_parameterization=kind == "v")
    torch.testing.assert_close(weight, reference[f"snr_weight/gamma{gamma}/{kind}"])


def test_v_scaling_weights_are_those_of_sd_scripts(reference, ratios):
    torch.testing.assert_close(losses.scale_v_pred_weight(ratios), reference["scale_v"])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1])
def test_v_like_weights_are_those_of_sd_scripts(reference, ratios, strength):
    torch.testing.assert_close(losses.v_pred_like_weight(ratios, strength), reference[f"v_pred_like/{strength:g}"])


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_debiased_weights_are_those_of_sd_scripts(reference, ratios, kind):
    weight = losses.debiased_weight(ratios, v_parameterization=kind == "v")
    torch.testing.assert_close(weight, reference[f"debiased/{kind}"])


def test_every_weight_is_finite_at_snr_0():
    nothing = torch.zeros(1)
    assert losses.min_snr_weight(nothing, 5, v_parameterization=False).item() == 1
    assert losses.min_snr_weight(nothing, 5, v_parameterization=True).item() == 0
    assert losses.scale_v_pred_weight(nothing).item() == 0
    assert losses.debiased_weight(nothing, v_parameterization=True).item() == 1
    torch.testing.assert_close(losses.debiased_weight(nothing, v_parameterization=False), torch.tensor([1000.0]).sqrt())
    torch.testing.assert_close(losses.v_pred_like_weight(nothing, 0.5), torch.tensor([1 + 0.5 * 1001]))
