from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from dataset.pictures import StubEncoder, sample_of, save_picture, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.dataset import contact_sheet, geometry, images, looks, mask_shares, placement, scan, summary
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.cut_settings import DEFAULT_VARIANTS, check, warn_of_idle
from library.dataset.geometry import Transform, size_conditioning
from library.dataset.images import Decoded
from library.dataset.latents import build_store
from library.dataset.loader import DrawnImages, LoaderSettings
from library.dataset.looks import Look
from library.dataset.placement import LEAST_KEPT, Placement, share_seen
from library.dataset.plan import Draw
from library.errors import OptionError
from library.isolation import KEEP, Fill
from library.masks import FULL, MaskSource

SUBSET = SubsetConfig(Path("images"), random_placement=True)
NOISY = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
PLACE = Path("folder") / "picture.png"


def placed(source=(60, 40), resized=(60, 40), crop=(0, 0), target=(64, 64), angle=0.0, **more) -> Transform:
    return Transform(source, resized, crop, target, placement=Placement(angle), **more)


def test_a_picture_that_is_only_moved_keeps_its_pixels():
    transform = placed(crop=(-3, -9))
    shown = geometry.apply(transform, NOISY)
    np.testing.assert_array_equal(shown[9:49, 3:63], NOISY)
    np.testing.assert_array_equal(geometry.coverage(transform)[9:49, 3:63], 255)
    assert geometry.coverage(transform).sum() == 255 * 60 * 40


def test_what_is_larger_than_the_bucket_is_cut_as_it_is_without_placement():
    plain = Transform((60, 40), (120, 80), (30, 7), (64, 64))
    shown = geometry.apply(replace(plain, placement=Placement()), NOISY)
    np.testing.assert_array_equal(shown, geometry.apply(plain, NOISY))


def test_a_quarter_turn_is_exact_and_counter_clockwise():
    shown = geometry.apply(placed(crop=(-12, -2), angle=90), NOISY)
    np.testing.assert_array_equal(shown[2:62, 12:52], np.rot90(NOISY))


def test_picture_mask_and_coverage_stand_at_one_place_whatever_the_mask_s_size():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:50] = 255
    rgb = np.dstack([mask] * 3)
    transform = placed(resized=(45, 30), crop=(-7, -11), angle=20, flip=True, interpolation="area")
    shown, shown_mask = geometry.apply(transform, rgb)[..., 0], geometry.apply(transform, mask)
    assert np.abs(shown.astype(int) - shown_mask).max() <= 40  # another filter, the same edges
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_allclose(geometry.apply(transform, doubled).astype(int), shown_mask, atol=1)
    assert not shown_mask[geometry.coverage(transform) == 0].any()


def test_a_mirrored_placement_is_the_mirror_image():
    transform = placed(resized=(45, 30), crop=(-7, -11), angle=33)
    mirrored = geometry.apply(replace(transform, flip=True), NOISY)
    np.testing.assert_array_equal(mirrored, geometry.apply(transform, NOISY)[:, ::-1])


def test_a_picture_shown_small_is_averaged_and_not_sampled():
    checks = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    transform = placed((320, 320), (40, 40), (-12, -12), angle=17)
    shown = geometry.apply(transform, np.dstack([checks] * 3))
    inside = shown[geometry.coverage(transform) == 255]
    assert np.abs(inside.astype(int) - 127).max() <= 1


def test_free_canvas_takes_the_picture_s_mean_colour_and_weighs_nothing():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (200, 100, 0)
    seen = images.see(Decoded(pixels, None), None, Look(placed(crop=(-2, -8)), KEEP), PLACE)
    np.testing.assert_array_equal(seen.pixels[0, 0], (100, 50, 0))
    np.testing.assert_array_equal(seen.pixels[8:48, 2:62], pixels)
    assert seen.mask is not None
    assert seen.mask[0].sum() == 0
    assert seen.mask[1, 0] == 8 * 6 * 255  # two of its eight columns are free
    assert seen.mask[1, 1] == FULL


def test_a_turned_picture_has_no_dark_seam_at_its_edge():
    white = np.full((40, 60, 3), 255, np.uint8)
    seen = images.see(Decoded(white, None), None, Look(placed(crop=(-2, -8), angle=10), KEEP), PLACE)
    assert (seen.pixels == 255).all()


@pytest.mark.parametrize("kind", ["extend", "mean", "noise"])
@pytest.mark.parametrize("angle", [0, 25])
def test_what_is_masked_out_of_a_picture_decides_nothing_of_a_filled_canvas(kind, angle):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:45] = 255
    mask[30:35, 20:45] = 3
    other = np.where(mask[..., None] > 0, NOISY, 255 - NOISY)
    look = Look(placed(resized=(48, 32), crop=(-9, -5), angle=angle), Fill(kind))
    one, two = (images.see(Decoded(rgb, None), mask, look, PLACE) for rgb in (NOISY, other))
    np.testing.assert_array_equal(one.pixels, two.pixels)
    kept = [images.see(Decoded(rgb, None), mask, replace(look, fill=KEEP), PLACE).pixels for rgb in (NOISY, other)]
    assert (kept[0] != kept[1]).any()


