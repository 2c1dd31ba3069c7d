"""Prompt files: what the preview pictures show, one SamplePrompt a picture."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import DataError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

SIDE, SIDE_STEP, MIN_SIDE, MAX_STEPS = 512, 8, 64, 1000


@dataclass(frozen=True)
class SamplePrompt:
    """One preview picture."""

    prompt: str
    negative_prompt: str = ""
    width: int = SIDE  # pixels, a multiple of 8
    height: int = SIDE
    sample_steps: int = 30
    scale: float = 7.5  # classifier-free guidance; 1 switches it off
    seed: int | None = None  # None: another picture each time
    sample_sampler: str | None = None  # None: --sample_sampler


def _side(value: Any) -> int:
    return max(MIN_SIDE, int(value) // SIDE_STEP * SIDE_STEP)


def _steps(value: Any) -> int:
    return min(max(int(value), 1), MAX_STEPS)


def _scale(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.strip()


FLAGS: Mapping[str, str] = {  # flag of a text line -> key in TOML and JSON, field of SamplePrompt
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
}
OTHER_MODELS: Mapping[str, str] = {  # of prompt files that are shared with other models' trainings
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "controlnet_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (_text, "a text"),
    "negative_prompt": (_text, "a text"),
    "width": (_side, "a whole number of pixels"),
    "height": (_side, "a whole number of pixels"),
    "sample_steps": (_steps, "a whole number"),
    "scale": (_scale, "a number"),
    "seed": (int, "a whole number"),
    "sample_sampler": (_text, "a sampler's name"),
}


def read_prompts(path: Path, side: int = SIDE) -> list[SamplePrompt]:
    """Return the prompts of a .txt, .toml or .json file, in order; side is the width and height where none is named.

    .txt: a prompt a line with flags after it ('a cat --w 768 --d 5'); empty lines and lines with # are skipped.
    .toml: [prompt] with defaults and [[prompt.subset]], one a picture. .json: a list of such lines or of objects.
    Raises: DataError with file and line when the file is missing, empty or has a wrong value.
    """
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"--sample_prompts {path}: the file must end in .txt, .toml or .json.")
    try:
        prompts = reader(path, side)
    except FileNotFoundError as error:
        raise DataError(f"--sample_prompts {path}: there is no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--sample_prompts {path}: the file is not UTF-8 text.") from error
    except OSError as error:
        raise DataError(f"--sample_prompts {path}: {error.strerror}.") from error
    if not prompts:
        raise DataError(f"--sample_prompts {path}: no prompt in it. Write one prompt a line.")
    return prompts


def parse_line(line: str, place: str, side: int = SIDE) -> SamplePrompt:
    """Return the prompt of one line; flags are only what follows a space and two dashes.

    Args:
        line: 'a cat --n ugly --w 512 --h 768 --d 1 --s 28 --l 7 --ss euler_a'; flags in any case and order.
        place: for messages: 'prompts.txt:3'.
        side: width and height where none is named.
    """
    text, *parts = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": text}
    for part in parts:
        flag, value = (*part.split(maxsplit=1), "")[:2]
        name = flag.lower()
        if name in OTHER_MODELS:
            log.warning("%s: --%s is for other models and changes nothing here", place, flag)
            continue
        if name not in FLAGS:  # as sd-scripts, whose other versions know more of them
            known = ", ".join(f"--{known}" for known in FLAGS)
            log.warning("%s: --%s is unknown and changes nothing. Flags are %s", place, flag, known)
            continue
        values[FLAGS[name]] = value
    return _prompt(values, place, {key: f"--{flag}" for flag, key in FLAGS.items()}, side)


def _read_text(path: Path, side: int) -> list[SamplePrompt]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [
        parse_line(line, f"{path}:{number}", side)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _read_json(path: Path, side: int) -> list[SamplePrompt]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: the file must hold a list of prompts.")
    return [_entry(entry, f"{path}: prompt {number}", side) for number, entry in enumerate(entries, start=1)]


def _read_toml(path: Path, side: int) -> list[SamplePrompt]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}.") from error
    table = content.get("prompt")
    if set(content) != {"prompt"} or not isinstance(table, dict):
        raise DataError(f"{path}: the file must hold one table [prompt] with [[prompt.subset]] entries.")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [{}] if defaults else [])
    if not isinstance(subsets, list):
        raise DataError(f"{path}: write [[prompt.subset]] with two brackets, once for each picture.")
    return [
        _entry({**defaults, **subset} if isinstance(subset, dict) else subset, f"{path}: prompt {number}", side)
        for number, subset in enumerate(subsets, start=1)
    ]


def _entry(entry: Any, place: str, side: int) -> SamplePrompt:
    """Return the prompt of one entry of a TOML or JSON file."""
    if isinstance(entry, str):
        return parse_line(entry, place, side)
    if not isinstance(entry, dict):
        raise DataError(f"{place}: must be a text or a table, got {entry!r}.")
    for key in entry:
        if key in OTHER_MODELS.values():
            log.warning("%s: %s is for other models and changes nothing here", place, key)
        elif key not in READERS:
            known = ", ".join(READERS)
            near = did_you_mean(key, READERS)
            log.warning("%s: %s is an unknown key and changes nothing.%s Keys are %s", place, key, near, known)
    return _prompt({key: value for key, value in entry.items() if key in READERS}, place, {}, side)


def _prompt(values: Mapping[str, Any], place: str, spelling: Mapping[str, str], side: int) -> SamplePrompt:
    """Return the prompt made of values, each checked; spelling says how the user wrote a key."""
    read: dict[str, Any] = {}
    for key, value in values.items():
        reader, wanted = READERS[key]
        if value is None:
            continue  # null in JSON: the default
        try:
            if isinstance(value, bool):
                raise TypeError
            read[key] = reader(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{place}: {spelling.get(key, key)} must be {wanted}, got {value!r}.") from error
    if "prompt" not in read:
        raise DataError(f"{place}: the prompt is missing.")
    return SamplePrompt(**{"width": side, "height": side, **read})
