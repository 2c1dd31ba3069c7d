import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.dataset import buckets
from library.dataset.config import DatasetConfig, SubsetConfig

DATA = Path(__file__).parents[1] / "data" / "dataset" / "buckets.json.gz"
REFERENCE = json.loads(gzip.decompress(DATA.read_bytes()))
SUBSET = SubsetConfig(Path("images"))
CROPPED_AT_RANDOM = SubsetConfig(Path("images"), random_crop=True)


def config_of(setting) -> DatasetConfig:
    shortest, longest = buckets.rounded_limits(setting["min"], setting["max"], setting["step"])
    return DatasetConfig(
        resolution=tuple(setting["resolution"]),
        subsets=(SUBSET,),
        enable_bucket=True,
        min_bucket_reso=shortest,
        max_bucket_reso=longest,
        bucket_reso_steps=setting["step"],
        bucket_no_upscale=setting["no_upscale"],
    )


def name_of(setting) -> str:
    width, height = setting["resolution"]
    limits = f"{setting['step']}-{setting['min']}-{setting['max']}"
    return f"{width}x{height}-{limits}{'-no_upscale' * setting['no_upscale']}"


@pytest.mark.parametrize("setting", REFERENCE["settings"], ids=name_of)
def test_every_size_gets_the_bucket_and_the_resize_of_the_reference(setting):
    config = config_of(setting)
    num_compared = 0
    for size, expected in zip(REFERENCE["sizes"], setting["results"], strict=True):
        if expected is None or 0 in expected[:2]:
            continue  # where the reference divides by zero or makes a bucket of no width
        transform = buckets.assign(config, SUBSET, tuple(size))
        assert [*transform.target, *transform.resized] == expected, size
        num_compared += 1
    assert num_compared > 200


@pytest.mark.parametrize("setting", [s for s in REFERENCE["settings"] if s["buckets"]], ids=name_of)
def test_the_list_of_sizes_is_the_reference_s(setting):
    config = config_of(setting)
    sizes = buckets.sizes_of_area(
        config.resolution, config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps
    )
    assert [list(size) for size in sizes] == setting["buckets"]


def test_an_image_thinner_than_a_step_gets_a_bucket_of_one_step_that_it_covers():
    num_compared = 0
    for setting in REFERENCE["settings"]:
        for size, expected in zip(REFERENCE["sizes"], setting["results"], strict=True):
            if expected is None or 0 in expected[:2]:
                transform = buckets.assign(config_of(setting), SUBSET, tuple(size))
                assert min(transform.target) == setting["step"]
                assert transform.resized[0] >= transform.target[0]
                assert transform.resized[1] >= transform.target[1]
                num_compared += 1
    assert num_compared == 51


sides = st.integers(1, 5000)


@settings(deadline=None)
@given(sides, sides, st.sampled_from(REFERENCE["settings"]))
def test_the_cut_lies_inside_the_resized_image_and_in_its_middle(width, height, setting):
    transform = buckets.assign(config_of(setting), SUBSET, (width, height))
    for crop, target, resized in zip(transform.crop, transform.target, transform.resized, strict=True):
        assert target % setting["step"] == 0
        assert target > 0
        assert 0 <= crop <= resized - target
        assert abs(2 * crop - (resized - target)) <= 1


@pytest.mark.parametrize(
    ("size", "bucket", "resized"),
    [
        ((1920, 1080), (1344, 768), (1365, 768)),
        ((1000, 1500), (832, 1216), (832, 1248)),
        ((700, 500), (1216, 832), (1216, 869)),
        ((4000, 3000), (1152, 896), (1195, 896)),
    ],
)
def test_a_size_of_the_documented_examples(size, bucket, resized):
    config = DatasetConfig((1024, 1024), (SUBSET,), enable_bucket=True, min_bucket_reso=512, max_bucket_reso=2048)
    transform = buckets.assign(config, SUBSET, size)
    assert (transform.target, transform.resized) == (bucket, resized)


def test_without_buckets_an_image_covers_the_resolution():
    transform = buckets.assign(DatasetConfig((512, 512), (SUBSET,)), SUBSET, (700, 500))
    assert transform.resized == (717, 512)
    assert transform.target == (512, 512)
    assert transform.crop == (102, 0)


def test_without_buckets_a_random_crop_is_cut_from_the_picture_as_it_is():
    transform = buckets.assign(DatasetConfig((512, 512), (SUBSET,)), CROPPED_AT_RANDOM, (700, 600))
    assert transform.resized == (700, 600)


def test_without_buckets_a_random_crop_enlarges_a_picture_that_is_too_small():
    transform = buckets.assign(DatasetConfig((512, 512), (SUBSET,)), CROPPED_AT_RANDOM, (700, 500))
    assert transform.resized == (717, 512)


def test_the_subset_s_filter_is_the_transform_s():
    subset = SubsetConfig(Path("images"), resize_interpolation="box")
    assert buckets.assign(DatasetConfig((512, 512), (subset,)), subset, (700, 500)).interpolation == "box"


@pytest.mark.parametrize("case", [case for case in REFERENCE["adjust_min_max"] if "result" in case])
def test_limits_are_rounded_as_in_the_reference(case):
    assert list(buckets.rounded_limits(case["min"], case["max"], case["steps"])) == case["result"]
