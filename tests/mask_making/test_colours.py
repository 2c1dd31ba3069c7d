from pathlib import Path

import numpy as np
import pytest

from library.errors import OptionError
from library.mask_making import colours
from library.mask_making.pictures import Picture

MAGENTA, GREY = (255, 0, 255), (120, 120, 120)


def picture_of(pixels: np.ndarray, alpha: np.ndarray | None = None) -> Picture:
    return Picture(Path("a.png"), "a.png", pixels.astype(np.uint8), alpha)


def ring() -> np.ndarray:
    """Return a magenta picture, (20, 30, 3), with a grey ring around a magenta hole."""
    pixels = np.full((20, 30, 3), MAGENTA, np.uint8)
    pixels[4:16, 6:24] = GREY
    pixels[8:12, 12:18] = MAGENTA
    return pixels


def shape_of(mask: np.ndarray) -> str:
    """Return the middle row of a mask in signs, one for three pixels."""
    return "".join(".#"[value // 255] for value in mask[10, 1::3])


def test_every_grade_of_transparency_is_kept():
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    drawn = colours.from_alpha(picture_of(np.zeros((16, 16, 3)), alpha))
    np.testing.assert_array_equal(drawn.mask, alpha)
    assert not drawn.doubt


def test_a_picture_without_transparency_is_learnt_whole_and_named():
    drawn = colours.from_alpha(picture_of(np.zeros((4, 5, 3))))
    assert drawn.mask.shape == (4, 5)
    assert (drawn.mask == 255).all()
    assert drawn.doubt == "has no transparency"


@pytest.mark.parametrize("learn", [False, True])
def test_a_colour_is_masked_out_or_learnt(learn):
    drawn = colours.from_colour(picture_of(ring()), MAGENTA, tolerance=0, learn=learn, connected=False)
    assert shape_of(drawn.mask) == ("##..##..##" if learn else "..##..##..")
    assert set(np.unique(drawn.mask)) == {0, 255}


def test_what_is_enclosed_stays_where_only_what_touches_the_border_counts():
    drawn = colours.from_colour(picture_of(ring()), MAGENTA, tolerance=0, learn=False, connected=True)
    assert shape_of(drawn.mask) == "..######.."


@pytest.mark.parametrize(("tolerance", "is_found"), [(4, False), (5, True)])
def test_each_channel_may_be_off_by_the_tolerance(tolerance, is_found):
    pixels = np.full((8, 8, 3), (250, 5, 255), np.uint8)
    drawn = colours.from_colour(picture_of(pixels), MAGENTA, tolerance=tolerance, learn=True, connected=False)
    assert bool((drawn.mask == 255).all()) is is_found


def test_a_colour_near_white_does_not_wrap_around():
    pixels = np.full((8, 8, 3), 3, np.uint8)
    assert not colours.is_near(pixels, (255, 255, 255), 10).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_key_colour_is_that_of_most_of_the_border_whatever_noise_it_has(seed):
    rng = np.random.default_rng(seed)
    colour = rng.integers(10, 245, 3)
    pixels = (colour + rng.integers(-4, 5, (200, 300, 3))).clip(0, 255)
    pixels[150:, 100:200] = 255 - colour  # stands on the lower border
    found, share = colours.border_colour(pixels.astype(np.uint8), 10)
    assert np.abs(np.array(found) - colour).max() <= 2
    assert share == pytest.approx(0.9, abs=0.01)
    drawn = colours.from_colour(picture_of(pixels), None, tolerance=10, learn=False, connected=True)
    assert (drawn.mask[:150] == 0).all()
    assert (drawn.mask[150:, 100:200] == 255).all()
    assert not drawn.doubt


def test_a_border_of_many_colours_is_doubted():
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3))
    drawn = colours.from_colour(picture_of(pixels), None, tolerance=10, learn=False, connected=False)
    assert "of its border have one colour, #" in drawn.doubt


def test_a_picture_of_one_pixel_has_a_key_colour():
    assert colours.border_colour(np.full((1, 1, 3), 77, np.uint8), 0) == ((77, 77, 77), 1.0)


def test_what_is_as_bright_as_the_threshold_is_learnt():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[:, 1], pixels[:, 2] = 99, 100
    drawn = colours.from_brightness(picture_of(pixels), 100)
    np.testing.assert_array_equal(drawn.mask, [[0, 0, 255]] * 2)


@pytest.mark.parametrize("text", ["#ff00ff", "ff00ff", "#f0f", "255, 0,255", "magenta"])
def test_a_colour_can_be_written_in_many_ways(text):
    assert colours.read_colour(text, "--from_color") == MAGENTA


@pytest.mark.parametrize("text", ["pinkish", "256,0,0", "1,2", "#ff00f", ""])
def test_what_is_no_colour_is_refused(text):
    with pytest.raises(OptionError, match=r"--from_color: .* is no colour\. Write '#ff00ff'"):
        colours.read_colour(text, "--from_color")
