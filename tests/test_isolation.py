import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from library.isolation import KEEP, MID_GREY, Fill, fill

FILLS = (Fill("extend"), Fill("mean"), Fill("noise"), Fill("noise", 1))


def picture(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height=40, width=56, soft=False):
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows - 18, columns - 25)
    return np.clip((14 - distance) * (20 if soft else 1000), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("soft", [False, True])
def test_what_is_learnt_stays_as_it_is(how, soft):
    mask = disc(soft=soft)
    assert (fill(picture(), mask, how, "a")[mask > 0] == picture()[mask > 0]).all()


@pytest.mark.parametrize("how", FILLS)
def test_what_is_masked_out_decides_nothing(how):
    mask = disc(soft=True)
    other = np.where(mask[..., None] > 0, picture(), picture(seed=1))
    assert (other != picture()).any()
    assert (fill(other, mask, how, "a") == fill(picture(), mask, how, "a")).all()


def test_keep_leaves_the_picture_alone():
    assert fill(picture(), disc(), KEEP, "a") is not None
    assert (fill(picture(), disc(), KEEP, "a") == picture()).all()


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("soft", [False, True])
def test_one_learnt_colour_fills_everything_with_itself(how, soft):
    mask = disc(soft=soft)
    plain = np.where(mask[..., None] > 0, np.array([201, 3, 77], np.uint8), picture())
    assert (fill(plain, mask, how, "a") == [201, 3, 77]).all()


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("weight", [1, 255])
def test_a_single_learnt_pixel_gives_all_others_its_colour(how, weight):
    mask = np.zeros((40, 57), np.uint8)
    mask[39, 11] = weight
    rgb = picture(40, 57)
    assert (fill(rgb, mask, how, "a") == rgb[39, 11]).all()


@pytest.mark.parametrize("how", FILLS)
def test_a_picture_of_which_nothing_is_learnt_is_grey(how):
    assert (fill(picture(), np.zeros((40, 56), np.uint8), how, "a") == MID_GREY).all()


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("grey", [1, 255])
def test_a_picture_that_is_learnt_whole_stays_as_it_is(how, grey):
    assert (fill(picture(), np.full((40, 56), grey, np.uint8), how, "a") == picture()).all()


def test_the_mean_weighs_each_colour_by_its_mask():
    rgb = np.array([[[0, 10, 200], [255, 20, 100], [9, 9, 9]]], np.uint8)
    mask = np.array([[200, 50, 0]], np.uint8)
    assert fill(rgb, mask, Fill("mean"), "a")[0, 2].tolist() == [51, 12, 180]  # (0 * 200 + 255 * 50) / 250 = 51, ...


def test_noise_has_mean_and_covariance_of_what_is_learnt():
    """Colours 128 +- 30 in one direction and +- 8 in another, weighed evenly; few values reach 0 or 255."""
    drawn = np.random.default_rng(3).standard_normal((300, 300, 2)) * (30, 8)
    rgb = (128 + drawn @ np.array([[0.8, 0.6, 0.1], [-0.6, 0.8, 0.2]])).round().clip(0, 255).astype(np.uint8)
    mask = np.zeros((300, 300), np.uint8)
    mask[:, :150] = 255
    learnt = rgb[:, :150].reshape(-1, 3).astype(float)
    made = fill(rgb, mask, Fill("noise"), "a")[:, 150:].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(made.mean(axis=0), learnt.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(np.cov(made.T), np.cov(learnt.T), rtol=0.03, atol=3)


def test_grains_of_noise_keep_their_strength_when_the_picture_is_reduced():
    rgb, mask = picture(160, 160), np.zeros((160, 160), np.uint8)
    mask[:, :80] = 255

    def strength(grain):
        small = cv2.resize(fill(rgb, mask, Fill("noise"), "a", grain), (40, 40), interpolation=cv2.INTER_AREA)
        return float(small[:, 20:].std())

    assert strength(1) == pytest.approx(strength(4) / 4, rel=0.1)
    assert strength(4) == pytest.approx(rgb.std(), rel=0.15)  # somewhat less: values beyond 0 and 255 are cut


def test_noise_depends_on_the_pictures_name_and_its_number():
    made = [fill(picture(), disc(), Fill("noise", number), name) for number, name in ((0, "a"), (0, "b"), (1, "a"))]
    assert all((one != other).any() for one, other in zip(made, made[1:] + made[:1], strict=True))
    assert (fill(picture(), disc(), Fill("noise"), "a") == made[0]).all()


def test_an_extended_pixel_beside_the_edge_has_the_colours_of_the_edge():
    """A red left third and a blue right third: what lies between goes smoothly from one to the other."""
    rgb = np.zeros((60, 90, 3), np.uint8)
    rgb[:, :30], rgb[:, 30:60], rgb[:, 60:] = (200, 0, 0), (0, 255, 0), (0, 0, 200)
    mask = np.zeros((60, 90), np.uint8)
    mask[:, :30] = mask[:, 60:] = 255
    made = fill(rgb, mask, Fill("extend"), "a").astype(int)
    assert not made[..., 1].any(), "no green"
    between = made[:, 29:61]
    assert (np.diff(between[..., 0], axis=1) <= 0).all()
    assert (np.diff(between[..., 2], axis=1) >= 0).all()
    assert np.abs(np.diff(between, axis=1)).max() < 30, "no step of more than a seventh"
    assert np.abs(between[20:40].std(axis=0)).max() < 1.5, "no stripes across"


@pytest.mark.parametrize("how", FILLS)
def test_the_number_of_threads_changes_nothing(how):
    rgb = cv2.resize(picture(), (640, 500), interpolation=cv2.INTER_CUBIC)
    mask = cv2.resize(disc(soft=True), (640, 500), interpolation=cv2.INTER_LINEAR)
    before = cv2.getNumThreads()
    try:
        made = []
        for number in (0, 1, 2, 4):
            cv2.setNumThreads(number)
            made.append(fill(rgb, mask, how, "a"))
    finally:
        cv2.setNumThreads(before)
    assert all((each == made[0]).all() for each in made)


@settings(deadline=None, max_examples=60)
@given(
    mask=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=19), fill=st.just(0)),
    how=st.sampled_from(FILLS),
    seed=st.integers(0, 9),
    grain=st.integers(1, 30),
)
def test_any_fill_of_any_mask_is_a_picture_of_learnt_colours(mask, how, seed, grain):
    """Extended and mean colours lie between the least and the most of what is learnt; noise anywhere in a picture."""
    rgb = picture(*mask.shape, seed=seed)
    made = fill(rgb, mask, how, "a", grain)
    assert made.shape == rgb.shape
    assert made.dtype == np.uint8
    other = np.where(mask[..., None] > 0, rgb, picture(*mask.shape, seed=seed + 1))
    assert (fill(other, mask, how, "a", grain) == made).all()
    if mask.any() and how.kind != "noise":
        learnt = rgb[mask > 0]
        assert (made >= learnt.min(axis=0)).all()
        assert (made <= learnt.max(axis=0)).all()


def test_fills_are_told_apart_in_names_and_fingerprints():
    assert [each.name for each in (KEEP, *FILLS)] == ["", "extend", "mean", "noise", "noise1"]
    assert KEEP.in_words("a") == ""
    words = [each.in_words("folder/a") for each in FILLS]
    assert len(set(words)) == len(FILLS)
    assert [each.in_words("folder/b") == word for each, word in zip(FILLS, words, strict=True)] == [
        True, True, False, False  # only noise depends on the name
    ]  # fmt: skip
