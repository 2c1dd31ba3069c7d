import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from library.dataset.geometry import Face, Transform, apply, draw, face_in_name, resize, size_conditioning
from library.errors import OptionError

FILTERS = (None, "lanczos", "box", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


@dataclass(frozen=True)
class Settings:
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None


def cover(source, target, interpolation=None):
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(side, int(length * scale + 0.5)) for side, length in zip(target, source, strict=True))
    crop = tuple((length - side) // 2 for side, length in zip(target, resized, strict=True))
    return Transform(source, resized, crop, target, interpolation)


def random_transform(rng):
    source = (rng.randint(40, 400), rng.randint(40, 400))
    target = (8 * rng.randint(4, 32), 8 * rng.randint(4, 32))
    settings = Settings(flip_aug=rng.random() < 0.5, random_crop=rng.random() < 0.5)
    return draw(cover(source, target, rng.choice(FILTERS)), settings, rng)


def step_position(row):
    """Return where a row that falls from 255 to 0 does so, in pixels: the area under it."""
    return row.astype(float).sum() / 255


def test_an_image_used_as_its_own_mask_stays_aligned():
    """Over 2,000 geometries an edge lies where the transform says, in the image and in masks of other sizes."""
    rng = random.Random(5)
    worst = 0.0
    for _ in range(2000):
        transform = random_transform(rng)
        width, height = transform.source
        edge = rng.randint(width // 4, 3 * width // 4)
        image = np.zeros((height, width), dtype=np.uint8)
        image[:, :edge] = 255
        factor = rng.choice((1, 1, 2, 3))  # the mask may be a whole number of times larger
        mask = image.repeat(factor, axis=0).repeat(factor, axis=1)
        seen = apply(transform, np.dstack((image, image, image)))
        masked = apply(transform, mask)
        target_w, target_h = transform.target
        assert seen.shape == (target_h, target_w, 3)
        assert masked.shape == (target_h, target_w)
        expected = edge * transform.resized[0] / width - transform.crop[0]
        row, mask_row = seen[target_h // 2, :, 0], masked[target_h // 2]
        if transform.flip:
            row, mask_row = row[::-1], mask_row[::-1]
        expected = min(max(expected, 0), target_w)
        apart = abs(step_position(row) - step_position(mask_row))
        magnified = max(1.0, transform.resized[0] / width)  # a filter may shift an edge by half a pixel of its source
        worst = max(worst, apart, abs(step_position(row) - expected) / magnified)
        if factor == 1:
            assert (mask_row == row).all()
    assert worst < 1.0


def test_vertical_edges_are_cut_alike():
    rng = random.Random(6)
    for _ in range(300):
        transform = random_transform(rng)
        width, height = transform.source
        edge = rng.randint(height // 4, 3 * height // 4)
        image = np.zeros((height, width), dtype=np.uint8)
        image[:edge] = 255
        seen = apply(transform, image)
        expected = min(max(edge * transform.resized[1] / height - transform.crop[1], 0), transform.target[1])
        magnified = max(1.0, transform.resized[1] / height)
        assert abs(step_position(seen[:, transform.target[0] // 2]) - expected) / magnified < 1.0


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_flip_mirrors_what_was_cut(interpolation):
    transform = cover((97, 61), (128, 64), interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
    assert (apply(replace(transform, flip=True), pixels) == apply(transform, pixels)[:, ::-1]).all()


@pytest.mark.parametrize("interpolation", [None, "lanczos", "box", "bicubic"])
def test_enlarging_keeps_colours_under_transparent_pixels(interpolation):
    pixels = np.full((16, 16, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 0
    assert (resize(pixels, (40, 40), interpolation)[..., :3] == 200).all()


def test_channels_are_resized_alone():
    pixels = np.random.default_rng(1).integers(0, 256, (30, 20, 4), dtype=np.uint8)
    for size in ((40, 60), (10, 15)):
        together = resize(pixels, size, None)
        for channel in range(4):
            alone = resize(np.ascontiguousarray(pixels[..., channel]), size, None)
            assert (together[..., channel] == alone).all()


def test_shrinking_averages_by_exact_overlap():
    pixels = np.array([[0, 30, 60]], dtype=np.uint8)  # 3 -> 2: (0 + 30/2) / 1.5 and (30/2 + 60) / 1.5
    assert resize(pixels, (2, 1), None).tolist() == [[10, 50]]


def test_an_unknown_filter_is_named_with_the_nearest():
    with pytest.raises(OptionError, match=r"got 'lancsoz'\. Did you mean lanczos\?"):
        resize(np.zeros((8, 8), dtype=np.uint8), (4, 4), "lancsoz")


def test_draws_follow_from_their_generator():
    transform = cover((300, 200), (64, 64))
    settings = Settings(flip_aug=True, random_crop=True)
    once = [draw(transform, settings, random.Random(seed)) for seed in range(40)]
    assert once == [draw(transform, settings, random.Random(seed)) for seed in range(40)]
    assert {drawn.flip for drawn in once} == {True, False}
    assert len({drawn.crop for drawn in once}) > 10


def test_a_random_crop_reaches_both_ends_and_stays_inside():
    transform = cover((96, 64), (64, 64))
    lefts = {draw(transform, Settings(random_crop=True), random.Random(seed)).crop[0] for seed in range(400)}
    assert lefts == set(range(96 - 64 + 1))


def test_without_augmentation_a_draw_changes_nothing():
    transform = cover((300, 200), (64, 64))
    assert draw(transform, Settings(), random.Random(0)) == transform


def test_a_face_stays_in_a_cut_round_it():
    transform = cover((1000, 800), (256, 256))
    face = Face(800, 200, 100, 100)
    settings = Settings(face_crop_aug_range=(2.0, 4.0))
    scales = set()
    for seed in range(200):
        drawn = draw(transform, settings, random.Random(seed), face=face)
        scale = drawn.resized[0] / 1000
        scales.add(scale)
        (left, top), (x, y) = drawn.crop, (800 * scale, 200 * scale)
        assert 0 <= left <= drawn.resized[0] - 256
        assert 0 <= top <= drawn.resized[1] - 256
        assert left <= x <= left + 256
        assert top <= y <= top + 256
    assert 0.63 < min(scales) < 0.68  # 256 / (100 * 4)
    assert 0.95 < max(scales) <= 1.0  # 256 / (100 * 2) would enlarge


def test_a_cut_round_a_face_covers_the_bucket_even_when_the_picture_is_small():
    settings = Settings(face_crop_aug_range=(1.0, 4.0), random_crop=True)
    for seed in range(200):
        rng = random.Random(seed)
        source = (rng.randint(30, 400), rng.randint(30, 400))
        face = Face(rng.randint(1, source[0]), rng.randint(0, source[1]), rng.randint(1, 200), rng.randint(1, 200))
        drawn = draw(cover(source, (128, 192)), settings, rng, face=face)
        pixels = np.zeros(source[::-1], dtype=np.uint8)
        assert apply(drawn, pixels).shape == (192, 128)


def test_a_face_is_read_from_the_end_of_a_name():
    assert face_in_name(Path("a/cat_120_80_64_60.png")) == Face(120, 80, 64, 60)
    assert face_in_name(Path("a/cat_of_the_house_60.png")) is None
    assert face_in_name(Path("120_80_64_60.png")) is None
    assert face_in_name(Path("cat_0_80_64_60.png")) is None


def test_size_conditioning_tells_the_cut_that_was_made():
    transform = Transform(source=(1920, 1080), resized=(1365, 768), crop=(10, 0), target=(1344, 768))
    told = size_conditioning(transform)
    assert (told.original, told.crop_top_left, told.target) == ((1080, 1920), (0, 10), (768, 1344))


def test_size_conditioning_of_a_mirrored_cut_counts_from_the_mirrored_side():
    transform = Transform(source=(1920, 1080), resized=(1365, 768), crop=(10, 0), target=(1344, 768), flip=True)
    assert size_conditioning(transform).crop_top_left == (0, 1365 - 1344 - 10)
