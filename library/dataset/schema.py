"""The keys of a dataset config: where each may stand, what it may hold, and how a wrong one is reported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import OptionError, did_you_mean
from library.options.masks import FILLS
from library.options.toml import BACKSLASHES, has_control_character
from library.options.values import read_range

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
MISSING_MASK_RULES = ("error", "train_all", "skip")

Reader = Callable[[Any], Any]
"""Returns the value in its final type, or raises ValueError saying what was expected, and perhaps what was meant."""


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _separator(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a string of at least one character")
    return value


def _path(value: Any) -> Path | None:
    if not isinstance(value, (str, Path)):
        raise ValueError("a path as a string")
    if has_control_character(str(value)):
        raise ValueError(f"a path without special characters ({BACKSLASHES.rstrip('.')})")
    return Path(value) if str(value) else None


def _extension(value: Any) -> str:
    text = _separator(value)
    return text if text.startswith(".") else f".{text}"


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a table")
    return value


def _whole(least: int) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or value < least:
            raise ValueError(f"a whole number of at least {least}")
        return value

    return read


def _whole_of_any_sign(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("a whole number")
    return value


def _number(least: float, most: float, expected: str) -> Reader:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(expected)
        if not least <= value <= most:
            raise ValueError(expected)
        return value

    return read


def _choice(choices: tuple[str, ...]) -> Reader:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}", did_you_mean(str(value), choices))
        return str(value)

    return read


def _list_of(choices: tuple[str, ...]) -> Reader:
    def read(value: Any) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not items or any(item not in choices for item in items):
            wrong = next((item for item in items if item not in choices), "") if isinstance(items, list | tuple) else ""
            raise ValueError(f"one or several of {', '.join(choices)}", did_you_mean(str(wrong), choices))
        return tuple(items)

    return read


def _tags(value: Any) -> tuple[str | tuple[str, str], ...]:
    """Return tags, or (tag, label) of each."""
    expected = 'a list of tags, or a table of tags with the label of each, like {hat = "3"}'
    if isinstance(value, dict):
        labels = {tag.strip(): str(label).strip().lower() for tag, label in value.items()}
        if not all(labels) or any(isinstance(label, bool) for label in value.values()):
            raise ValueError(expected)
        if not all(map(_is_label, labels.values())):
            raise ValueError(f"{expected}; a label is a number from 0 to 255, a colour like #ff0000, or other")
        return tuple(labels.items())
    if not isinstance(value, list | tuple) or any(not isinstance(tag, str) or not tag.strip() for tag in value):
        raise ValueError(expected)
    return tuple(tag.strip() for tag in value)


def _is_label(name: str) -> bool:
    return name == "other" or (name.isdecimal() and int(name) < 256) or re.fullmatch("#[0-9a-f]{6}", name) is not None


def _labels(value: Any) -> tuple[tuple[str, float], ...]:
    """Return the weights of a label map, by label: a palette's number, a colour like #ff0000, or other."""
    expected = 'a table of weights from 0 to 1 by label, like {"1" = 1.0, "#ff0000" = 0.5, other = 0.0}'
    if not isinstance(value, dict) or not value:
        raise ValueError(expected)
    read = {}
    for label, weight in value.items():
        name = str(label).strip().lower()
        if (
            not _is_label(name)
            or isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 <= weight <= 1
        ):
            raise ValueError(expected)
        read[name] = float(weight)
    return tuple(sorted(read.items()))


def read_resolution(value: Any) -> tuple[int, int]:
    """Return (width, height) of 512, "512", [768, 512] or "768,512"; ValueError says what was expected."""
    expected = 'a size like 512, or width and height like [768, 512] or "768,512", each at least 8'
    sides = value.split(",") if isinstance(value, str) else value
    sides = [sides] if type(sides) is int else sides
    try:
        numbers = [int(side) if isinstance(side, str) else side for side in sides]
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if len(numbers) not in (1, 2) or any(type(number) is not int or number < 8 for number in numbers):
        raise ValueError(expected)
    return numbers[0], numbers[-1]


_share = _number(0, 1, "a number from 0 to 1")
_pixels = _number(0, 512, "a number of pixels from 0 to 512")
_not_negative = _number(0, float("inf"), "a number of at least 0")
_any_number = _number(float("-inf"), float("inf"), "a number")

DATASET_KEYS: Mapping[str, Reader] = {
    "resolution": read_resolution,
    "batch_size": _whole(1),
    "enable_bucket": _flag,
    "min_bucket_reso": _whole(1),
    "max_bucket_reso": _whole(1),
    "bucket_reso_steps": _whole(8),
    "bucket_no_upscale": _flag,
    "network_multiplier": _any_number,
}
"""Keys of [general] and [[datasets]]."""

