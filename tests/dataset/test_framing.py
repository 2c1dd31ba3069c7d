from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.dataset import buckets, framing, geometry, regions, scan
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.geometry import Size, size_conditioning
from library.errors import DataError
from library.masks import MaskSource

SUBSET = SubsetConfig(Path("images"), mask_aware_crop=True)
SQUARE = DatasetConfig((512, 512), (SUBSET,))
BUCKETED = DatasetConfig((512, 512), (SUBSET,), enable_bucket=True, min_bucket_reso=256, max_bucket_reso=1024)
NOT_ENLARGED = replace(BUCKETED, bucket_no_upscale=True)


def assign(config, source, region, **changes):
    return framing.assign(config, replace(SUBSET, **changes), source, region)


def test_a_cut_is_moved_as_little_as_the_region_needs():
    # 1024x512 in 512x512: the middle begins at 256; a region from 700 to 800 needs 800 - 512 = 288.
    transform = assign(SQUARE, (1024, 512), (700, 100, 800, 200))
    assert (transform.resized, transform.crop) == ((1024, 512), (288, 0))
    assert assign(SQUARE, (1024, 512), (100, 100, 200, 200)).crop == (100, 0)
    assert assign(SQUARE, (1024, 512), (300, 100, 700, 200)).crop == (256, 0)


def test_a_region_s_half_covered_pixels_stay_within_the_cut():
    # 1023x341 shrinks by 512/341 = 1.5015: the region's right edge, 683, comes to 1025.5, so the cut ends at 1026.
    transform = assign(SQUARE, (1023, 341), (600, 0, 683, 341))
    assert transform.resized == (1536, 512)
    assert transform.crop[0] == 1026 - 512


def test_a_bucket_is_passed_over_for_the_nearest_one_in_which_the_region_stays_whole():
    source, region = (1000, 500), (0, 200, 980, 300)
    plain = buckets.assign(BUCKETED, SUBSET, source)
    assert plain.target == (704, 320)  # 2.2, the nearest to 2: shows 1000 x 454.5
    assert assign(BUCKETED, source, region).target == (704, 320)
    tall = (480, 10, 520, 490)  # 480 high, where 454 are seen
    transform = assign(BUCKETED, source, tall)
    assert transform.target == (640, 384)  # 1.67, further off; but all 500 rows are seen
    assert framing.kept(transform, tall) == 1


def test_without_enlarging_the_bucket_is_the_largest_that_cuts_nothing_of_the_region():
    # 500x300 becomes a bucket of 448x256 at its own scale, 52 columns and 44 rows less. All 500 columns are seen
    # where they become 448, and then 300 rows become 269, of which 256 are seen.
    assert assign(NOT_ENLARGED, (500, 300), (60, 60, 200, 200)).target == (448, 256)
    transform = assign(NOT_ENLARGED, (500, 300), (0, 100, 500, 200))
    assert (transform.target, transform.resized, transform.crop) == ((448, 256), (448, 269), (0, 6))


def test_a_zoom_shows_the_region_closer_but_never_cut():
    # Covering 512x512 takes a scale of 0.5. The region is 400 wide, 480 of 512 are free to be filled (1/32 a side).
    region = (500, 500, 900, 800)
    assert assign(SQUARE, (1024, 1024), region, mask_aware_zoom=1.5).resized == (768, 768)
    transform = assign(SQUARE, (1024, 1024), region, mask_aware_zoom=4)
    assert transform.resized == (1229, 1229)  # 480/400 of 1024
    left, top = transform.crop
    assert left == 600 - 16  # 500 * 1.2, and the margin of 512/32
    assert top == 961 + 16 - 512  # 800 * 1.2002 is the region's end: the cut is no lower than it needs
    assert framing.kept(transform, region) == 1


def test_a_zoom_enlarges_nothing_where_nothing_may_be_enlarged():
    transform = assign(NOT_ENLARGED, (640, 640), (300, 300, 340, 340), mask_aware_zoom=4)
    assert transform.resized == (640, 640)
    assert transform.target == (512, 512)


