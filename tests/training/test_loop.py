"""How micro-batches group into steps and epochs, and how a run is asked to stop."""

import os
import signal

import pytest

from library.dataset.plan import Bucket, RunPlan
from library.training import draws, interrupts
from library.training.loop import Place, in_words, masked_averages, places
from library.training.metrics import LossHistory, LossRecord, MaskFigures


def plan_of(num_images: int, accumulation: int = 1) -> RunPlan:
    return RunPlan((Bucket(0, (64, 64), 1, tuple(range(num_images)), (1,) * num_images),), 0, accumulation)


def test_an_epoch_of_five_batches_with_accumulation_two_has_three_steps() -> None:
    plan = plan_of(5, accumulation=2)
    assert [place.is_update for place in places(plan, 6)] == [False, True, False, True, True] * 2
    assert [place.step for place in places(plan, 6)] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]


def test_the_run_ends_at_max_train_steps_in_the_middle_of_an_epoch() -> None:
    assert list(places(plan_of(3), 4))[-1] == Place(position=3, epoch=2, step=4, is_update=True, is_epoch_end=False)


def test_only_the_last_batch_of_an_epoch_ends_it() -> None:
    assert [place.is_epoch_end for place in places(plan_of(2), 4)] == [False, True, False, True]


def test_the_places_agree_with_the_plan_about_steps() -> None:
    plan = plan_of(7, accumulation=3)
    for place, draws_of_batch in zip(places(plan, 9), plan.batches(), strict=False):
        assert {draw.step for draw in draws_of_batch} == {place.step - 1}
        assert {draw.epoch for draw in draws_of_batch} == {place.epoch}


def test_a_seed_is_a_pure_function_of_its_parts() -> None:
    assert draws.seed_of(1, 2, 3) == draws.seed_of(1, 2, 3)
    assert len({draws.seed_of(1, position, process) for position in range(100) for process in range(4)}) == 400
    assert draws.seed_of(0) == 8493733112532773764  # on every machine: a resumed run may be on another one


def test_the_first_interrupt_is_a_request_and_the_second_stops_at_once() -> None:
    with interrupts.deferred() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts.deferred():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_the_progress_bar_shows_the_mean_losses_inside_and_outside_of_masks_as_far_as_there_are_any() -> None:
    history = LossHistory(window=2)
    assert masked_averages(history) == {}
    for step, figures in enumerate([None, MaskFigures(0.25, None, 1.0), MaskFigures(0.75, None, 1.0)], start=1):
        history.add(LossRecord(step, 1, 0.5, {}, {}, is_stop_wanted=False, figures=figures))
    assert masked_averages(history) == {"inside": 0.5}


def test_the_line_about_validation_ends_with_the_losses_inside_and_outside_of_masks() -> None:
    assert in_words(MaskFigures(0.25, 0.5, 1.0)) == ", inside the masks 0.2500, outside 0.5000"
    assert in_words(MaskFigures(None, 0.5, 1.0)) == ", outside 0.5000"
    assert in_words(None) == ""
