"""The dataset config: what the file, its inherited levels and the command line say, resolved for every subset.

A value is looked for in the subset, then its dataset, then [general], then on the command line. A false or 0 that is
written down counts as found. Paths are relative to the working directory, as in sd-scripts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library.dataset import buckets, cut_settings, mask_settings
from library.dataset.files import EXTENSIONS
from library.dataset.geometry import Size
from library.dataset.schema import (
    DATASET_KEYS,
    SUBSET_KEYS,
    SUBSET_ONLY_KEYS,
    Level,
    as_written,
    read_table,
    read_value,
)
from library.errors import DataError, OptionError, did_you_mean
from library.masks import MaskShape
from library.options.toml import read_toml

if TYPE_CHECKING:
    from library.options.captions import CaptionOptions
    from library.options.dataset import DatasetOptions
    from library.options.masks import MaskOptions
    from library.options.validation import ValidationOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images and all that is done to them, nothing left to inherit."""

    image_dir: Path  # where the names in metadata_file start, if there is one
    index: int = 0  # among the subsets of its dataset, as written in the file
    is_reg: bool = False
    class_tokens: str | None = None  # the caption of an image without one
    num_repeats: int = 1
    caption_extension: str = ".caption"
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0  # optimizer steps, or below 1 a share of them
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    cache_info: bool = False
    alpha_mask: bool = False
    conditioning_data_dir: Path | None = None  # the folder of mask images
    missing_mask: Literal["error", "train_all", "skip"] = "error"
    mask_fill: tuple[str, ...] = ("keep",)  # what stands where a picture is masked out; each draw takes one
    mask_labels: tuple[tuple[str, float], ...] = ()  # weights of a label map: ("1", 0.5), ("#ff0000", 1.0)
    mask_invert: bool = False
    mask_erode: float = 0.0  # like the next two, pixels of the image file
    mask_dilate: float = 0.0
    mask_feather: float = 0.0
    mask_weight_min: float = 0.0
    mask_area_norm: float = 0.0  # exponent of the mean weight that the loss is divided by
    mask_area_floor: float = 0.01  # the least mean weight to divide by
    unmasked_probability: float = 0.0
    mask_prior_weight: float = 0.0
    mask_drop_tags: tuple[str | tuple[str, str], ...] = ()  # tags, or (tag, label) of each
    mask_captions: bool = False
    mask_aware_crop: bool = False
    mask_aware_zoom: float = 1.0
    random_placement: bool = False
    placement_scale: tuple[float, float] = (0.5, 1.0)
    placement_rotate: float = 0.0  # degrees, either way
    placement_variants: int = 4
    diff_output_preservation: bool = False  # the target is what the model predicts without the trained network
    validation_split: float = 0.0  # share of the images that is held back from training, from 0 to 1
    validation_seed: int | None = None  # of the choice; None: the names choose
    metadata_file: Path | None = None  # lists the images and their captions, instead of all files of the folder

    @property
    def source(self) -> Path:
        """What names the images: the metadata file, or else the folder."""
        return self.metadata_file or self.image_dir

    def sets(self, name: str) -> bool:
        """Return whether a setting is not at its default."""
        return bool(getattr(self, name) != getattr(type(self), name))

    @property
    def mask_shape(self) -> MaskShape:
        """What is done to masks of files; those of other kinds have no labels."""
        lengths = (self.mask_erode, self.mask_dilate, self.mask_feather)
        return MaskShape(self.mask_labels, self.mask_invert, *map(float, lengths))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that are trained at one resolution, in shared buckets and batches."""

    resolution: Size
    subsets: tuple[SubsetConfig, ...]
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256  # a multiple of bucket_reso_steps
    max_bucket_reso: int = 1024  # a multiple of bucket_reso_steps
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None
    prior_loss_weight: float = 1.0  # loss weight of regularisation images


def load(
    dataset: DatasetOptions,
    captions: CaptionOptions,
    masks: MaskOptions,
    validation: ValidationOptions | None = None,
    *,
    bucket_step_multiple: int = 64,
) -> tuple[DatasetConfig, ...]:
    """Return the datasets of --dataset_config, or else of --in_json, or of --train_data_dir and --reg_data_dir.

    Args:
        dataset: the dataset options; like the other three, what the file leaves open.
        captions: the caption options.
        masks: the mask options.
        validation: the validation options; None: nothing is held back unless the file says so.
        bucket_step_multiple: what bucket_reso_steps must be a multiple of: 64 for SD 1.x and 2.x, 32 for SDXL and SD3.

    Raises:
        OptionError: a key is unknown or wrong, or values contradict each other.
        DataError: a file or folder is missing.
    """
    command_line = _command_line(dataset, (captions, masks, *(() if validation is None else (validation,))))
    if dataset.dataset_class is not None:
        table = Level("--dataset_class", {"image_dir": Path(dataset.dataset_class)})
        own = {"alpha_mask": False, "conditioning_data_dir": None, "validation_split": 0.0}  # for files only
        level = Level("command line", {key: value for key, value in command_line.values.items() if key not in own})
        return (_resolve_dataset("command line", [table], (level,), dataset.prior_loss_weight, bucket_step_multiple),)
    if dataset.dataset_config is None:
        of_command_line = _from_metadata_file if dataset.in_json else _from_folders
        return (of_command_line(dataset, command_line, bucket_step_multiple),)
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        if getattr(dataset, name):
            log.warning("--%s has no effect: --dataset_config names the images", name)
    return _from_file(Path(dataset.dataset_config), command_line, dataset.prior_loss_weight, bucket_step_multiple)


def _command_line(dataset: DatasetOptions, others: Sequence[Any]) -> Level:
    own_names = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
    given = {name: value for group in (dataset, *others) for name, value in vars(group).items()}
    given |= {"batch_size": dataset.train_batch_size, "num_repeats": dataset.dataset_repeats}
    values: dict[str, Any] = {}
    for key in (*DATASET_KEYS, *SUBSET_KEYS):
        if given.get(key) is not None:
            reader = DATASET_KEYS.get(key) or SUBSET_KEYS[key]
            values[key] = read_value(f"--{own_names.get(key, key)}", given[key], reader)
    return Level("command line", values)


def _from_file(
    source: Path, command_line: Level, prior_loss_weight: float, bucket_step_multiple: int
) -> tuple[DatasetConfig, ...]:
    content = _parse(source)
    for key in content:
        if key not in ("general", "datasets"):
            raise OptionError(
                f"{source}: {as_written(key)} cannot stand at the top; only [general] and [[datasets]] can."
                f"{did_you_mean(key, ('general', 'datasets'))}"
            )
    inheritable = {**DATASET_KEYS, **SUBSET_KEYS}
    general = read_table(source, "general", content.get("general", {}), inheritable)
    datasets = content.get("datasets", [])
    if isinstance(datasets, dict):  # [[datasets.subsets]] with no [[datasets]] above it
        datasets = [datasets]
    if not isinstance(datasets, list) or not datasets:
        raise OptionError(f"{source}: there is no [[datasets]] with [[datasets.subsets]] in it.")

    configs = []
    for number, table in enumerate(datasets):
        place = f"datasets[{number}]"
        if not isinstance(table, dict):
            raise OptionError(f"{source}: {place} must be a table, got {table!r}.")
        own = {key: value for key, value in table.items() if key != "subsets"}
        level = read_table(source, place, own, inheritable)
        subsets = table.get("subsets", [])
        if not isinstance(subsets, list) or not subsets:
            raise OptionError(f"{source}: {place} has no [[datasets.subsets]]. Add one with image_dir.")
        inherited = (level, general, command_line)
        tables = [_read_subset(source, f"{place}.subsets[{i}]", subset, inherited) for i, subset in enumerate(subsets)]
        configs.append(
            _resolve_dataset(f"{source}: {place}", tables, inherited, prior_loss_weight, bucket_step_multiple)
        )
    return tuple(configs)


def _parse(source: Path) -> dict[str, Any]:
    suffix = source.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise OptionError(f"--dataset_config must be a .toml or .json file, got {source}.")
    content = read_toml(source) if suffix == ".toml" else _read_json(source)
    if not isinstance(content, dict):
        raise OptionError(f"{source}: must hold a table with general and datasets, got {type(content).__name__}.")
    return content


def _read_json(source: Path) -> Any:
    try:
        return json.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"{source}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise OptionError(f"{source}: is not valid JSON in UTF-8: {error}.") from None


def _read_subset(source: Path, place: str, table: Any, inherited: Sequence[Level]) -> Level:
    level = read_table(source, place, table, {**SUBSET_KEYS, **SUBSET_ONLY_KEYS})
    has_file = level.values.get("metadata_file") is not None
    if not has_file and level.values.get("image_dir") is None:
        raise OptionError(f"{source}: {place} has no image_dir. Name the folder of the images, or a metadata_file.")
    for key in ("caption_extension", "cache_info"):
        is_of_masks = key == "caption_extension" and _find("mask_captions", (level, *inherited))
        if has_file and key in level.values and not is_of_masks:
            log.warning("%s: %s.%s has no effect with metadata_file", source, place, key)
    return level


def _resolve_dataset(
    place: str, tables: Sequence[Level], inherited: Sequence[Level], prior_loss_weight: float, bucket_step_multiple: int
) -> DatasetConfig:
    values = {key: value for key in DATASET_KEYS if (value := _find(key, inherited)) is not None}
    if values.get("network_multiplier", 1) != 1:
        log.warning("%s: network_multiplier has no effect", place)
    if "resolution" not in values:
        raise OptionError(f"{place} has no resolution. Set resolution = 512 there, or --resolution=512.")
    is_bucketed = values.get("enable_bucket", False)
    subsets: list[SubsetConfig] = []
    seen: set[tuple[Path | None, ...]] = set()
    for index, table in enumerate(tables):
        subset = _resolve_subset(table, index, inherited, is_bucketed=is_bucketed)
        folders = (subset.image_dir, subset.conditioning_data_dir, subset.metadata_file)
        if subset.num_repeats < 1:
            log.warning("%s.subsets[%d] is left out: num_repeats is %d", place, index, subset.num_repeats)
        elif folders in seen:
            log.warning("%s.subsets[%d] is left out: %s is listed before", place, index, subset.source)
        else:
            seen.add(folders)
            subsets.append(subset)
    if not subsets:
        raise OptionError(f"{place} has no subset with num_repeats of 1 or more.")
    known = {field.name for field in fields(DatasetConfig)}
    config = DatasetConfig(
        subsets=tuple(subsets),
        prior_loss_weight=prior_loss_weight,
        resize_interpolation=_find("resize_interpolation", inherited),
        **{key: value for key, value in values.items() if key in known},
    )
    return _with_valid_sizes(place, config, bucket_step_multiple)


def _find(key: str, levels: Sequence[Level]) -> Any:
    return next((level.values[key] for level in levels if key in level.values), None)


def _resolve_subset(table: Level, index: int, inherited: Sequence[Level], *, is_bucketed: bool) -> SubsetConfig:
    levels = (table, *inherited)
    values: dict[str, Any] = {
        key: value for key in (*SUBSET_KEYS, "is_reg", "metadata_file") if (value := _find(key, levels)) is not None
    }
    values |= values.pop("custom_attributes", {})
    if is_bucketed and values.pop("face_crop_aug_range", None):
        log.warning("%s: face_crop_aug_range has no effect with enable_bucket", table.place)
    share = values.get("validation_split", 0)
    if not 0 <= share <= 1:
        log.warning("%s: validation_split %s is not from 0 to 1: nothing is held back", table.place, share)
    if not 0 <= share <= 1 or table.values.get("is_reg"):
        values["validation_split"] = 0.0
    image_dir = table.values.get("image_dir")
    if image_dir is None:  # only with a metadata file
        image_dir = values["metadata_file"].parent
    subset = SubsetConfig(image_dir=image_dir, index=index, **values)
    mask_settings.check(table.place, subset)
    cut_settings.check(table.place, subset)
    return subset


def _with_valid_sizes(place: str, config: DatasetConfig, bucket_step_multiple: int) -> DatasetConfig:
    """Return config with sizes that can be trained; OptionError where they contradict each other."""
    changed: dict[str, Any] = {}
    width, height = config.resolution
    if not config.enable_bucket:
        floored = (width // 8 * 8, height // 8 * 8)
        if floored != config.resolution:
            log.warning("%s: resolution %dx%d becomes %dx%d, multiples of 8", place, width, height, *floored)
            changed["resolution"] = floored
        return replace(config, **changed)

    step = config.bucket_reso_steps
    if step % bucket_step_multiple:
        raise OptionError(
            f"{place}: bucket_reso_steps must be a multiple of {bucket_step_multiple} for this model, got {step}."
        )
    shortest, longest = buckets.rounded_limits(config.min_bucket_reso, config.max_bucket_reso, step)
    if (shortest, longest) != (config.min_bucket_reso, config.max_bucket_reso):
        log.warning(
            "%s: min_bucket_reso %d and max_bucket_reso %d become %d and %d, multiples of bucket_reso_steps %d",
            *(place, config.min_bucket_reso, config.max_bucket_reso, shortest, longest, step),
        )
        changed = {"min_bucket_reso": shortest, "max_bucket_reso": longest}
    if not config.bucket_no_upscale:
        if not 0 < shortest <= min(width, height):
            raise OptionError(
                f"{place}: min_bucket_reso must be from {step} to the shorter side of the resolution "
                f"{width}x{height}, got {config.min_bucket_reso}."
            )
        if longest < max(width, height):
            raise OptionError(
                f"{place}: max_bucket_reso must be at least the longer side of the resolution {width}x{height}, "
                f"got {config.max_bucket_reso}."
            )
    return replace(config, **changed)


def _from_folders(dataset: DatasetOptions, command_line: Level, bucket_step_multiple: int) -> DatasetConfig:
    """Return the one dataset of the folder scheme: sub-folders named <repeats>_<class words>."""
    if not dataset.train_data_dir:
        raise OptionError("There is no dataset: give --dataset_config=FILE or --train_data_dir=FOLDER.")
    tables = _folder_subsets("train_data_dir", Path(dataset.train_data_dir), is_reg=False)
    if not tables:
        folder = Path(dataset.train_data_dir)
        hint = ""
        if folder.name.partition("_")[0].isdecimal():
            hint = f" It looks like one itself: give the folder that it lies in, {folder.parent}."
        elif any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir()):
            hint = f" Move its images into one, or name {folder} as image_dir in a dataset config."
        named = "<repeats>_<class words>, like 10_cat"
        raise DataError(f"--train_data_dir {folder} has no sub-folder named {named}.{hint}")
    if dataset.reg_data_dir:
        tables += _folder_subsets("reg_data_dir", Path(dataset.reg_data_dir), is_reg=True)
    return _resolve_dataset("command line", tables, (command_line,), dataset.prior_loss_weight, bucket_step_multiple)


def _from_metadata_file(dataset: DatasetOptions, command_line: Level, bucket_step_multiple: int) -> DatasetConfig:
    """Return the one dataset of --in_json, whose relative names start at --train_data_dir."""
    if dataset.reg_data_dir:
        log.warning("--reg_data_dir has no effect: --in_json names the images")
    folder = Path(dataset.train_data_dir) if dataset.train_data_dir else None
    table = Level("--in_json", {"metadata_file": Path(dataset.in_json or ""), "image_dir": folder})
    return _resolve_dataset("command line", [table], (command_line,), dataset.prior_loss_weight, bucket_step_multiple)


def _folder_subsets(option: str, parent: Path, *, is_reg: bool) -> list[Level]:
    if not parent.is_dir():
        raise DataError(f"--{option}: there is no folder {parent}.")
    levels = []
    for folder in sorted(entry for entry in parent.iterdir() if entry.is_dir()):
        repeats, _, class_tokens = folder.name.partition("_")
        try:
            num_repeats = int(repeats)
        except ValueError:
            log.warning("%s is left out: its name does not begin with a number of repeats, like 10_cat", folder)
            continue
        if num_repeats > 0:
            values = {"image_dir": folder, "num_repeats": num_repeats, "class_tokens": class_tokens, "is_reg": is_reg}
            levels.append(Level(str(folder), values))
    return levels
