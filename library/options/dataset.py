"""Options of the images: where they are, their sizes, their augmentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """The images; all but the folders are defaults for what a dataset config leaves open."""

    dataset_config: str | None = option(None, "Dataset config, TOML or JSON.", is_path=True)
    dataset_class: str | None = option(
        None, "Class that makes the images, as package.module.Class. Instead of a config; see docs/datasets.md."
    )
    train_data_dir: str | None = option(
        None, "Folder of folders of images, each named <repeats>_<class words>. Instead of a config.", is_path=True
    )
    reg_data_dir: str | None = option(
        None, "The same for regularisation images. Only with --train_data_dir.", is_path=True
    )
    in_json: str | None = option(
        None,
        "Metadata file, JSON or JSONL, that lists the images and their captions. Their names start at "
        "--train_data_dir. Instead of a config.",
        is_path=True,
    )
    resolution: str | None = option(
        None, "Training size in pixels: SIZE, or WIDTH,HEIGHT. With buckets, their area.", joined_by=","
    )
    train_batch_size: int = option(1, "Images per step and device.", bounds=Bounds(min=1))
    dataset_repeats: int = option(1, "How often each image is shown in an epoch.", bounds=Bounds(min=1))
    enable_bucket: bool = option(False, "Give each image the size of about --resolution's area that fits its shape.")
    min_bucket_reso: int = option(256, "Shortest side of a bucket, in pixels.", bounds=Bounds(min=1))
    max_bucket_reso: int = option(1024, "Longest side of a bucket, in pixels.", bounds=Bounds(min=1))
    bucket_reso_steps: int = option(64, "Bucket sides are multiples of this many pixels.", bounds=Bounds(min=1))
    bucket_no_upscale: bool = option(False, "Never enlarge an image. The bucket sides' limits are not looked at then.")
    resize_interpolation: str | None = option(
        None,
        "Filter for every resizing. Unset: area to shrink, lanczos to enlarge.",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"),
    )
    color_aug: bool = option(False, "Vary hue or gamma a little, in a third of the cases. Not with cached latents.")
    flip_aug: bool = option(False, "Mirror images left to right, half of the time.")
    face_crop_aug_range: str | None = option(
        None, "MIN,MAX zoom of crops around the face whose place is in the file's name.", joined_by=","
    )
    random_crop: bool = option(False, "Crop at a random place instead of the centre. Not with cached latents.")
    cache_info: bool = option(False, "Keep captions and image sizes in metadata_cache.json beside the images.")
    prior_loss_weight: float = option(1.0, "Weight of regularisation images in the loss.", bounds=Bounds(min=0))
    debug_dataset: bool = option(False, "Show what training would see, and stop before training.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if self.resolution is not None and not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)?", self.resolution):
            raise OptionError(f"--resolution must be SIZE or WIDTH,HEIGHT, like 512 or 768,512; got {self.resolution}.")
        if self.face_crop_aug_range is not None:
            _check_zoom(self.face_crop_aug_range)
        if self.min_bucket_reso > self.max_bucket_reso and not self.bucket_no_upscale:
            low, high = self.min_bucket_reso, self.max_bucket_reso
            raise OptionError(f"--min_bucket_reso {low} is above --max_bucket_reso {high}. Swap them.")


def _check_zoom(text: str) -> None:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high:
        raise OptionError(f"--face_crop_aug_range must be MIN,MAX with 0 < MIN <= MAX, like 2.0,4.0; got {text}.")
