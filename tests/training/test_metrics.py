"""Losses come back in order, one step late, and a broken one names its images."""

import json
from dataclasses import replace

import pytest
import torch

from library.training.metrics import (
    LossError,
    LossHistory,
    LossReader,
    LossRecord,
    MaskFigures,
    StepLosses,
    ValidationRecord,
    Window,
)


def losses_of(step: int, *values: float, **extras: float) -> StepLosses:
    names = tuple(f"image{index}.png" for index in range(len(values)))
    return StepLosses(
        step,
        1,
        [torch.tensor(values)],
        names,
        {"unet": 1e-4},
        {key: torch.tensor(value) for key, value in extras.items()},
    )


def test_a_loss_is_read_when_the_next_one_is_pushed() -> None:
    reader = LossReader()
    assert list(reader.push(losses_of(1, 1.0, 3.0))) == []
    (record,) = reader.push(losses_of(2, 5.0))
    assert (record.step, record.loss) == (1, 2.0)
    (record,) = reader.drain()
    assert (record.step, record.loss) == (2, 5.0)


def test_the_loss_of_a_step_is_the_mean_over_all_its_images() -> None:
    reader = LossReader()
    micro_batches = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    list(reader.push(StepLosses(1, 1, micro_batches, ("a", "b", "c"), {}, {})))
    (record,) = reader.drain()
    assert record.loss == 3.0


def test_what_the_trainee_measured_travels_with_its_own_step() -> None:
    reader = LossReader()
    list(reader.push(losses_of(1, 1.0, norm=0.25)))
    (record,) = reader.push(losses_of(2, 1.0, norm=0.75))
    assert record.extras == {"norm": 0.25}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_image_and_no_other(broken: float) -> None:
    reader = LossReader()
    list(reader.push(losses_of(7, 1.0, broken)))
    with pytest.raises(LossError, match=r"step 7.*image1\.png") as raised:
        list(reader.drain())
    assert "image0.png" not in str(raised.value)


def test_a_broken_loss_of_another_process_stops_this_one_too() -> None:
    reader = LossReader(reduce=lambda total: total + torch.tensor([float("nan"), 1.0, 0.0]))
    list(reader.push(losses_of(1, 1.0)))
    with pytest.raises(LossError, match="another process"):
        list(reader.drain())


def test_the_loss_is_the_mean_over_all_processes() -> None:
    reader = LossReader(reduce=lambda total: total + torch.tensor([5.0, 1.0, 0.0]))
    list(reader.push(losses_of(1, 1.0)))
    (record,) = reader.drain()
    assert record.loss == 3.0


def test_a_wish_to_stop_reaches_every_process_with_the_same_record() -> None:
    readers = [
        LossReader(reduce=lambda total, other=other: total + torch.tensor([1.0, 1.0, other])) for other in (0.0, 1.0)
    ]
    for reader, is_asked in zip(readers, (True, False), strict=True):
        list(reader.push(replace(losses_of(1, 1.0), is_stop_wanted=is_asked)))
        (record,) = reader.drain()
        assert record.is_stop_wanted


def test_the_average_is_taken_over_the_last_epochs_window() -> None:
    history = LossHistory(window=2)
    for step, loss in enumerate([9.0, 1.0, 2.0], start=1):
        history.add(LossRecord(step, 1, loss, {}, {}, is_stop_wanted=False))
    assert history.average == 1.5
    assert history.epoch_average(1) == 4.0


def test_the_time_counts_from_the_first_step_not_from_the_previews_before_it() -> None:
    history = LossHistory(window=2)
    history.started_s -= 100
    history.begin()
    assert history.seconds < 100


def test_what_is_done_between_steps_is_no_time_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("library.training.metrics.time.monotonic", lambda: now[0])
    history = LossHistory(window=2)
    history.begin()
    with history.paused():
        now[0] += 50.0
    now[0] += 3.0
    assert history.seconds == 3.0


