"""Draw the pictures of docs/masks.md from the example photos, with the project's own code.

    python docs/images/mask_figures.py

mask-fills.webp: what the model sees with each mask_fill. mask-shapes.png: erode, dilate, feather, invert.
mask-labels.png: a label map and its weights. mask-weights.png: how hard an image pulls. mask-prior.png: what is learnt
and what is held. mask-tags.png: tags that are left out.
"""

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library import isolation, mask_shaping, masks
from library.dataset import captions, label_maps, mask_captions
from library.dataset.buckets import centred
from library.dataset.config import SubsetConfig
from library.dataset.scan import NO_MASK, Sample
from library.isolation import Fill
from library.masks import MaskShape, MaskSource

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import drawing
from drawing import Axis, Line, Pixels

RED, GREEN, BLUE, GOLD = (200, 50, 60), (30, 140, 80), (40, 90, 200), (190, 130, 20)
LABELS = {"0": (70, 70, 80), "1": (235, 120, 50), "2": (250, 215, 120), "3": (90, 140, 240)}  # by palette entry
TABLE = (("1", 0.5), ("2", 1.0), ("other", 0.0))


def as_rgb(mask: Pixels) -> Pixels:
    """Return a mask (H, W) as a picture."""
    return np.repeat(mask[..., None], 3, axis=2)


def cells(mask: Pixels) -> np.ndarray:
    """Return what each pixel's latent cell weighs: (H, W) float32."""
    weights = masks.to_array(masks.shrink(mask))
    return weights.repeat(masks.CELL, axis=0).repeat(masks.CELL, axis=1)


def shrunk(pixels: Pixels, height: int) -> Pixels:
    """Return a picture at another height."""
    width = round(pixels.shape[1] * height / pixels.shape[0])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def draw_fills() -> None:
    """Write mask-fills.webp."""
    kinds = ("keep", "extend", "mean", "noise")
    found = []
    for name in ("astronaut", "coffee"):
        photo, mask = drawing.photo_and_mask(name)
        filled = [isolation.fill(photo, mask, Fill(kind), name) for kind in kinds]
        found.append([shrunk(each, 270 if name == "astronaut" else 151) for each in (as_rgb(mask), *filled)])
    titles = ("the mask", *(f'"{kind}"' for kind in kinds))
    notes = ("black: masked out", "the picture as it is", "learnt colours carried on", "their mean", "noise like them")
    drawing.save(drawing.rows(titles, found, notes), "mask-fills.webp")


def draw_shapes() -> None:
    """Write mask-shapes.png."""
    shapes = {
        "as painted": MaskShape(),
        "mask_erode = 12": MaskShape(erode=12),
        "mask_dilate = 12": MaskShape(dilate=12),
        "mask_feather = 40": MaskShape(feather=40),
        "mask_invert = true": MaskShape(invert=True),
    }
    photo, mask = drawing.photo_and_mask("astronaut")
    shaped = [mask_shaping.shape(mask, how, (mask.shape[1], mask.shape[0])) for how in shapes.values()]
    first = [shrunk(as_rgb(each), 240) for each in shaped]
    second = [shrunk(drawing.veiled(photo, cells(each)), 240) for each in shaped]
    notes = ["below: what is learnt", "12 pixels less", "12 pixels more", "a soft edge", "black is learnt"]
    drawing.save(drawing.rows(list(shapes), [first, second], notes), "mask-shapes.png", 128)


def label_map(mask: Pixels) -> Image.Image:
    """Return a palette picture of the astronaut: 0 what is around, 1 the suit, 2 the head, 3 the printed word."""
    person = mask > 127
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (45, 45))) > 127
    numbers = person.astype(np.uint8)
    numbers[person & (np.arange(len(mask)) < 150)[:, None]] = 2
    is_within = (np.arange(len(mask)) > 250)[:, None] & (np.abs(np.arange(mask.shape[1]) - 188) < 115)
    numbers[closed & (mask < 64) & is_within] = 3
    made = Image.fromarray(numbers, "P")
    made.putpalette([part for colour in LABELS.values() for part in colour])
    return made


def draw_labels() -> None:
    """Write mask-labels.png."""
    photo, mask = drawing.photo_and_mask("astronaut")
    labels = label_map(mask)
    weights = label_maps.weights_of(labels, TABLE, Path("astronaut.png"))
    shown = (photo, np.asarray(labels.convert("RGB")), as_rgb(weights), drawing.veiled(photo, cells(weights)))
    pictures = drawing.rows(
        ("the photo", "the label map", "the weights", "what is learnt"), [[shrunk(each, 300) for each in shown]]
    )
    table = Image.new("RGB", (250, pictures.height), "white")
    draw = ImageDraw.Draw(table)
    draw.text((10, 11), "mask_labels", font=drawing.font(), fill=drawing.INK, anchor="lm")
    names = {"1": "the suit", "2": "the head", "3": "print", "0": "around"}
    told = dict(TABLE)
    for row, (label, name) in enumerate(names.items()):
        top = 50 + 46 * row
        draw.rectangle((10, top, 38, top + 28), fill=LABELS[label])
        draw.text((24, top + 14), label, font=drawing.font(16), fill="white" if label in "03" else "black", anchor="mm")
        words = f"{name}: {told[label]:g}" if label in told else f"{name}: {told['other']:g} (other)"
        draw.text((50, top + 14), words, font=drawing.font(16), fill=drawing.INK, anchor="lm")
    drawing.save(drawing.beside(table, pictures), "mask-labels.png", 224)