def test_a_fill_extends_a_picture_without_a_mask_over_the_canvas():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 250
    seen = images.see(Decoded(pixels, None), None, Look(placed(crop=(-2, -12)), Fill("extend")), PLACE)
    np.testing.assert_array_equal(seen.pixels[12:52, 2:62], pixels)
    assert seen.pixels[4, 4].max() < 40
    assert seen.pixels[4, 60].min() > 200


# ---- draws -------------------------------------------------------------------------------------------------------


def drawn(seed, scale=(0.5, 1.0), rotate=0.0, source=(60, 40), target=(64, 96), region=None) -> Transform:
    subset = replace(SUBSET, placement_scale=scale, placement_rotate=rotate)
    return placement.draw(Transform(source, target, (0, 0), target), subset, Random(seed), region)


def test_a_scale_of_one_just_fits_the_whole_picture_into_its_bucket():
    assert drawn(1, (1, 1)).resized == (64, 43)  # 60 x 40 becomes 64 wide
    assert drawn(1, (0.5, 0.5)).resized == (32, 21)


def test_places_are_spread_over_the_bucket():
    crops = np.array([drawn(seed, (0.5, 0.5)).crop for seed in range(400)])
    assert (crops.min(axis=0) == (-32, -75)).all()  # 64 - 32, 96 - 21
    assert (crops.max(axis=0) == (0, 0)).all()


def test_angles_are_drawn_either_way():
    angles = [drawn(seed, rotate=20).placement.angle for seed in range(200)]
    assert min(angles) < -18
    assert max(angles) > 18
    assert max(map(abs, angles)) <= 20


@pytest.mark.parametrize("angle", [0, 1e-7, -1e-7, 1e-5])
def test_a_picture_whose_edge_lies_nearly_on_the_bucket_s_is_seen_whole(angle):
    transform = placed((8, 8), (64, 64), (0, -25), (64, 96), angle)
    assert share_seen(transform, (0, 0, 8, 8)) == pytest.approx(1, abs=0.01)
    assert share_seen(replace(transform, crop=(-32, -25)), (0, 0, 8, 8)) == pytest.approx(0.5, abs=0.01)


sides = st.integers(8, 400)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 1), st.floats(0, 180), st.tuples(sides, sides))
def test_all_of_a_picture_is_seen_up_to_a_scale_of_one(seed, scale, rotate, source):
    transform = drawn(seed, (scale, 1.0), rotate, source)
    assert share_seen(transform, (0, 0, *source)) >= 0.97  # rounded to whole pixels, of which there may be few


@st.composite
def regions_in_images(draw):
    source = (draw(sides), draw(sides))
    left, top = draw(st.integers(0, source[0] - 1)), draw(st.integers(0, source[1] - 1))
    return source, (left, top, draw(st.integers(left + 1, source[0])), draw(st.integers(top + 1, source[1])))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 6), st.floats(0, 180), regions_in_images())
def test_most_of_the_weighted_region_stays_in_the_bucket(seed, scale, rotate, case):
    source, region = case
    transform = drawn(seed, (scale, scale), rotate, source, region=region)
    # at a scale of 1 all is seen, up to a pixel that rounding costs a side
    is_at_most_fitting = max(transform.resized[axis] - transform.target[axis] for axis in (0, 1)) <= 1
    assert share_seen(transform, region) >= LEAST_KEPT or is_at_most_fitting


def test_a_bucket_is_full_where_the_picture_is_larger():
    for seed in range(50):
        transform = drawn(seed, (3, 3), source=(64, 96))
        assert geometry.coverage(transform).min() == 255


# ---- what SDXL is told -------------------------------------------------------------------------------------------


def test_sdxl_is_told_of_a_canvas_as_large_as_in_the_file_s_pixels():
    # 200x100 shown 32 wide, 0.16: the bucket of 64 is 400 pixels of the file.
    small = placed((200, 100), (32, 16), (-10, -20))
    sizes = size_conditioning(small)
    assert (sizes.original, sizes.crop_top_left, sizes.target) == ((400, 400), (0, 0), (64, 64))
    # 128 wide, 0.64: 20 of the picture's columns are cut off on the left, and it is padded to 64 rows.
    large = placed((200, 100), (128, 64), (20, 0))
    assert size_conditioning(large).original == (100, 200)
    assert size_conditioning(large).crop_top_left == (0, 20)
    assert size_conditioning(replace(large, flip=True)).crop_top_left == (0, 128 - 64 - 20)
    beyond = placed((200, 100), (128, 64), (20, -16))  # 16 rows of canvas above the picture, 16 rows of it cut off
    assert size_conditioning(beyond).original == (125, 200)
    assert size_conditioning(beyond).crop_top_left == (0, 20)


