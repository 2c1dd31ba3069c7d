"""The moving average of the weights: what it comes to, and that it leaves training alone."""

import contextlib
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from library.errors import CheckpointError
from library.training import ema
from library.training.ema import Average, decay_at


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def average_of(trained: nn.Module, decay: float = 0.5) -> Average:
    return Average((trained,), trained.parameters(), decay)


def move(trained: nn.Module, by: float) -> None:
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(by)


def values(trained: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trained.parameters()]


def averaged(average: Average, trained: nn.Module) -> list[torch.Tensor]:
    with average.in_place(is_float32=True):
        return values(trained)


def test_the_average_is_the_sum_written_out() -> None:
    """Four steps with decays 1/10, 2/11 and 3/12, and then the 0.3 that was asked for (--ema_decay)."""
    trained = model()
    average = average_of(trained, 0.3)
    expected = [weight.double() for weight in values(trained)]
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3):
        move(trained, 0.7)
        average.update()
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, values(trained), strict=True)]
    for one, other in zip(averaged(average, trained), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6)


def test_the_decay_rises_to_what_was_asked_for() -> None:
    assert [decay_at(step, 0.5) for step in (1, 3, 9, 10, 1000)] == [0.1, 0.25, 0.5, 0.5, 0.5]


def test_steps_that_bf16_cannot_tell_apart_are_averaged_in_float32() -> None:
    trained = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(trained.weight)
    average = average_of(trained, 0.999)
    with torch.no_grad():
        trained.weight.fill_(1.0078125)  # the next number that bf16 has
    for _ in range(3):
        average.update()
    (kept,) = averaged(average, trained)
    remaining = (1 / 10) * (2 / 11) * (3 / 12)
    assert kept.dtype == torch.float32
    assert kept.item() == pytest.approx(1.0078125 - 0.0078125 * remaining, abs=1e-7)


def test_large_models_are_averaged_a_few_weights_at_a_time(monkeypatch) -> None:
    whole, parted = model(), model()
    averages = []
    for trained, at_once in ((whole, ema.AT_ONCE), (parted, 10)):
        monkeypatch.setattr(ema, "AT_ONCE", at_once)
        average = average_of(trained)
        move(trained, 1)
        average.update()
        averages.append(averaged(average, trained))
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))


def test_the_weights_are_untouched_by_what_is_saved_of_the_average() -> None:
    """The very parameters are back, with their values, gradients and hooks."""
    trained = model()
    average = average_of(trained)
    before = list(trained.parameters())
    trained(torch.ones(1, 3)).sum().backward()
    move(trained, 1)
    kept = values(trained)
    with contextlib.suppress(OSError), average.in_place(is_float32=True):
        assert not torch.equal(trained[0].weight, kept[0])
        raise OSError("no room on the disk")
    assert all(one is other and one.grad is not None for one, other in zip(trained.parameters(), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(trained.parameters(), kept, strict=True))


def test_what_is_not_trained_is_saved_as_it_is() -> None:
    trained = model()
    average = Average((trained,), [trained[0].weight], 0.5)
    move(trained, 1)
    with average.in_place(is_float32=True):
        assert not torch.equal(trained[0].weight, trained[0].weight + 1)
        kept = {name: each.clone() for name, each in trained.state_dict().items()}
    now = trained.state_dict()
    assert [name for name in kept if not torch.equal(kept[name], now[name])] == ["0.weight"]


def test_a_weight_of_two_modules_is_averaged_in_both() -> None:
    trained = model()
    shared = nn.Linear(3, 4)
    shared.weight = trained[0].weight
    average = Average((trained, shared), trained.parameters(), 0.5)
    move(trained, 1)
    with average.in_place(is_float32=True):
        assert shared.weight is trained[0].weight
    assert shared.weight is trained[0].weight
    assert shared.weight.requires_grad


@pytest.mark.parametrize("is_float32", [True, False])
def test_the_average_has_the_format_that_is_asked_for(is_float32: bool) -> None:
    trained = model(torch.bfloat16)
    with average_of(trained).in_place(is_float32=is_float32):
        assert trained[0].weight.dtype == (torch.float32 if is_float32 else torch.bfloat16)
    assert trained[0].weight.dtype == torch.bfloat16


def test_a_state_brings_it_back_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = model(), model()
    one = average_of(whole)
    for by in (1.0, 2.0, 3.0):
        move(whole, by)
        one.update()
    ema.write(one.snapshot(), tmp_path / "average.safetensors")
    resumed.load_state_dict(whole.state_dict())
    other = average_of(resumed)
    other.restore(ema.read(tmp_path / "average.safetensors"), "--resume here")
    for trained, average in ((whole, one), (resumed, other)):
        move(trained, -5)
        average.update()
    assert one.steps == other.steps == 4
    for left, right in zip(averaged(one, whole), averaged(other, resumed), strict=True):
        assert torch.equal(left, right)


def test_weights_that_no_longer_learn_are_averaged_on_after_a_resume() -> None:
    """A text encoder that was stopped keeps its average, and its place in the saved file."""
    trained = model()
    whole = average_of(trained)
    move(trained, 1)
    whole.update()
    resumed = Average((trained,), [trained[0].weight], 0.5)
    resumed.restore(whole.snapshot(), "--resume here")
    for average in (whole, resumed):
        average.update()
    for left, right in zip(averaged(whole, trained), averaged(resumed, trained), strict=True):
        assert torch.equal(left, right)


def test_a_state_without_an_average_begins_one_and_says_so(tmp_path: Path, caplog) -> None:
    trained = model()
    average = average_of(trained)
    move(trained, 1)
    with caplog.at_level(logging.WARNING):
        average.restore(ema.read(tmp_path / "average.safetensors"), "--resume here")
    assert "--resume here: was saved without --ema_decay" in caplog.text
    assert all(torch.equal(*pair) for pair in zip(averaged(average, trained), values(trained), strict=True))


@pytest.mark.parametrize("other", [nn.Linear(3, 5), nn.Sequential(nn.Linear(3, 4))], ids=["shape", "fewer"])
def test_an_average_of_other_weights_is_refused(other: nn.Module) -> None:
    average = average_of(model())
    with pytest.raises(CheckpointError, match="--resume here: the average is of other weights"):
        average.restore(average_of(other).snapshot(), "--resume here")