def pull(share: float, exponent: float, floor: float = 0.01) -> float:
    """Return how hard an image pulls of which a share is learnt, on a loss that is 1 everywhere."""
    weights = np.full((8, 8), share, np.float32)
    return share * masks.area_scale(weights, exponent, floor)


def draw_weights() -> None:
    """Write mask-weights.png."""
    shares = [0.001 * 10 ** (3 * step / 120) for step in range(121)]
    colours = {0.0: RED, 0.5: GOLD, 1.0: GREEN}
    places = {0.0: (0.03, 0.0021), 0.5: (0.03, 0.004), 1.0: (0.03, 0.0075)}
    lines = [
        Line(
            [(share, max(0.001, pull(share, exponent))) for share in shares],
            colour,
            f"mask_area_norm = {exponent:g}",
            places[exponent],
        )
        for exponent, colour in colours.items()
    ]
    percent = {"0.1 %": 0.001, "1 %": 0.01, "10 %": 0.1, "100 %": 1.0}
    pulls = {"0.001": 0.001, "0.01": 0.01, "0.1": 0.1, "1": 1.0, "": 2.0}
    left = drawing.chart(
        "How hard an image pulls", Axis("share of the picture that is learnt", percent, math.log10),
        Axis("against a whole picture", pulls, math.log10), lines,
    )  # fmt: skip
    steps = [step / 100 for step in range(101)]
    least = [
        Line([(m, m) for m in steps], RED, "mask_weight_min = 0", (0.45, 0.12)),
        Line([(m, max(m, 0.2)) for m in steps], GREEN, "mask_weight_min = 0.2", (0.45, 0.22)),
    ]
    values = {"0": 0.0, "0.5": 0.5, "1": 1.0}
    right = drawing.chart(
        "What a cell weighs", Axis("its mask, black to white", values), Axis("its weight in the loss", values), least
    )
    drawing.save(drawing.beside(left, right), "mask-weights.png", 64)


def draw_prior() -> None:
    """Write mask-prior.png."""
    photo, mask = drawing.photo_and_mask("astronaut")
    soft = mask_shaping.shape(mask, MaskShape(feather=60), (mask.shape[1], mask.shape[0]))
    learnt = cells(soft)
    shown = (photo, as_rgb(soft), drawing.tinted(photo, learnt, GREEN), drawing.tinted(photo, 1 - learnt, BLUE))
    titles = ("the photo", "the mask m", "learnt: weight m", "held: weight p (1 - m)")
    notes = ("", "with a soft edge", "pulled to the picture", "pulled to the untrained model")
    drawing.save(drawing.rows(titles, [[shrunk(each, 300) for each in shown]], notes), "mask-prior.png")


def draw_tags() -> None:
    """Write mask-tags.png."""
    photo, mask = drawing.photo_and_mask("cat")
    line = "cat, ginger tabby, watermark, whiskers, text"
    subset = SubsetConfig(Path("photos"), mask_drop_tags=("watermark", "text"))
    transform = centred((448, 296), (448, 296), (448, 296))
    masked = Sample(Path("cat.jpg"), (line,), subset, 0, False, 1, 1, transform, MaskSource("file", Path("cat.png")))
    shown = {"shown with its mask": masked, "shown without": replace(masked, mask=NO_MASK)}
    parts = drawing.rows(
        ("", ""), [[shrunk(each, 240) for each in (drawing.veiled(photo, cells(mask)), photo)]], tuple(shown)
    )
    sheet = Image.new("RGB", (parts.width, parts.height + 66), "white")
    sheet.paste(parts.crop((0, drawing.LINE, parts.width, parts.height)), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for column, sample in enumerate(shown.values()):
        left = column * (parts.width + drawing.GAP) // 2
        kept = captions.compose(
            sample.captions, subset, random.Random(0), epoch=1, step=0, max_train_steps=1,
            left_out=mask_captions.left_out(sample),
        ).split(", ")  # fmt: skip
        top, across = parts.height - 6, left + 2
        for tag in line.split(", "):
            draw.text((across, top), tag, font=drawing.font(15), fill=drawing.INK if tag in kept else RED)
            width = draw.textlength(tag, font=drawing.font(15))
            if tag not in kept:
                draw.line((across, top + 10, across + width, top + 10), fill=RED, width=2)
            across += width + 12
        told = f'"{", ".join(kept)}"'
        draw.text((left + 2, top + 30), told, font=drawing.font(15), fill=drawing.PALE)
    drawing.save(sheet, "mask-tags.png", 224)


def draw_all() -> None:
    """Write them all."""
    for draw in (draw_fills, draw_shapes, draw_labels, draw_weights, draw_prior, draw_tags):
        draw()


if __name__ == "__main__":
    draw_all()
