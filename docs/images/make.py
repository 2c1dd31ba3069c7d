"""Draw the pictures of the documentation from the example pictures (run it as `python docs/images/make.py`).

masked-loss.png: photo, mask, and what is learnt, the mask at latent size (8 by 8 pixels a cell) laid over the photo.
contact-sheet.png: the first pictures of the contact sheet of the example data set.
Those of the settings of masks: see mask_figures.py. mask_curves.py, which trains for some minutes, is not called here.
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import mask_figures  # noqa: E402 - beside this file

from library import masks  # noqa: E402 - found through the line above
from library.dataset import config, contact_sheet, scan  # noqa: E402
from library.options.captions import CaptionOptions  # noqa: E402
from library.options.dataset import DatasetOptions  # noqa: E402
from library.options.masks import MaskOptions  # noqa: E402

TITLES = ("photo", "mask", "what is learnt")
NAMES = ("cat", "flower")
CROP = (448, 296)  # width, height; multiples of a latent cell
MARGIN, TITLE = 8, 26
HIDDEN = np.array((40, 40, 48), dtype=np.float32)  # colour of what is not learnt


def learnt(photo: Image.Image, mask: Image.Image) -> Image.Image:
    """Return the photo with each latent cell shown as much as it is learnt."""
    weights = masks.to_array(masks.shrink(np.asarray(mask)))
    weights = weights.repeat(masks.CELL, axis=0).repeat(masks.CELL, axis=1)[:, :, None]
    shown = np.asarray(photo, dtype=np.float32) * weights + HIDDEN * (1 - weights)
    return Image.fromarray(shown.round().astype(np.uint8))


def draw_contact_sheet() -> None:
    """Write contact-sheet.png."""
    options = DatasetOptions(dataset_config=Path("examples/masked_lora/dataset_both.toml"))
    samples = scan.scan(config.load(options, CaptionOptions(), MaskOptions())).samples
    path = contact_sheet.draw(samples[:9], HERE / "contact-sheet.png")
    with Image.open(path) as sheet:
        sheet.quantize(128).save(path, optimize=True)


def draw_masked_loss() -> None:
    """Write masked-loss.png."""
    width, height = CROP
    sheet = Image.new("RGB", (3 * width + 2 * MARGIN, TITLE + len(NAMES) * (height + MARGIN) - MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        left = column * (width + MARGIN)
        draw.text((left + width // 2, TITLE // 2), title, font=ImageFont.load_default(18), fill="black", anchor="mm")
        for row, name in enumerate(NAMES):
            photo = Image.open(ROOT / "examples" / "data" / "photos" / f"{name}.jpg").convert("RGB")
            mask = Image.open(ROOT / "examples" / "data" / "photos_mask" / f"{name}.png").convert("L")
            box = ((photo.width - width) // 2, photo.height - height, (photo.width + width) // 2, photo.height)
            photo, mask = photo.crop(box), mask.crop(box)
            picture = (photo, mask, learnt(photo, mask))[column]
            sheet.paste(picture, (left, TITLE + row * (height + MARGIN)))
    sheet.quantize(160).save(HERE / "masked-loss.png", optimize=True)


if __name__ == "__main__":
    os.chdir(ROOT)  # paths in the data set config are relative to it
    draw_masked_loss()
    draw_contact_sheet()
    mask_figures.draw_all()