SUBSET_KEYS: Mapping[str, Reader] = {
    "num_repeats": _whole_of_any_sign,
    "shuffle_caption": _flag,
    "enable_wildcard": _flag,
    "color_aug": _flag,
    "flip_aug": _flag,
    "random_crop": _flag,
    "caption_separator": _separator,
    "keep_tokens": _whole(0),
    "keep_tokens_separator": _text,
    "secondary_separator": _text,
    "caption_prefix": _text,
    "caption_suffix": _text,
    "face_crop_aug_range": read_range,
    "token_warmup_min": _whole(0),
    "token_warmup_step": _not_negative,
    "caption_dropout_rate": _share,
    "caption_tag_dropout_rate": _share,
    "caption_dropout_every_n_epochs": _whole(0),
    "custom_attributes": _table,
    "caption_extension": _extension,
    "cache_info": _flag,
    "class_tokens": _text,
    "resize_interpolation": _choice(INTERPOLATIONS),
    "alpha_mask": _flag,
    "conditioning_data_dir": _path,
    "missing_mask": _choice(MISSING_MASK_RULES),
    "mask_fill": _list_of(FILLS),
    "mask_labels": _labels,
    "mask_invert": _flag,
    "mask_erode": _pixels,
    "mask_dilate": _pixels,
    "mask_feather": _pixels,
    "mask_weight_min": _share,
    "mask_area_norm": _share,
    "mask_area_floor": _number(1e-6, 1, "a number above 0, at most 1"),
    "unmasked_probability": _share,
    "mask_prior_weight": _not_negative,
    "mask_drop_tags": _tags,
    "mask_captions": _flag,
    "mask_aware_crop": _flag,
    "mask_aware_zoom": _number(1, float("inf"), "a number of at least 1"),
    "random_placement": _flag,
    "placement_scale": read_range,
    "placement_rotate": _number(0, 180, "degrees from 0 to 180"),
    "placement_variants": _whole(1),
    "validation_split": _any_number,
    "validation_seed": _whole_of_any_sign,
}
"""Keys of [general], [[datasets]] and [[datasets.subsets]]."""

SUBSET_ONLY_KEYS: Mapping[str, Reader] = {"image_dir": _path, "is_reg": _flag, "metadata_file": _path}

ATTRIBUTES: Mapping[str, Reader] = {"diff_output_preservation": _flag}
"""Keys of custom_attributes."""

COMMAND_LINE_KEYS = ("prior_loss_weight", "debug_dataset", "masked_loss", "mask_prior_every", "mask_token_drop")
SYNONYMS = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "repeats": "num_repeats",
    "caption_extention": "caption_extension",
    "mask_dir": "conditioning_data_dir",
    "train_data_dir": "image_dir",
    "in_json": "metadata_file",
}


@dataclass(frozen=True)
class Level:
    """One table of the config, or the command line."""

    place: str  # "general", "datasets[0]", "datasets[0].subsets[1]"
    values: Mapping[str, Any]  # checked; without the keys that are null


def read_value(place: str, value: Any, read: Reader) -> Any:
    """Return read(value); OptionError with the place, what was expected and the value, where it does not fit."""
    try:
        return read(value)
    except ValueError as error:
        expected, hint = (*error.args, "")[:2]
        raise OptionError(f"{place} must be {expected}, got {value!r}.{hint}") from None


def read_table(source: Path, place: str, table: Any, keys: Mapping[str, Reader]) -> Level:
    """Return the table with every value checked; OptionError for an unknown key or a wrong value."""
    if not isinstance(table, dict):
        raise OptionError(f"{source}: {place} must be a table, got {table!r}.")
    values = {}
    for key, value in table.items():
        if key not in keys:
            raise OptionError(f"{source}: {place}.{as_written(key)} {_why_not(key, keys)}")
        if value is not None:
            values[key] = read_value(f"{source}: {place}.{key}", value, keys[key])
            if key == "custom_attributes":
                values[key] = _read_attributes(f"{source}: {place}.{key}", values[key])
    return Level(place, values)


def _read_attributes(place: str, table: Mapping[str, Any]) -> dict[str, Any]:
    for key in table:
        if key not in ATTRIBUTES:
            hint = did_you_mean(key, ATTRIBUTES) or f" Known: {', '.join(ATTRIBUTES)}."
            raise OptionError(f"{place}.{as_written(key)} is not a known attribute.{hint}")
    return {key: read_value(f"{place}.{key}", value, ATTRIBUTES[key]) for key, value in table.items()}


def as_written(key: str) -> str:
    """Return a key as it can stand in a message of one line."""
    return key if key.isprintable() else repr(key)


def _why_not(key: str, keys: Mapping[str, Reader]) -> str:
    if key in DATASET_KEYS:
        return "cannot be set for a subset. Move it to [[datasets]] or [general]."
    if key in SUBSET_ONLY_KEYS:
        return "can only be set for a subset. Move it to [[datasets.subsets]]."
    if key in COMMAND_LINE_KEYS:
        return f"can only be set on the command line, as --{key}."
    if SYNONYMS.get(key) in keys:
        return f"is not a key of a dataset config. Did you mean {SYNONYMS[key]}?"
    return f"is not a key of a dataset config.{did_you_mean(key, (*keys, 'subsets'))}"