def test_a_placement_that_fills_the_bucket_is_told_as_a_crop():
    plain = Transform((200, 100), (128, 64), (20, 0), (64, 64))
    assert size_conditioning(replace(plain, placement=Placement())) == size_conditioning(plain)


# ---- in runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path):
    subset = SubsetConfig(tmp_path, random_placement=True, placement_rotate=10, placement_variants=3, flip_aug=True)
    paths = [save_picture(tmp_path / f"{name}.png", seed) for seed, name in enumerate("ab")]
    return [sample_of(path, mask=MaskSource("padding"), subset=subset) for path in paths]


def one(dataset, sample=0, repeat=0, epoch=1):
    return dataset[(Draw(sample, repeat, epoch, 0),)]


def test_without_a_cache_each_draw_has_a_place_of_its_own_and_the_same_again(samples):
    dataset = DrawnImages(samples, LoaderSettings(seed=1, max_train_steps=10))
    first, repeated, later = one(dataset), one(dataset, repeat=1), one(dataset, epoch=2)
    assert not torch.equal(first.masks, repeated.masks)
    assert not torch.equal(first.masks, later.masks)
    again = one(DrawnImages(samples, LoaderSettings(seed=1, max_train_steps=10)))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)


def test_a_draw_makes_no_place_but_its_own(samples):
    many = replace(samples[0], subset=replace(samples[0].subset, placement_variants=10**9))
    assert looks.num_looks(many) == 10**9
    assert looks.look_of(many, 10**9 - 1).transform.placement is not None
    assert one(DrawnImages([many], LoaderSettings(seed=1, max_train_steps=10))).masks is not None


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_cache_holds_placement_variants_of_which_each_draw_takes_one(samples, to_disk, tmp_path):
    encoder = StubEncoder()
    store = build_store(samples, settings_of(to_disk=to_disk), encoder)
    assert encoder.taken() == 2 * 2 * 3  # pictures, mirrored as well, places
    assert len(list(tmp_path.glob("*.safetensors"))) == (6 if to_disk else 0)
    cached = DrawnImages(samples, LoaderSettings(seed=1, max_train_steps=10), store=store)
    held = {
        (store.get(0, flip=flip, look=number)[1].tobytes()): replace(look.transform, flip=flip)
        for flip in (False, True)
        for number, look in enumerate(looks.looks_of(samples[0]))
    }
    assert len(held) == 6
    seen = set()
    for epoch in range(60):
        batch = one(cached, epoch=epoch)
        sums = np.rint(batch.masks[0, 0].numpy() * FULL).astype(np.uint16)
        seen.add(sums.tobytes())
        sizes = size_conditioning(held[sums.tobytes()])  # what SDXL is told is of this place
        assert tuple(batch.original_sizes[0].tolist()) == sizes.original
        assert tuple(batch.crop_top_lefts[0].tolist()) == sizes.crop_top_left
    assert seen == held.keys()


def test_a_cache_on_disk_is_fresh_until_a_setting_of_the_placement_changes(samples):
    encoder = StubEncoder()
    for change, num_encoded in (({}, 12), ({}, 0), ({"placement_rotate": 11.0}, 12)):
        changed = [replace(sample, subset=replace(sample.subset, **change)) for sample in samples]
        build_store(changed, settings_of(), encoder)
        assert encoder.taken() == num_encoded


def test_a_picture_shown_without_its_mask_still_learns_nothing_of_the_canvas(samples):
    subset = replace(samples[0].subset, alpha_mask=True, unmasked_probability=1.0)
    masked = [replace(sample, mask=MaskSource("alpha"), subset=subset) for sample in samples]
    store = build_store(masked, settings_of(to_disk=False), StubEncoder())
    settings = LoaderSettings(seed=1, max_train_steps=10)
    for dataset in (DrawnImages(masked, settings), DrawnImages(masked, settings, store=store)):
        weights = one(dataset).masks
        assert weights.min() == 0
        assert weights.max() == 1  # the alpha channel of the picture is noise


def test_pictures_without_a_mask_get_one_for_the_canvas_which_is_not_enough_for_masked_loss(tmp_path):
    Image.new("RGB", (96, 80)).save(tmp_path / "a.png")
    subset = replace(SUBSET, image_dir=tmp_path, class_tokens="a thing")
    (sample,) = scan.scan([DatasetConfig((64, 64), (subset,))]).samples
    assert sample.mask == MaskSource("padding")
    with pytest.raises(OptionError, match="none of the 1 images has a mask"):
        scan.check_masked_loss(True, [sample])


