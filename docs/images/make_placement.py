"""Draw the pictures of docs/placement.md from the example pictures (run it as `python docs/images/make_placement.py`).

mask-aware-crop.png: photos with the box round what their masks let be learnt, and their cuts with and without
mask_aware_crop and mask_aware_zoom.
pad-buckets.png: the sheet of tools/pad_buckets.py, of a copy of each photo.
placement.png: pictures as random_placement shows them, drawn as training draws them, and what of them is learnt.
"""

import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from library.dataset import contact_sheet, framing, geometry, images, placement, regions  # noqa: E402
from library.dataset.config import DatasetConfig, SubsetConfig  # noqa: E402
from library.dataset.geometry import Pixels, Transform  # noqa: E402
from library.dataset.images import Decoded  # noqa: E402
from library.dataset.looks import Look  # noqa: E402
from library.isolation import KEEP, Fill  # noqa: E402

DATA = ROOT / "examples" / "data"
SIDE, MARGIN, TITLE = 176, 8, 26
NUM_PLACED = 4
PORTRAIT = (512, 768)
BOX = (255, 220, 0)


def read(name: str) -> tuple[Decoded, Pixels]:
    """Return a picture of the example data and its mask."""
    path = DATA / name
    image = images.read_image(path, want_alpha=True)
    return image, image.alpha if image.alpha is not None else images.read_mask(
        DATA / "photos_mask" / f"{path.stem}.png"
    )


def sheet_of(rows: list[list[Image.Image]], titles: list[str]) -> Image.Image:
    """Return pictures in rows, each column under its title."""
    columns = len(rows[0])
    size = (columns * (SIDE + MARGIN) - MARGIN, TITLE + len(rows) * (SIDE + MARGIN) - MARGIN)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        middle = (column * (SIDE + MARGIN) + SIDE // 2, TITLE // 2)
        canvas.text(middle, title, font=ImageFont.load_default(14), fill="black", anchor="mm")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            shown = ImageOps.contain(picture, (SIDE, SIDE), Image.Resampling.LANCZOS)
            left = column * (SIDE + MARGIN) + (SIDE - shown.width) // 2
            sheet.paste(shown, (left, TITLE + number * (SIDE + MARGIN) + (SIDE - shown.height) // 2))
    return sheet


def veiled(pixels: Pixels, mask: Pixels) -> Image.Image:
    """Return pixels with red over what is not learnt."""
    return Image.fromarray(contact_sheet.veiled(pixels, (mask / np.float32(255)).astype(np.float32)))


def draw_crops() -> None:
    """Write mask-aware-crop.png."""
    rows = []
    for name, left in (("photos/flower.jpg", 60), ("photos/rocket.jpg", 165)):
        image, mask = read(name)
        image, mask = Decoded(image.rgb[:, left:], None), mask[:, left:]  # so that what is learnt is not in the middle
        size = (mask.shape[1], mask.shape[0])
        box = regions.of_mask(mask, size)
        photo = veiled(image.rgb, mask)
        ImageDraw.Draw(photo).rectangle(box, outline=BOX, width=3)
        row = [photo]
        for changes in ({}, {"mask_aware_crop": True}, {"mask_aware_crop": True, "mask_aware_zoom": 2.0}):
            subset = SubsetConfig(DATA, **changes)
            transform = framing.assign(DatasetConfig(PORTRAIT, (subset,)), subset, size, box)
            row.append(Image.fromarray(geometry.apply(transform, image.rgb)))
        rows.append(row)
    titles = ["photo, mask, its box", "cut in the middle", "mask_aware_crop", "mask_aware_zoom = 2"]
    sheet_of(rows, titles).quantize(256).save(HERE / "mask-aware-crop.png", optimize=True)


def draw_placements() -> None:
    """Write placement.png."""
    rows = []
    for name, fill in (("photos/flower.jpg", KEEP), ("emoji/joyful_cat.png", Fill("extend"))):
        image, mask = read(name)
        size = (mask.shape[1], mask.shape[0])
        subset = SubsetConfig(DATA, placement_scale=(0.4, 1.2), placement_rotate=20.0)
        plain = Transform(size, (512, 512), (0, 0), (512, 512))
        shown, learnt = [Image.fromarray(image.rgb)], [veiled(image.rgb, mask)]
        for number in range(NUM_PLACED):
            drawn = placement.draw(plain, subset, random.Random(f"{name} {number}"), regions.of_mask(mask, size))
            transform = replace(drawn, flip=number == 1)
            seen = images.see(image, mask, Look(transform, fill), DATA / name)
            shown.append(Image.fromarray(seen.pixels))
            learnt.append(veiled(seen.pixels, geometry.apply(transform, mask)))
        rows += [shown, learnt]
    titles = ["picture", *(f"draw {number + 1}" for number in range(NUM_PLACED))]
    sheet_of(rows, titles).quantize(256).save(HERE / "placement.png", optimize=True)


def draw_copies() -> None:
    """Write pad-buckets.png."""
    with tempfile.TemporaryDirectory() as folder:
        masks = ["--mask_dir", str(DATA / "photos_mask"), "--mask_out", f"{folder}/masks"]
        drawn = ["--rotate", "10", "--seed", "3", "--sheet", f"{folder}/sheet.png"]
        command = [sys.executable, str(ROOT / "tools" / "pad_buckets.py"), str(DATA / "photos"), f"{folder}/copies"]
        subprocess.run([*command, *masks, *drawn], check=True)
        with Image.open(f"{folder}/sheet.png") as sheet:
            sheet.quantize(128).save(HERE / "pad-buckets.png", optimize=True)


if __name__ == "__main__":
    draw_copies()
    draw_crops()
    draw_placements()