def test_a_replayed_history_goes_on_with_the_same_averages() -> None:
    first, second = LossHistory(window=2), LossHistory(window=2)
    for step, loss in enumerate([0.1, 0.2, 0.7], start=1):
        first.add(LossRecord(step, 1, loss, {"unet": 1e-4}, {}, is_stop_wanted=False))
    second.replay(json.loads(json.dumps(first.as_plain())))
    second.begin()
    assert second.average == first.average
    assert second.num_timed == 0


# ---- inside and outside of masks -------------------------------------------------------------------------------


def masked(step: int, *figures: list[list[float]], **extras: float) -> StepLosses:
    """Return a step of a micro-batch for each of the figures: rows of inside, outside, share, drift."""
    return replace(losses_of(step, 1.0, 3.0, **extras), figures=[torch.tensor(each) for each in figures])


def test_figures_of_masks_are_means_over_the_images_of_all_micro_batches_that_have_them() -> None:
    reader = LossReader(has_masks=True)
    list(reader.push(masked(1, [[2, 2], [0, 0], [0.5, 2], [0, 0]], [[1, 1], [6, 3], [0.25, 1], [4, 1]], norm=0.5)))
    (record,) = reader.drain()
    assert record.figures == MaskFigures(inside=1.0, outside=2.0, share=0.25, drift=4.0)
    assert (record.loss, record.extras) == (2.0, {"norm": 0.5})


def test_a_step_without_masked_images_has_no_figures() -> None:
    reader = LossReader(has_masks=True)
    list(reader.push(losses_of(1, 1.0, norm=0.5)))
    (record,) = reader.drain()
    assert record.figures is None
    assert record.extras == {"norm": 0.5}


def test_figures_of_masks_are_those_of_all_processes_even_if_this_one_has_no_masked_image() -> None:
    def reduce(total: torch.Tensor) -> torch.Tensor:
        return total + torch.tensor([1.0, 1.0, 0.0, 3.0, 2.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0])

    reader = LossReader(reduce, has_masks=True)
    list(reader.push(losses_of(1, 1.0)))
    (record,) = reader.drain()
    assert record.figures == MaskFigures(inside=1.5, outside=None, share=0.5, drift=None)


def test_a_window_passes_over_what_is_missing_and_forgets_what_is_old() -> None:
    window = Window(3)
    means = []
    for value in (None, 1.0, None, 3.0, None, None, None):
        window.add(value)
        means.append(window.mean)
    assert means == [None, 1.0, 1.0, 2.0, 3.0, 3.0, None]


def test_figures_of_masks_go_through_a_state_unchanged() -> None:
    history, again = LossHistory(window=2), LossHistory(window=2)
    figures = [MaskFigures(0.1, 0.2, 0.3, 0.4), None, MaskFigures(None, 0.7, 0.1)]
    for step, each in enumerate(figures, start=1):
        history.add(LossRecord(step, 1, 0.5, {}, {}, is_stop_wanted=False, figures=each))
        history.validations.append(ValidationRecord(step, 1, 0.5, 0.4, each))
    again.replay(json.loads(json.dumps(history.as_plain())))
    again.replay_validations(json.loads(json.dumps(history.validations_as_plain())))
    assert again.records == history.records
    assert again.validations == history.validations
    assert (again.inside, again.outside) == (history.inside, history.outside) == (None, 0.7)


def test_a_state_of_a_run_without_masks_is_as_it_was_before_there_were_figures() -> None:
    history = LossHistory(window=2)
    history.add(LossRecord(1, 1, 0.5, {"unet": 1e-4}, {}, is_stop_wanted=False))
    history.validations.append(ValidationRecord(1, 1, 0.5, 0.4))
    assert history.as_plain() == [[1, 1, 0.5, {"unet": 1e-4}, {}]]
    assert history.validations_as_plain() == [[1, 1, 0.5, 0.4]]
