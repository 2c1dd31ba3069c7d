import numpy as np
import pytest

from library.mask_making.finishing import Finish, combined, finish


def square(side: int = 20, size: int = 60) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    start = (size - side) // 2
    mask[start : start + side, start : start + side] = 255
    return mask


def test_without_any_step_a_mask_stays_as_it_is():
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(finish(mask, Finish()), mask)


def test_a_hard_mask_is_white_from_the_threshold_on():
    mask = np.array([[0, 99, 100, 255]], np.uint8)
    np.testing.assert_array_equal(finish(mask, Finish(threshold_mask=100)), [[0, 0, 255, 255]])


@pytest.mark.parametrize("step", ["grow", "shrink"])
def test_a_mask_grows_and_shrinks_by_pixels(step):
    mask = finish(square(), Finish(**{step: 3}))
    assert (mask[30] == 255).sum() == (26 if step == "grow" else 14)


def test_shrinking_comes_before_growing_and_so_takes_specks_away():
    mask = square()
    mask[5, 5] = 255
    opened = finish(mask, Finish(shrink=2, grow=2))
    assert opened[5, 5] == 0
    assert opened[30, 20] == 255


def test_a_soft_edge_is_half_where_it_was_and_as_wide_as_asked_for():
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 255
    row = finish(mask, Finish(blur=12))[20].astype(int)
    assert row[39] + row[40] == pytest.approx(255, abs=2)
    assert ((row > 255 * 0.03) & (row < 255 * 0.97)).sum() == pytest.approx(12, abs=2)


def test_inverting_comes_before_growing_what_is_learnt():
    mask = finish(square(), Finish(invert=True, grow=3))
    assert (mask[30] == 0).sum() == 14


def test_spots_below_the_area_go_with_their_soft_edges_and_others_stay():
    mask = square()
    mask[2:5, 2:5] = 90
    mask[3, 3] = 255  # a speck of one pixel with a soft edge
    mask[10:13, 50:53] = 60  # grey that belongs to no spot
    cleaned = finish(mask, Finish(min_area=4))
    assert (cleaned[2:5, 2:5] == 0).all()
    assert (cleaned[10:13, 50:53] == 60).all()
    assert (cleaned[square() == 255] == 255).all()


def test_an_area_below_one_is_a_share_of_the_picture():
    mask = square(6)  # 36 of 3600 pixels
    assert finish(mask, Finish(min_area=0.011)).max() == 0
    assert finish(mask, Finish(min_area=0.009)).max() == 255


def test_holes_are_filled_and_bays_are_not():
    mask = square(30)
    mask[25:30, 25:30] = 0  # a hole
    mask[40:60, 20:24] = 0  # a bay, open to the border
    filled = finish(mask, Finish(fill_holes=True))
    assert (filled[25:30, 25:30] == 255).all()
    assert (filled[40:60, 20:24] == 0).all()


def test_a_soft_edge_outside_is_no_hole():
    mask = square()
    mask[15:20, 20:40] = 40
    np.testing.assert_array_equal(finish(mask, Finish(fill_holes=True)), mask)


@pytest.mark.parametrize("mask", [np.zeros((9, 9), np.uint8), np.full((9, 9), 255, np.uint8)])
def test_plain_masks_go_through_every_step(mask):
    every = Finish(threshold_mask=128, min_area=5, fill_holes=True, shrink=2, grow=2, blur=3)
    np.testing.assert_array_equal(finish(mask, every), mask)


OLD, NEW = np.array([[0, 255, 0, 255, 100]], np.uint8), np.array([[0, 0, 255, 255, 55]], np.uint8)


@pytest.mark.parametrize(
    ("how", "with_old", "alone"),
    [
        ("replace", [0, 0, 255, 255, 55], [0, 0, 255, 255, 55]),
        ("add", [0, 255, 255, 255, 100], [0, 0, 255, 255, 55]),
        ("intersect", [0, 0, 0, 255, 55], [0, 0, 255, 255, 55]),
        ("subtract", [0, 255, 0, 0, 100], [255, 255, 0, 0, 200]),
    ],
)
def test_masks_are_combined_with_those_that_are_there(how, with_old, alone):
    np.testing.assert_array_equal(combined(NEW, OLD, how), [with_old])
    np.testing.assert_array_equal(combined(NEW, None, how), [alone])


@pytest.mark.parametrize("how", ["replace", "add", "intersect", "subtract"])
def test_combining_twice_is_combining_once(how):
    once = combined(NEW, OLD, how)
    np.testing.assert_array_equal(combined(NEW, once, how), once)
