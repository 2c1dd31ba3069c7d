"""What the pictures of the documentation are put together from: rows of pictures with titles, and charts of lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA = ROOT / "examples" / "data"
GAP, LINE = 10, 22  # pixels
INK, PALE, GRID = (25, 25, 30), (110, 110, 118), (222, 222, 228)
HIDDEN = np.array((40, 40, 48), dtype=np.float32)  # colour of what is not learnt

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]


def photo_and_mask(name: str) -> tuple[Pixels, Pixels]:
    """Return an example photo (H, W, 3) and its mask (H, W), both cut to whole latent cells."""
    photo = np.asarray(Image.open(DATA / "photos" / f"{name}.jpg").convert("RGB"))
    mask = np.asarray(Image.open(DATA / "photos_mask" / f"{name}.png").convert("L"))
    height, width = (side // 8 * 8 for side in mask.shape)
    return np.ascontiguousarray(photo[:height, :width]), np.ascontiguousarray(mask[:height, :width])


def font(size: int = 16) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of all words."""
    return ImageFont.load_default(size)


def veiled(photo: Pixels, weights: npt.NDArray[np.float32]) -> Pixels:
    """Return a photo (H, W, 3) of which each pixel is seen as much as it weighs (H, W), the rest dark."""
    shown = photo * weights[..., None] + HIDDEN * (1 - weights[..., None])
    return shown.round().astype(np.uint8)


def tinted(photo: Pixels, share: npt.NDArray[np.float32], colour: Colour) -> Pixels:
    """Return a photo (H, W, 3), pale and grey, with a colour over it by a share (H, W) from 0 to 1."""
    grey = photo.mean(axis=2, keepdims=True) * 0.45 + 130
    strength = share[..., None] * 0.72
    mixed = grey * (1 - strength) + np.array(colour, np.float32) * strength
    return mixed.round().clip(0, 255).astype(np.uint8)


def rows(titles: Sequence[str], pictures: Sequence[Sequence[Pixels]], notes: Sequence[str] = ()) -> Image.Image:
    """Return rows of pictures of one size each, with a title over each column and a note under it."""
    heights = [row[0].shape[0] for row in pictures]
    width = max(row[0].shape[1] for row in pictures)
    total = LINE + sum(heights) + GAP * (len(pictures) - 1) + (LINE if notes else 0)
    sheet = Image.new("RGB", (len(titles) * (width + GAP) - GAP, total), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = column * (width + GAP)
        draw.text((left + width // 2, LINE // 2), title, font=font(), fill=INK, anchor="mm")
        top = LINE
        for row, height in zip(pictures, heights, strict=True):
            sheet.paste(Image.fromarray(row[column]), (left + (width - row[column].shape[1]) // 2, top))
            top += height + GAP
        if notes:
            draw.text((left + width // 2, total - LINE // 2), notes[column], font=font(14), fill=PALE, anchor="mm")
    return sheet


def beside(*parts: Image.Image) -> Image.Image:
    """Return pictures side by side, in the middle of the tallest."""
    height = max(part.height for part in parts)
    sheet = Image.new("RGB", (sum(part.width for part in parts) + GAP * (len(parts) - 1), height), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, (height - part.height) // 2))
        left += part.width + GAP
    return sheet


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    name: str
    ticks: Mapping[str, float]  # word: where it stands, in the values of the lines
    scale: Callable[[float], float] = float  # of the values, to what is drawn evenly


@dataclass(frozen=True)
class Line:
    """A line of a chart, with its name at the place where there is room for it."""

    points: Sequence[tuple[float, float]]
    colour: Colour
    name: str = ""
    name_at: tuple[float, float] | None = None
    width: int = 3


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line], size: tuple[int, int] = (500, 320)) -> Image.Image:
    """Return a chart of lines. The first and the last tick of an axis are its ends."""
    width, height = size
    left, top, right, bottom = 66, LINE + 12, width - 26, height - 50
    twice = 2  # drawn at twice its size and shrunk, for smooth lines
    sheet = Image.new("RGB", (width * twice, height * twice), "white")
    draw = ImageDraw.Draw(sheet)

    def at(axis: Axis, value: float, start: float, end: float) -> float:
        ends = [axis.scale(each) for each in axis.ticks.values()]
        return twice * (start + (end - start) * (axis.scale(value) - ends[0]) / (ends[-1] - ends[0]))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return at(x, point[0], left, right), at(y, point[1], bottom, top)

    def word(where: tuple[float, float], text: str, anchor: str, colour: Colour, points: int = 14) -> None:
        draw.text(where, text, font=font(points * twice), fill=colour, anchor=anchor)

    for name, value in x.ticks.items():
        across = at(x, value, left, right)
        draw.line([(across, top * twice), (across, bottom * twice)], fill=GRID, width=twice)
        word((across, (bottom + 6) * twice), name, "mt", PALE)
    for name, value in y.ticks.items():
        down = at(y, value, bottom, top)
        draw.line([(left * twice, down), (right * twice, down)], fill=GRID, width=twice)
        word(((left - 8) * twice, down), name, "rm", PALE)
    for line in lines:
        draw.line([place(point) for point in line.points], fill=line.colour, width=line.width * twice, joint="curve")
    for line in lines:
        if line.name_at is not None:
            word(place(line.name_at), line.name, "lm", line.colour, 15)
    word((left * twice, LINE // 2 * twice), title, "lm", INK, 16)
    word(((left + right) / 2 * twice, (height - 14) * twice), x.name, "mm", INK)
    sheet = sheet.resize(size, Image.Resampling.LANCZOS)
    turned = Image.new("RGB", (height, LINE), "white")
    ImageDraw.Draw(turned).text((height // 2, LINE // 2), y.name, font=font(14), fill=INK, anchor="mm")
    sheet.paste(turned.rotate(90, expand=True).crop((0, LINE, LINE, height)), (0, LINE))
    return sheet


def save(picture: Image.Image, name: str, colours: int = 160) -> None:
    """Write a picture beside this file: a PNG with so many colours, or a WebP by its name."""
    if name.endswith(".webp"):
        picture.save(HERE / name, quality=82, method=6)
    else:
        picture.quantize(colours, dither=Image.Dither.NONE).save(HERE / name, optimize=True)
