"""When the loss on held-back images is due, and at which timesteps it is measured."""

from dataclasses import replace

import pytest
import torch

from library.options.noise import NoiseOptions
from library.training.validation import Validator, timesteps_of, warn_of_broken

VALIDATOR = Validator(None, None, None, (), (), (), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "timesteps"),
    [(None, None, (200, 400, 600, 800)), (500, 1000, (600, 700, 800, 900)), (0, 7, (1, 2, 4, 5)), (9, 9, (9,) * 4)],
)
def test_four_timesteps_lie_evenly_within_those_trained(low, high, timesteps):
    assert timesteps_of(NoiseOptions(min_timestep=low, max_timestep=high)) == timesteps


def test_it_is_due_at_each_epochs_end_unless_told_otherwise():
    assert [VALIDATOR.is_due(epoch, 7) for epoch in (None, 1, 2)] == [False, True, True]
    second = replace(VALIDATOR, every_n_epochs=2)
    assert [second.is_due(epoch, 7) for epoch in (None, 1, 2)] == [False, False, True]


def test_steps_come_on_top_of_epochs():
    often = replace(VALIDATOR, every_n_steps=3)
    assert [often.is_due(None, step) for step in (2, 3, 4, 6)] == [False, True, False, True]
    assert often.is_due(1, 4)
    assert not often.is_step_due(4)


def test_images_whose_loss_is_no_number_are_named(caplog):
    measured = [(("a.png", "b.png"), torch.tensor([1.0, float("nan")])), (("c.png",), torch.tensor([float("inf")]))]
    warn_of_broken(measured)
    assert "not a finite number for b.png, c.png" in caplog.text
    assert "a.png" not in caplog.text
