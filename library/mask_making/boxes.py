"""Masks from a list of boxes, such as a detector or an annotation program writes, or a watermark's corner."""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from library.errors import OptionError
from library.mask_making.pictures import LEARNT, MASKED_OUT, Drawn, Picture

EVERY = "*"  # a box of this file name is in every picture
COLUMNS = ("file", "x", "y", "w", "h")
FORM = 'Each box is a file name (or *), x, y, w, h; in JSON {"file": "a.jpg", "x": 10, "y": 10, "w": 50, "h": 20}.'


@dataclass(frozen=True)
class Box:
    """A rectangle: in fractions of the picture if no number is beyond 1, else in pixels.

    A negative x or y counts from the right or the lower border.
    """

    x: float
    y: float
    w: float
    h: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) in a picture, whole pixels, all that it touches, cut at the border."""
        is_fraction = max(abs(self.x), abs(self.y), self.w, self.h) <= 1
        across, down = (width, height) if is_fraction else (1, 1)
        left = self.x * across + (width if self.x < 0 else 0)
        top = self.y * down + (height if self.y < 0 else 0)
        ends = (left + self.w * across, top + self.h * down)
        # 1e-6: 0.3 of 10 pixels is 3, whatever a float makes of it
        right, bottom = (math.ceil(end - 1e-6) for end in ends)
        start_x, start_y = math.floor(left + 1e-6), math.floor(top + 1e-6)
        return max(0, start_x), max(0, start_y), min(width, right), min(height, bottom)


BoxList = Mapping[str, tuple[Box, ...]]  # by file name


def read_boxes(path: Path) -> BoxList:
    """Return the boxes of a JSON or CSV file by file name.

    JSON: a list of objects or of lists, or an object of lists of boxes by file name. CSV: with or without a line of
    titles, separated by commas, semicolons or tabs.

    Raises: OptionError naming the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise OptionError(f"--boxes {path}: cannot be read ({reason}).") from None
    rows = list(_json_rows(text, path) if path.suffix.lower() == ".json" else _csv_rows(text))
    if not rows:
        raise OptionError(f"--boxes {path}: has no box in it. {FORM}")
    found: dict[str, list[Box]] = {}
    for number, row in rows:
        name, box = _box(row, f"--boxes {path}, {number}")
        found.setdefault(name, []).append(box)
    return {name: tuple(boxes) for name, boxes in found.items()}


def _json_rows(text: str, path: Path) -> Iterable[tuple[str, Sequence[Any]]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise OptionError(f"--boxes {path}: is no JSON ({error}).") from None
    if isinstance(content, dict):  # boxes by file name; of one box, the list around it may be missing
        entries: list[Any] = []
        for name, boxes in content.items():
            several = boxes if isinstance(boxes, list) and boxes and isinstance(boxes[0], list | dict) else [boxes]
            for box in several if boxes else ():
                entries.append({**box, "file": name} if isinstance(box, dict) else [name, *_listed(box)])
    else:
        entries = _listed(content)
    for number, entry in enumerate(entries, start=1):
        row = [entry.get(column) for column in COLUMNS] if isinstance(entry, dict) else _listed(entry)
        yield f"box {number}", row


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _csv_rows(text: str) -> Iterable[tuple[str, Sequence[Any]]]:
    lines = text.splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    separator = max(",;\t", key=first.count)
    order = list(range(len(COLUMNS)))
    has_begun = False
    for number, row in enumerate(csv.reader(lines, delimiter=separator), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        titles = [cell.lower() for cell in cells]
        if not has_begun and set(COLUMNS) <= set(titles):
            order = [titles.index(column) for column in COLUMNS]
        else:
            yield f"line {number}", [cells[at] for at in order if at < len(cells)]
        has_begun = True


def _box(row: Sequence[Any], where: str) -> tuple[str, Box]:
    """Return file name and box. Raises: OptionError."""
    if len(row) != len(COLUMNS) or not isinstance(row[0], str) or not row[0]:
        raise OptionError(f"{where}: is no box. {FORM}")
    try:
        if any(isinstance(value, bool) for value in row):
            raise ValueError
        x, y, w, h = (float(value) for value in row[1:])
        if not all(map(math.isfinite, (x, y, w, h))):
            raise ValueError
    except (TypeError, ValueError):
        said = ", ".join(str(value) for value in row[1:])
        raise OptionError(f"{where}: x, y, w and h must be numbers, got {said}.") from None
    if w <= 0 or h <= 0:
        raise OptionError(f"{where}: w and h must be above 0, got {w:g} and {h:g}.")
    return row[0].replace("\\", "/").removeprefix("./"), Box(x, y, w, h)


def boxes_of(name: str, boxes: BoxList) -> tuple[Box, ...]:
    """Return the boxes of a picture: under its path in the folder, its file name, either without ending, and of *."""
    path = PurePosixPath(name)
    keys = dict.fromkeys((name, str(path.with_suffix("")), path.name, path.stem, EVERY))
    return tuple(box for key in keys for box in boxes.get(key, ()))


def unknown_names(boxes: BoxList, names: Iterable[str]) -> list[str]:
    """Return the file names in a list of boxes that no picture has, each with the one that was perhaps meant."""
    paths = [PurePosixPath(name) for name in names]
    known = {form for path in paths for form in (str(path), str(path.with_suffix("")), path.name, path.stem)}
    unknown = [name for name in boxes if name != EVERY and name not in known]
    return [name + _meant(name, known) for name in unknown]


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
    return f" (is {near[0]} meant?)" if near else ""


def from_boxes(picture: Picture, boxes: BoxList, *, learn: bool) -> Drawn:
    """Return a mask of a picture's boxes, or of all else.

    Args:
        picture: to be masked.
        boxes: of all pictures.
        learn: the boxes are learnt; else they are masked out.
    """
    height, width = picture.rgb.shape[:2]
    own = boxes_of(picture.name, boxes)
    mask = np.full((height, width), MASKED_OUT if learn else LEARNT, np.uint8)
    outside = 0
    for box in own:
        left, top, right, bottom = box.pixels(width, height)
        outside += left >= right or top >= bottom
        mask[top:bottom, left:right] = LEARNT if learn else MASKED_OUT
    if not own:
        return Drawn(mask, "has no box in the list")
    return Drawn(mask, f"{outside} of its {len(own)} boxes lie outside of it" if outside else "")