def test_the_region_is_known_where_the_picture_may_be_larger_than_the_bucket(tmp_path):
    pixels = np.zeros((80, 96, 4), np.uint8)
    pixels[10:20, 30:50, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    subset = replace(SUBSET, image_dir=tmp_path, class_tokens="a thing", alpha_mask=True)
    for scale, region in (((0.5, 1.0), None), ((0.5, 1.5), (30, 10, 50, 20))):
        config = DatasetConfig((64, 64), (replace(subset, placement_scale=scale),))
        assert scan.scan([config]).samples[0].region == region


def test_the_contact_sheet_and_the_shares_know_that_free_canvas_is_no_mask(samples):
    cells = contact_sheet.cells(samples)
    assert all(isinstance(cell, Image.Image) for cell in cells.values())
    weights = images.read_mask_weights(samples[0])
    assert weights is not None
    first = looks.looks_of(samples[0])[0].transform
    assert weights.mean() == pytest.approx(geometry.coverage(first).mean() / 255, rel=1e-4)
    store = build_store(samples, settings_of(to_disk=False), StubEncoder())
    assert mask_shares.decoded(samples) == mask_shares.stored(samples, store) == []
    assert summary.mask_line(samples) == (
        "masks: none; all 2 images are learnt whole; the canvas around placed images is not learnt"
    )


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"random_placement": True, "random_crop": True}, "random_placement and random_crop"),
        ({"random_placement": True, "mask_aware_crop": True}, "random_placement and mask_aware_crop"),
        ({"random_placement": True, "face_crop_aug_range": (1.0, 2.0)}, "random_placement and face_crop_aug_range"),
        ({"mask_aware_crop": True, "face_crop_aug_range": (1.0, 2.0)}, "mask_aware_crop and face_crop_aug_range"),
    ],
)
def test_two_settings_that_both_choose_the_cut_are_refused(keys, names):
    with pytest.raises(OptionError, match=names):
        check("datasets[0].subsets[0]", SubsetConfig(Path("images"), **keys))


@pytest.mark.parametrize(
    ("keys", "needed"),
    [
        ({"mask_aware_zoom": 2.0}, "mask_aware_crop"),
        ({"placement_scale": (0.2, 1.0)}, "random_placement"),
        ({"placement_rotate": 5.0}, "random_placement"),
        ({"placement_variants": 9}, "random_placement"),
    ],
)
def test_a_setting_without_the_switch_it_belongs_to_is_warned_about(keys, needed, caplog):
    check("datasets[0].subsets[0]", SubsetConfig(Path("images"), **keys))
    assert f"{next(iter(keys))} has no effect without {needed}" in caplog.text


def test_variants_without_a_cache_are_warned_about(caplog):
    subsets = [replace(SUBSET, placement_variants=9), SUBSET]
    assert SUBSET.placement_variants == DEFAULT_VARIANTS
    warn_of_idle(subsets, is_cached=True)
    assert not caplog.messages
    warn_of_idle(subsets, is_cached=False)
    (message,) = caplog.messages
    assert "placement_variants 9 has no effect without --cache_latents" in message


@pytest.mark.parametrize("angle", [0.0, 1e-7, -8.3e-8, 1e-4])
def test_sides_that_nearly_coincide_with_the_bucket_s_are_seen(angle):
    transform = placed((8, 8), (64, 64), (0, -28), (64, 96), angle)
    assert share_seen(transform, (0, 0, 8, 8)) == pytest.approx(1, abs=0.01)  # the canvas has whole pixels
    half = replace(transform, crop=(32, -28))
    assert share_seen(half, (0, 0, 8, 8)) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("is_cached", [True, False])
def test_free_canvas_weighs_nothing_whatever_the_least_weight(tmp_path, is_cached):
    subset = replace(SUBSET, placement_scale=(0.4, 0.4), mask_weight_min=0.5)
    path, file = save_picture(tmp_path / "a.png", 0, 3), tmp_path / "m.png"
    Image.fromarray(np.zeros((80, 96), np.uint8)).save(file)
    sample = sample_of(path, subset=subset, mask=MaskSource("file", file))
    store = build_store([sample], settings_of(to_disk=False), StubEncoder()) if is_cached else None
    weights = DrawnImages([sample], LoaderSettings(0, 10), store=store)[(Draw(0, 0, 0, 0),)].masks
    assert weights.min() == 0
    assert weights.max() == 0.5
    assert 0.05 < weights.mean() < 0.5 * 0.17
    assert mask_shares.decoded([sample])[0].share < 0.5 * 0.17
