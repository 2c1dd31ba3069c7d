"""Draw dataset-report.png: the report of the example photos with some faults planted, as a browser shows it.

Run it as `python docs/images/dataset_report.py`; it needs Chromium or Chrome.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOW = (1180, 5200)  # more than the page is high
SHRUNK = 0.56  # of two columns
CONFIG = """
[general]
caption_extension = ".txt"

[[datasets]]
resolution = [256, 192]
batch_size = 2
enable_bucket = true
min_bucket_reso = 128
max_bucket_reso = 320

[[datasets.subsets]]
image_dir = "photos"
conditioning_data_dir = "photos_mask"
num_repeats = 4

[[datasets.subsets]]
image_dir = "emoji"
alpha_mask = true
num_repeats = 3
"""


def plant(folder: Path) -> None:
    """Copy the example data there and plant what people trip over."""
    for name in ("photos", "photos_mask", "emoji"):
        shutil.copytree(ROOT / "examples" / "data" / name, folder / name)
    photos, masks = folder / "photos", folder / "photos_mask"
    with Image.open(masks / "flower.png") as mask:
        ImageOps.invert(mask.convert("L")).save(masks / "flower.png")
    with Image.open(masks / "temple.png") as mask:
        outline = np.zeros_like(np.asarray(mask.convert("L")))
    for radius in (60, 90, 120):
        cv2.ellipse(outline, (220, 150), (radius, radius), 0, 0, 360, 255, 2)
    Image.fromarray(outline).save(masks / "temple.png")
    (masks / "coffee.png").rename(masks / "coffee-mask.png")
    (photos / "rocket.txt").write_text("photo of a rocket, watermark, night", encoding="utf-8")
    shutil.copy(photos / "cat.jpg", photos / "tabby.jpg")
    shutil.copy(masks / "cat.png", masks / "tabby.png")
    shutil.copy(photos / "cat.txt", photos / "tabby.txt")
    (folder / "dataset.toml").write_text(CONFIG, encoding="utf-8")


def main() -> None:
    """Write the picture."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("no browser was found: install Chromium")
    target = HERE / "dataset-report.png"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(folder)
        command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), "--dataset_config", "dataset.toml"]
        subprocess.run([*command, "--html", "report.html"], cwd=folder, check=False)  # 1: it has errors
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={target}"]
        flags += [f"--user-data-dir={folder / 'user'}", "--window-size={},{}".format(*WINDOW)]
        subprocess.run([browser, *flags, (folder / "report.html").as_uri()], check=True, capture_output=True)
    with Image.open(target) as shot:
        sheet = in_columns(shot.convert("RGB"))
    sheet.quantize(192).save(target, optimize=True)


def in_columns(page: Image.Image) -> Image.Image:
    """Return a page as two columns, without the empty rest of the window."""
    pixels = np.asarray(page)
    is_filled = (pixels != pixels[-1, 0]).any(axis=(1, 2))
    middle = (int(np.flatnonzero(is_filled)[-1]) + 40) // 2
    height = middle + int(np.argmin(is_filled[middle:])) + 10  # between two sections
    size = (round(page.width * SHRUNK), round(height * SHRUNK))
    sheet = Image.new("RGB", (2 * size[0], size[1]), tuple(pixels[-1, 0].tolist()))
    for number in range(2):
        part = page.crop((0, number * height, page.width, (number + 1) * height))
        sheet.paste(part.resize(size, Image.Resampling.LANCZOS), (number * size[0], 0))
    return sheet


if __name__ == "__main__":
    main()
