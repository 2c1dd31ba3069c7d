"""The contact sheet: each picture as training sees it, and beside it what its mask lets through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from library.dataset import captions, files, images, looks, mask_captions
from library.dataset.geometry import Pixels
from library.dataset.scan import Sample
from library.errors import DataError
from library.masks import cell_weights

MOST_PICTURES = 120  # on one sheet
SIDE = 224  # longest side of a picture on the sheet, pixels
GAP = 12
TEXT_SIZE, LINE_HEIGHT, CAPTION_LINES = 13, 17, 2
COLUMNS = 3  # pairs of pictures in a row
BACKGROUND, INK, PALE_INK = (24, 24, 27), (235, 235, 235), (160, 160, 168)
VEIL = np.array([190, 30, 60], np.float32)  # over what is not learnt
VEIL_STRENGTH = 0.78  # so that what lies under the veil can still be seen

Weights = npt.NDArray[np.float32]  # (h, w) in [0, 1]
CELL_WIDTH = 2 * SIDE + GAP
CELL_HEIGHT = SIDE + LINE_HEIGHT * (2 + CAPTION_LINES) + GAP


def draw(samples: Sequence[Sample], path: Path) -> Path:
    """Write a PNG of samples, or of as many spread over them as fit on a sheet, and return its path.

    Each has its picture in its bucket's proportions; the same under its mask, a square for each latent cell, red where
    nothing is learnt; its name and size, the source of the mask and the share that is learnt; and its caption. What
    cannot be read is left out.

    Raises: DataError if the file cannot be written.
    """
    return assemble([cell for cell in cells(samples).values() if isinstance(cell, Image.Image)], len(samples), path)


def cells(samples: Sequence[Sample]) -> dict[Sample, Image.Image | DataError]:
    """Return the pictures with text of as many samples as fit on a sheet, or why one cannot be drawn."""
    chosen = samples[:: math.ceil(len(samples) / MOST_PICTURES)] if samples else ()
    return dict(zip(chosen, files.read_all(_draw_cell, chosen, label="contact sheet"), strict=True))


def assemble(pictures: Sequence[Image.Image], num_samples: int, path: Path) -> Path:
    """Write the sheet of some pictures of num_samples and return its path. Raises: DataError if that fails."""
    columns = max(1, min(COLUMNS, len(pictures)))
    rows = -(-len(pictures) // columns)
    heading = LINE_HEIGHT + GAP
    size = (columns * (CELL_WIDTH + 2 * GAP) + GAP, rows * (CELL_HEIGHT + GAP) + heading + GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    of_all = f"{len(pictures)} of {num_samples} pictures. " if len(pictures) < num_samples else ""
    title = f"{of_all}Left: as trained. Right: red is not learnt."
    ImageDraw.Draw(sheet).text((GAP, GAP // 2), title, INK, _font())
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (GAP + column * (CELL_WIDTH + 2 * GAP), heading + row * (CELL_HEIGHT + GAP)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: the contact sheet cannot be written ({error.strerror or error}).") from None
    return path


def _draw_cell(sample: Sample) -> Image.Image:
    pixels = images.read_training_pixels(sample)
    weights = images.read_mask_weights(sample)
    if weights is not None and sample.subset.mask_weight_min:
        weights = cell_weights(weights, sample.subset.mask_weight_min, images.read_cover(sample))
    cell = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT), BACKGROUND)
    for number, part in enumerate((pixels, pixels if weights is None else veiled(pixels, weights))):
        method = Image.Resampling.LANCZOS if max(part.shape) > SIDE else Image.Resampling.NEAREST
        picture = ImageOps.contain(Image.fromarray(part), (SIDE, SIDE), method)
        left = number * (SIDE + GAP) + (SIDE - picture.width) // 2
        cell.paste(picture, (left, (SIDE - picture.height) // 2))
    canvas = ImageDraw.Draw(cell)
    size = "{}x{}".format(*sample.transform.target)
    rows = [(f"{sample.path.name}  {size}{'  regularisation' * sample.is_reg}", INK), (_share(sample, weights), INK)]
    caption = captions.preview(sample.captions, sample.subset, mask_captions.left_out(sample))
    rows += [(line, PALE_INK) for line in _wrapped(caption)]
    for number, (text, colour) in enumerate(rows):
        canvas.text((0, SIDE + 4 + number * LINE_HEIGHT), _cut(text), colour, _font())
    return cell


def veiled(pixels: Pixels, weights: Weights) -> Pixels:
    """Return pixels (H, W, 3) with a red veil over each latent cell, as dense as its weight (h, w) is low."""
    cell = (pixels.shape[0] // weights.shape[0], pixels.shape[1] // weights.shape[1])
    density = (1 - np.kron(weights, np.ones(cell, np.float32)))[..., None] * VEIL_STRENGTH
    return np.rint(pixels * (1 - density) + VEIL * density).astype(np.uint8)


def _share(sample: Sample, weights: Weights | None) -> str:
    if weights is None:
        return "no mask: all is learnt"
    source = {"alpha": "alpha channel", "padding": "none, but for the free canvas"}.get(
        sample.mask.kind, "of the class"
    )
    if sample.mask.path is not None:
        source = sample.mask.path.name
    fills = [fill.kind for fill in looks.fills_of(sample)]
    filled = "" if set(fills) == {"keep"} else f", fill: {', '.join(dict.fromkeys(fills))}"
    return f"{weights.mean():.0%} is learnt, mask: {source}{filled}"


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT_SIZE)


def _cut(text: str) -> str:
    """Return text, or as much of its beginning as fits under a pair of pictures."""
    if _font().getlength(text) <= CELL_WIDTH:
        return text
    while text and _font().getlength(text + "…") > CELL_WIDTH:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str) -> list[str]:
    """Return text in as many lines as a caption may have; what is too much stays in the last, to be cut there."""
    lines: list[str] = []
    for word in text.split():
        if lines and (len(lines) == CAPTION_LINES or _font().getlength(f"{lines[-1]} {word}") <= CELL_WIDTH):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