def test_a_region_larger_than_any_cut_keeps_as_much_as_it_can_and_is_named(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        folder.mkdir()
    Image.new("RGB", (200, 100)).save(images / "wide.png")
    mask = np.zeros((100, 200), np.uint8)
    mask[40:60, :160] = 255
    Image.fromarray(mask).save(masks / "wide.png")
    subset = replace(SUBSET, image_dir=images, conditioning_data_dir=masks, class_tokens="a thing")
    config = DatasetConfig((64, 64), (subset,))
    found = scan.scan([config])
    (sample,) = found.samples
    assert sample.region == (0, 40, 160, 60)
    assert sample.transform.crop[0] + 64 <= 103  # 160 * 0.64 = 102.4: the cut is full of the region
    (problem,) = found.problems
    assert "wide.png" in problem.message
    assert "keeps 62% of" in problem.message  # 64 of 103 columns


def test_a_random_cut_moves_only_where_the_region_stays_whole():
    region = (300, 0, 700, 512)
    transform = assign(SQUARE, (1024, 512), region, random_crop=True)
    subset = replace(SUBSET, random_crop=True)
    lefts = {geometry.draw(transform, subset, Random(seed)).crop[0] for seed in range(500)}
    assert (min(lefts), max(lefts)) == (188, 300)  # 700 - 512 to 300


def test_a_random_cut_of_a_large_image_shrinks_it_as_far_as_the_region_needs():
    region = (100, 100, 1100, 1100)
    transform = assign(SQUARE, (2048, 2048), region, random_crop=True)
    assert transform.resized == (983, 983)  # 1000 pixels in 512 * 15/16 = 480
    assert framing.kept(transform, region) == 1
    assert assign(SQUARE, (2048, 2048), (0, 0, 100, 100), random_crop=True).resized == (2048, 2048)


def test_sdxl_is_told_the_cut_that_was_made():
    sizes = size_conditioning(assign(SQUARE, (1024, 512), (700, 100, 800, 200)))
    assert (sizes.original, sizes.crop_top_left, sizes.target) == ((512, 1024), (0, 288), (512, 512))


@pytest.mark.parametrize("config", [SQUARE, BUCKETED, NOT_ENLARGED])
@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("region", [None, (0, 0, 1000, 700)])
def test_without_a_mask_or_with_a_white_one_all_is_as_before(config, random_crop, region):
    subset = replace(SUBSET, random_crop=random_crop)
    assert framing.assign(config, subset, (1000, 700), region) == buckets.assign(config, subset, (1000, 700))


def test_without_the_switch_all_is_as_before():
    off = SubsetConfig(Path("images"))
    for config in (SQUARE, BUCKETED, NOT_ENLARGED):
        assert framing.assign(config, off, (1000, 300), (0, 0, 10, 300)) == buckets.assign(config, off, (1000, 300))


sides = st.integers(60, 2000)


@st.composite
def regions_in_images(draw):
    source = (draw(sides), draw(sides))
    left, top = draw(st.integers(0, source[0] - 1)), draw(st.integers(0, source[1] - 1))
    return source, (left, top, draw(st.integers(left + 1, source[0])), draw(st.integers(top + 1, source[1])))


def all_frames(config: DatasetConfig, source: Size):
    """Every bucket that the settings allow, and the least size at which the image covers it."""
    if not config.enable_bucket:
        return [(config.resolution, buckets.cover(source, config.resolution))]
    area, step = 512 * 512, config.bucket_reso_steps
    if config.bucket_no_upscale:
        plain = buckets.assign(config, SUBSET, source)
        sizes = [(w, h) for w in range(step, source[0] + 1, step) for h in range(step, source[1] + 1, step)]
        sizes = [size for size in sizes if size[0] * size[1] <= area]
        return [(plain.target, plain.resized), *((size, buckets.cover(source, size)) for size in sizes)]
    sizes = buckets.sizes_of_area(config.resolution, config.min_bucket_reso, config.max_bucket_reso, step)
    return [(size, buckets.cover(source, size)) for size in sizes]


@settings(max_examples=300, deadline=None)
@given(
    regions_in_images(), st.sampled_from([SQUARE, BUCKETED, NOT_ENLARGED]), st.sampled_from([1.0, 1.7]), st.booleans()
)
def test_the_region_is_within_the_cut_whenever_any_bucket_permits(case, config, zoom, random_crop):
    source, region = case
    subset = replace(SUBSET, mask_aware_zoom=zoom, random_crop=random_crop)
    transform = framing.assign(config, subset, source, region)
    if region == (0, 0, *source):
        return
    is_possible = False
    for target, resized in all_frames(config, source):
        spans = [
            (region[axis] * resized[axis] // source[axis], -(-region[axis + 2] * resized[axis] // source[axis]))
            for axis in (0, 1)
        ]
        is_possible |= all(end - start <= target[axis] for axis, (start, end) in enumerate(spans))
    for seed in range(3):
        drawn = geometry.draw(transform, subset, Random(seed))
        assert (framing.kept(drawn, region) == 1) == is_possible
        assert all(0 <= drawn.crop[axis] <= drawn.resized[axis] - drawn.target[axis] for axis in (0, 1))


def test_a_region_is_the_box_of_what_is_not_black_and_specks_do_not_widen_it():
    mask = np.full((100, 200), 2, np.uint8)  # as lossy files have black
    mask[20:50, 30:90] = 3
    mask[99, 199] = 255
    assert regions.of_mask(mask, (200, 100)) == (30, 20, 90, 50)


def test_a_mask_of_specks_alone_has_a_region():
    mask = np.zeros((100, 100), np.uint8)
    mask[10::2, 20::2] = 255
    assert regions.of_mask(mask, (100, 100)) == (20, 10, 99, 99)


def test_a_rescaled_mask_has_its_region_in_the_picture_s_pixels_rounded_outwards():
    mask = np.zeros((50, 100), np.uint8)
    mask[10:20, 33:34] = 255
    assert regions.of_mask(mask, (301, 151)) == (99, 30, 103, 61)


def test_a_black_mask_has_no_region():
    assert regions.of_mask(np.zeros((8, 8), np.uint8), (8, 8)) is None


def test_an_alpha_channel_has_a_region_as_the_picture_is_seen(tmp_path):
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[5:10, 20:30, 3] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise: (x, y) comes to (40 - 1 - y, x)
    image.save(tmp_path / "a.png", exif=exif)
    assert regions.read(tmp_path / "a.png", MaskSource("alpha"), (40, 60)) == (30, 20, 35, 30)


def test_an_unreadable_mask_is_an_error_of_the_scan(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        regions.read(tmp_path / "a.png", MaskSource("file", tmp_path / "mask.png"), (40, 60))
    problems = []
    masks = {tmp_path / "a.png": MaskSource("file", tmp_path / "mask.png")}
    assert regions.of_subset(SUBSET, masks, {tmp_path / "a.png": (40, 60)}, problems) == {}
    assert [problem.severity for problem in problems] == ["error"]


def test_masks_are_not_read_where_nothing_asks_for_them(tmp_path):
    off = SubsetConfig(Path("images"), random_placement=True)  # at most as large as the bucket: all of it is seen
    masks = {tmp_path / "a.png": MaskSource("file", tmp_path / "gone.png")}
    assert regions.of_subset(off, masks, {}, []) == {}
