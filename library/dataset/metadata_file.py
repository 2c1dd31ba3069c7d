"""The fine-tuning kind of subset: one file that lists the images and their captions, instead of a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.dataset.problems import listed
from library.errors import DataError

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig
    from library.dataset.geometry import Size

KEYS = ("image_path", "caption", "tags", "image_size")


@dataclass(frozen=True)
class Entry:
    """One image of the file."""

    path: Path
    captions: tuple[str, ...] | None  # lines, one unless wildcards are on; None if the entry has no text
    size: Size | None  # as the file says, which may be out of date


@dataclass(frozen=True)
class Content:
    """What the file lists, in its order."""

    entries: tuple[Entry, ...]
    unknown_keys: tuple[str, ...]  # of entries, which are not looked at, by name
    repeated: tuple[Path, ...]  # images that several entries name; the last counts


def read(file: Path, subset: SubsetConfig) -> Content:
    """Return the images that a metadata file lists, with their captions.

    Args:
        file: an object of JSON, image name: entry; or JSONL, where each line is an entry with an image_path.
        subset: whose image_dir relative names start at.

    Raises: DataError naming the line, or the entry, that cannot be used.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 (at byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"metadata_file: {file}: cannot be read ({error.strerror or error}).") from None
    found = list(_lines(file, text) if file.suffix.lower() == ".jsonl" else _object(file, text))
    unknown: Counter[str] = Counter()
    entries: dict[Path, Entry] = {}
    repeated = []
    for place, name, fields in found:
        unknown.update(str(key) for key in fields if key not in KEYS)
        entry = _entry(place, name, fields, subset)
        if entry.path in entries:
            repeated.append(entry.path)
        entries[entry.path] = entry
    return Content(tuple(entries.values()), tuple(sorted(unknown)), tuple(dict.fromkeys(repeated)))


def _object(file: Path, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (place for messages, image name, fields) of a JSON object."""
    content = _parsed(file, text, first_line=1)
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold an object {{image name: entry}}, not a {type(content).__name__}.")
    for name, fields in content.items():
        place = f'{file}: "{name}"'
        if not isinstance(fields, dict):
            raise DataError(f'{place}: must be an object with "caption" or "tags", got {fields!r}.')
        yield place, name, fields


def _lines(file: Path, text: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (place for messages, image name, fields) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 in a caption
        if not line.strip():
            continue
        place = f"{file}: line {number}"
        fields = _parsed(file, line, first_line=number)
        if not isinstance(fields, dict):
            raise DataError(f'{place}: must be an object with "image_path", got {fields!r}.')
        name = fields.get("image_path")
        if not isinstance(name, str) or not name:
            raise DataError(f'{place}: has no "image_path". Name the image there.')
        yield place, name, fields


def _parsed(file: Path, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = " A file with an entry on each line must end in .jsonl." if error.msg == "Extra data" else ""
        if file.suffix.lower() == ".jsonl" and first_line == 1:
            hint = " Each line must be an entry; a file that is one object must end in .json."
        raise DataError(f"{file}: line {line}, column {error.colno}: is not valid JSON ({error.msg}).{hint}") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        raise DataError(f"{file}: is not valid JSON ({reason}).") from None


def _entry(place: str, name: str, fields: Mapping[str, Any], subset: SubsetConfig) -> Entry:
    caption, tags = (_text(place, key, fields.get(key)) for key in ("caption", "tags"))
    path = subset.image_dir / name  # an absolute name stays as it is
    return Entry(path, _captions(caption, tags, subset), _size(place, fields.get("image_size")))


def _text(place: str, key: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {key} must be a string, got {value!r}.")
    # half a character, which programs leave that cut texts to a length, could not be tokenized
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _size(place: str, value: Any) -> Size | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(side) is not int or side < 1 for side in value):
        raise DataError(f"{place}: image_size must be [width, height] in pixels, got {value!r}.")
    return value[0], value[1]


def _captions(caption: str, tags: str, subset: SubsetConfig) -> tuple[str, ...] | None:
    """Return caption + caption_separator + tags, by caption line; None where both are blank."""
    lines = _filled(caption.split("\n"))
    joined_tags = subset.caption_separator.join(_filled(tags.split("\n")))
    if not subset.enable_wildcard:
        lines = lines[:1]  # as of a caption file
    if not joined_tags:
        return tuple(lines) or None
    # Not so in sd-scripts, where tags are lost behind a line break and, with wildcards, without a caption.
    return tuple(f"{line}{subset.caption_separator}{joined_tags}" for line in lines) or (joined_tags,)


def _filled(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


def warnings(content: Content, file: Path) -> Iterator[str]:
    """Yield a line for what stands in the file but has no effect."""
    if content.unknown_keys:
        yield f"{file}: keys of entries that have no effect: {listed(content.unknown_keys)}."
    if content.repeated:
        names = listed([path.name for path in content.repeated])
        yield f"{file}: {len(content.repeated)} images are listed more than once, the last counts: {names}."
