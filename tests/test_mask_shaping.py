import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from library.mask_shaping import dilate, erode, feather, shape
from library.masks import MaskShape

MASKS = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=14))


def slowly_dilated(mask, radius):
    """Return what dilate gives, pixel by pixel."""
    rows, columns = np.indices(mask.shape)
    grown = np.empty_like(mask)
    for row, column in np.ndindex(*mask.shape):
        is_near = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
        grown[row, column] = mask[is_near].max()
    return grown


@settings(deadline=None, max_examples=60)
@given(mask=MASKS, radius=st.floats(0, 20))
def test_dilation_takes_the_brightest_within_a_disc(mask, radius):
    assert (dilate(mask, radius) == slowly_dilated(mask, radius)).all()


@settings(deadline=None, max_examples=40)
@given(mask=MASKS, radius=st.floats(0, 20))
def test_erosion_takes_the_darkest_within_a_disc(mask, radius):
    assert (erode(mask, radius) == 255 - slowly_dilated(255 - mask, radius)).all()


def dot():
    mask = np.zeros((21, 21), np.uint8)
    mask[10, 10] = 200
    return mask


def test_a_dot_grows_to_a_disc():
    assert [int((dilate(dot(), radius) == 200).sum()) for radius in (0.9, 1, 1.5, 2, 3)] == [1, 5, 9, 13, 29]


def test_the_border_of_the_picture_is_no_edge():
    left = np.zeros((20, 20), np.uint8)
    left[:, :10] = 255
    eaten = erode(left, 4)
    assert (eaten[:, :6] == 255).all()
    assert not eaten[:, 6:].any()
    soft = feather(left, 8)
    assert (soft == soft[0]).all()
    assert soft[0, 0] == 255


def test_a_feathered_edge_is_half_where_the_edge_was_and_as_wide_as_asked():
    edge = np.zeros((9, 80), np.uint8)
    edge[:, :40] = 255
    row = feather(edge, 16)[4].astype(int)
    assert 127.5 - (row[39] + row[40]) / 2 == pytest.approx(0, abs=0.6)
    assert (np.diff(row) <= 0).all()
    assert row[32] > 0.95 * 255
    assert row[47] < 0.05 * 255
    assert 0.1 * 255 < row[44] < 0.3 * 255
    assert (row[:26] == 255).all()
    assert not row[54:].any()


def test_a_mask_is_inverted_then_eroded_then_dilated_then_feathered():
    mask = np.full((21, 21), 255, np.uint8)
    mask[10, 10] = mask[5, 2] = 0
    mask[10, 9:12] = mask[9:12, 10] = 0  # a cross and a dot
    opened = shape(mask, MaskShape(invert=True, erode=1, dilate=1), (21, 21))
    assert int((opened == 255).sum()) == 5, "the dot is gone, the cross is whole again"
    assert opened[10, 10] == 255
    softened = shape(mask, MaskShape(invert=True, erode=1, dilate=1, feather=2.5), (21, 21))
    assert (softened == feather(opened, 2.5)).all()


def test_a_plain_shape_changes_nothing():
    assert (shape(dot(), MaskShape(), (21, 21)) == dot()).all()


def test_lengths_are_pixels_of_the_image_and_not_of_a_rescaled_mask():
    assert (shape(dot(), MaskShape(dilate=6), (63, 63)) == dilate(dot(), 2)).all()
    assert (shape(dot(), MaskShape(erode=0, feather=6), (63, 63)) == feather(dot(), 2)).all()
    assert (shape(255 - dot(), MaskShape(erode=6), (63, 63)) == erode(255 - dot(), 2)).all()


@settings(deadline=None, max_examples=60)
@given(
    mask=MASKS,
    how=st.builds(
        MaskShape,
        labels=st.just(()),
        invert=st.booleans(),
        erode=st.floats(0, 40),
        dilate=st.floats(0, 40),
        feather=st.floats(0, 40),
    ),
)
def test_any_shape_of_any_mask_is_a_mask(mask, how):
    shaped = shape(mask, how, mask.shape[::-1])
    assert shaped.shape == mask.shape
    assert shaped.dtype == np.uint8
    if (mask == mask.flat[0]).all():  # black, white and even greys stay what they are, but for inverting
        assert (shaped == (255 - mask if how.invert else mask)).all()


def test_shapes_are_told_apart_in_fingerprints():
    shapes = [
        MaskShape(invert=True),
        MaskShape(erode=1.0),
        MaskShape(dilate=1.0),
        MaskShape(feather=1.0),
        MaskShape(labels=(("1", 1.0),)),
        MaskShape(labels=(("1", 0.5),)),
        MaskShape(labels=(("1", 0.5), ("other", 1.0))),
    ]
    assert MaskShape().in_words() == ""
    assert len({each.in_words() for each in (MaskShape(), *shapes)}) == len(shapes) + 1
