"""The review sheet: each picture, its mask, and the picture with what is masked out under a veil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from library.dataset import contact_sheet, files, images
from library.dataset.contact_sheet import BACKGROUND, GAP, INK, LINE_HEIGHT, PALE_INK, TEXT_SIZE
from library.errors import DataError
from library.mask_making.making import Outcome
from library.mask_making.summary import is_suspicious
from library.whole_file import whole_file

MOST_PICTURES = 60  # on the sheet
SIDE = 240  # longest side of a picture on the sheet, pixels
COLUMNS = 2  # pictures side by side, each three times
CHECKS = 12  # side of the squares under transparent pixels
CHECK_GREYS = (150, 190)
ALERT = (255, 170, 60)


def chosen(outcomes: Sequence[Outcome], most: int = MOST_PICTURES) -> list[Outcome]:
    """Return what to show of the masks that are there, in order: all suspicious ones, and some spread over the rest."""
    there = sorted((each for each in outcomes if each.state != "failed"), key=lambda each: each.job.name)
    doubtful = [each for each in there if is_suspicious(each)][:most]
    rest = [each for each in there if not is_suspicious(each)]
    room = most - len(doubtful)
    spread = rest[:: math.ceil(len(rest) / room)] if room and rest else []
    return sorted([*doubtful, *spread], key=lambda each: (not is_suspicious(each), each.job.name))


def draw(outcomes: Sequence[Outcome], path: Path, *, columns: int = COLUMNS, side: int = SIDE) -> list[str]:
    """Write the sheet, and return why any picture is not on it. Raises: DataError if it cannot be written."""
    shown = chosen(outcomes)
    cells = files.read_all(partial(_cell, side=side), shown, label="sheet")
    parts = [cell for cell in cells if isinstance(cell, Image.Image)]
    there = sum(each.state != "failed" for each in outcomes)
    heading = LINE_HEIGHT + GAP
    columns = max(1, min(columns, len(parts)))
    width = 3 * side + 2 * GAP
    rows = [parts[start : start + columns] for start in range(0, len(parts), columns)]
    height = sum(max(cell.height for cell in row) + GAP for row in rows)
    sheet = Image.new("RGB", (columns * (width + 2 * GAP) + GAP, heading + height + GAP), BACKGROUND)
    title = "Picture, mask (white is learnt), and the picture: red is not learnt."
    if len(parts) < there:
        title = f"{len(parts)} of {there} masks, the doubtful ones first. {title}"
    ImageDraw.Draw(sheet).text((GAP, GAP // 2), title, INK, _font())
    top = heading
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * (width + 2 * GAP), top))
        top += max(cell.height for cell in row) + GAP
    try:
        with whole_file(path) as partial_path:
            sheet.save(partial_path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: the sheet cannot be written ({error.strerror or error}).") from None
    return [str(cell) for cell in cells if isinstance(cell, DataError)]


def _cell(outcome: Outcome, *, side: int) -> Image.Image:
    decoded = images.read_image(outcome.job.picture, want_alpha=True)
    mask = images.read_mask(outcome.job.mask)
    learnt = float(mask.mean()) / 255
    fitting = partial(ImageOps.contain, size=(side, side), method=Image.Resampling.LANCZOS)
    small = fitting(Image.fromarray(decoded.rgb))
    if decoded.alpha is not None:
        opaque = Image.fromarray(decoded.alpha).resize(small.size, Image.Resampling.BOX)
        small = Image.composite(small, _checks(small.size), opaque)
    # BOX keeps the share of a thin line; it is also how a mask comes to latent size
    grey = Image.fromarray(mask).resize(small.size, Image.Resampling.BOX)
    veiled = contact_sheet.veiled(np.asarray(small), np.asarray(grey, np.float32) / np.float32(255))
    cell = Image.new("RGB", (3 * side + 2 * GAP, small.height + 2 * LINE_HEIGHT + GAP), BACKGROUND)
    for number, part in enumerate((small, grey.convert("RGB"), Image.fromarray(veiled))):
        left = number * (side + GAP) + (side - part.width) // 2
        cell.paste(part, (left, 0))
    canvas = ImageDraw.Draw(cell)
    height, width = mask.shape
    canvas.text((0, small.height + 4), _cut(f"{outcome.job.name}  {width}x{height}", cell.width), INK, _font())
    words = [f"{learnt:.1%} is learnt", outcome.fault, outcome.doubt, "kept" * (outcome.state == "kept")]
    ink = ALERT if is_suspicious(outcome) else PALE_INK
    text = ", ".join(filter(None, words))
    canvas.text((0, small.height + 4 + LINE_HEIGHT), _cut(text, cell.width), ink, _font())
    return cell


def _checks(size: tuple[int, int]) -> Image.Image:
    rows, columns = np.indices(size[::-1]) // CHECKS
    grey = np.array(CHECK_GREYS, np.uint8)[(rows + columns) % 2]
    return Image.fromarray(np.dstack((grey, grey, grey)))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT_SIZE)


def _cut(text: str, width: int) -> str:
    """Return text, or as much of its beginning as fits into width pixels."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
