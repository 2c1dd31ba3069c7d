import json
from dataclasses import replace
from pathlib import Path

from library.dataset.buckets import centred
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.scan import NO_MASK, Sample
from library.dataset.summary import bucket_info, describe, lines, mask_facts, mask_line, tag_frequency
from library.masks import MaskSource
from library.metadata import MaskFacts

PHOTOS = SubsetConfig(Path("data/photos"), num_repeats=3, keep_tokens=1, flip_aug=True, caption_prefix="p")
REG = SubsetConfig(Path("data/reg"), index=1, is_reg=True, class_tokens="cat")
CONFIG = DatasetConfig(
    (64, 64), (PHOTOS, REG), batch_size=2, enable_bucket=True, min_bucket_reso=64, max_bucket_reso=128
)


def sample(subset=PHOTOS, *, name="a.png", source=(64, 64), target=(64, 64), repeats=3, mask=NO_MASK, orientation=1):
    transform = centred(source, target, target)
    return Sample(Path(name), ("a cat, red",), subset, 0, subset.is_reg, repeats, orientation, transform, mask)


SAMPLES = [
    sample(mask=MaskSource("file", Path("m.png"))),
    sample(source=(130, 64), target=(128, 64), mask=MaskSource("alpha"), orientation=6),
    sample(REG, repeats=6),
]


def test_a_dataset_is_described_with_the_keys_of_sd_scripts():
    (described,) = describe([CONFIG], SAMPLES)
    subsets = described.pop("subsets")
    assert described == {
        "is_dreambooth": True,
        "batch_size_per_device": 2,
        "num_train_images": 6,
        "num_reg_images": 6,
        "resolution": [64, 64],
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "max_bucket_reso": 128,
        "tag_frequency": {"photos": {"a cat": 2, "red": 2}, "reg": {"a cat": 1, "red": 1}},
        "bucket_info": bucket_info(SAMPLES),
        "resize_interpolation": None,
    }
    assert subsets[0] == {
        "img_count": 2,
        "num_repeats": 3,
        "color_aug": False,
        "flip_aug": True,
        "random_crop": False,
        "shuffle_caption": False,
        "keep_tokens": 1,
        "keep_tokens_separator": "",
        "secondary_separator": None,
        "enable_wildcard": False,
        "caption_prefix": "p",
        "caption_suffix": None,
        "resize_interpolation": None,
        "image_dir": "photos",
        "class_tokens": None,
        "is_reg": False,
    }
    assert (subsets[1]["image_dir"], subsets[1]["img_count"], subsets[1]["is_reg"]) == ("reg", 1, True)


def test_tags_count_once_an_image_in_small_letters():
    texts = [("A Cat, red",), ("a cat ,, x",), ("red, y",)]
    counted = tag_frequency([replace(sample(), captions=each) for each in texts])
    assert counted == {"photos": {"a cat": 2, "red": 2, "x": 1, "y": 1}}


def test_masked_images_are_counted_with_repeats_and_regularisation_aside():
    masked_reg = sample(REG, mask=MaskSource("alpha"), repeats=6)
    assert mask_facts([*SAMPLES, masked_reg]) == MaskFacts(is_masked=True, has_alpha=True, num_images=6)
    assert mask_facts(SAMPLES[:1]) == MaskFacts(is_masked=True, has_alpha=False, num_images=3)
    assert mask_facts(SAMPLES[2:]) == MaskFacts()


def test_the_description_is_plain_json():
    described = describe([CONFIG], SAMPLES)
    assert json.loads(json.dumps(described)) == described


def test_without_buckets_there_is_nothing_to_say_of_them():
    described = describe([DatasetConfig((64, 64), (PHOTOS,))], SAMPLES[:1])[0]
    assert [described[key] for key in ("bucket_info", "min_bucket_reso", "max_bucket_reso")] == [None] * 3


def test_bucket_info_counts_repeats_and_averages_the_change_of_aspect_over_images():
    info = bucket_info(SAMPLES)
    assert info["buckets"] == {
        "0": {"resolution": [64, 64], "count": 9},
        "1": {"resolution": [128, 64], "count": 3},
    }
    assert info["mean_img_ar_error"] == (130 / 64 - 2) / 3


def test_the_line_about_masks_counts_sources():
    assert mask_line(SAMPLES, mean_weight=0.426) == (
        "masks: 2 of 3 images (1 file, 1 alpha), mean weight 0.43, 1 unmasked; white (255) is learnt, black (0) is not"
    )


def test_the_line_about_masks_leaves_out_what_there_is_none_of():
    assert mask_line([SAMPLES[0]] * 2) == "masks: 2 of 2 images (2 files); white (255) is learnt, black (0) is not"


def test_the_line_about_masks_says_when_there_are_none():
    assert mask_line(SAMPLES[2:]) == "masks: none; all 1 images are learnt whole"


def test_of_no_images_nothing_is_said_to_be_learnt() -> None:
    assert mask_line([]) == "masks: none, and no images"


def test_a_dataset_in_words():
    assert lines([CONFIG], SAMPLES) == [
        "dataset 0: 64x64, buckets in steps of 64, sides from 64 to 128, batch size 2",
        "  subset 0: data/photos: 2 images with 3 repeats, no masks",
        "  subset 1: data/reg: regularisation, 1 image with 1 repeat, no masks",
        "  bucket 64x64        2 images, 9 with repeats, 5 batches",
        "  bucket 128x64       1 image, 3 with repeats, 2 batches",
        "an epoch: 3 images, 12 with repeats, in 7 batches",
        "turned upright as their EXIF orientation says: 1 image",
    ]
