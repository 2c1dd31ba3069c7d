"""A sheet for looking over padded copies: each picture as it was and as it is now, with its mask over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from library.dataset import contact_sheet, files, images, padded_copies
from library.dataset.geometry import Pixels
from library.dataset.padded_copies import PaddedCopy
from library.errors import DataError
from library.whole_file import whole_file

MOST_COPIES = 60  # on one sheet
SIDE, GAP, LINE = 208, 8, 18
COLUMNS = 2  # copies in a row
TEXT_SIZE = 13


def draw(copies: Sequence[PaddedCopy], path: Path) -> Path:
    """Write a PNG of copies, or of as many spread over them as fit, and return its path.

    Of each: the picture as it was, red where its mask hides it; the copy; the copy, red where its mask hides it.

    Raises: DataError if a copy cannot be read or the sheet not be written.
    """
    chosen = copies[:: math.ceil(len(copies) / MOST_COPIES)]
    cells = files.read_all(_cell, chosen, label="sheet")
    columns = min(COLUMNS, len(chosen))
    width, height = 3 * (SIDE + GAP) + 2 * GAP, SIDE + LINE + 2 * GAP
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + LINE + GAP), contact_sheet.BACKGROUND)
    of_all = f"{len(chosen)} of {len(copies)} copies. " if len(chosen) < len(copies) else ""
    title = f"{of_all}Before; after; after with its mask: red is not learnt."
    ImageDraw.Draw(sheet).text((GAP, GAP // 2), title, contact_sheet.INK, ImageFont.load_default(TEXT_SIZE))
    for number, cell in enumerate(cells):
        if isinstance(cell, DataError):
            raise cell
        row, column = divmod(number, columns)
        sheet.paste(cell, (GAP + column * width, LINE + GAP + row * height))
    try:
        with whole_file(path) as partial:
            sheet.save(partial, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: the sheet cannot be written ({error.strerror or error}).") from None
    return path


def _cell(copy: PaddedCopy) -> Image.Image:
    before, mask_before = padded_copies.read(copy.original)
    after = images.read_image(copy.picture, want_alpha=copy.mask is None)
    mask_after = after.alpha if copy.mask is None else images.read_mask(copy.mask)
    cell = Image.new("RGB", (3 * SIDE + 3 * GAP, SIDE + LINE), contact_sheet.BACKGROUND)
    shown = (_veiled(before.rgb, mask_before), after.rgb, _veiled(after.rgb, mask_after))
    for number, pixels in enumerate(shown):
        picture = ImageOps.contain(Image.fromarray(pixels), (SIDE, SIDE), Image.Resampling.LANCZOS)
        left = number * (SIDE + GAP) + (number > 0) * GAP + (SIDE - picture.width) // 2
        cell.paste(picture, (left, (SIDE - picture.height) // 2))
    text = f"{copy.picture.name}  {after.rgb.shape[1]}x{after.rgb.shape[0]}"
    ImageDraw.Draw(cell).text((0, SIDE + 2), text, contact_sheet.INK, ImageFont.load_default(TEXT_SIZE))
    return cell


def _veiled(pixels: Pixels, mask: Pixels | None) -> Pixels:
    return pixels if mask is None else contact_sheet.veiled(pixels, (mask / np.float32(255)).astype(np.float32))
