"""Pictures for the benchmarks, made of the example photos: their edges, colours and noise cost decoding its due."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from measuring import ROOT
from PIL import Image

PHOTOS = ROOT / "examples" / "data" / "photos"
NOISE = 1.5  # of 255; both smoother and noisier pictures are decoded faster
NUM_DISTINCT = 20  # the others are copies; nothing in the project looks for equal contents


def photo(index: int, side: int) -> np.ndarray:
    """Return a square cut of an example photo, enlarged to side, with a sensor's noise: (side, side, 3) uint8."""
    paths = sorted(PHOTOS.glob("*.jpg"))
    random = np.random.default_rng(index)
    with Image.open(paths[index % len(paths)]) as file:
        width, height = file.size
        cut = min(width, height) * 3 // 4
        left, top = int(random.integers(width - cut + 1)), int(random.integers(height - cut + 1))
        enlarged = file.convert("RGB").resize(
            (side, side), Image.Resampling.LANCZOS, (left, top, left + cut, top + cut)
        )
    noise = random.normal(0, NOISE, (side, side, 3))
    return np.clip(np.asarray(enlarged) + noise, 0, 255).round().astype(np.uint8)


def soft_mask(index: int, side: int) -> np.ndarray:
    """Return a mask as a person paints one, (side, side) uint8: an ellipse that ends within a few pixels."""
    random = np.random.default_rng(1000 + index)
    y, x = np.mgrid[0:side, 0:side] / side
    centre, radius = random.uniform(0.4, 0.6, 2), random.uniform(0.2, 0.4, 2)
    distance = np.hypot((x - centre[0]) / radius[0], (y - centre[1]) / radius[1])
    return (np.clip((1.02 - distance) * 25, 0, 1) * 255).astype(np.uint8)


def write_pictures(folder: Path, count: int, side: int, kind: str) -> Path:
    """Write count pictures and captions into a new folder, and return it.

    Args:
        folder: is made.
        count: how many; copies after the first NUM_DISTINCT.
        side: in pixels.
        kind: "rgba" (PNG with alpha) or "jpg" (with mask images as PNG in a folder beside it).
    """
    masks = folder.with_name(folder.name + "_mask")
    folder.mkdir(parents=True)
    if kind == "jpg":
        masks.mkdir()
    for index in range(count):
        name, original = f"picture_{index:04d}", f"picture_{index % NUM_DISTINCT:04d}"
        if index >= NUM_DISTINCT:
            copies = [(folder, ".png" if kind == "rgba" else ".jpg")] + ([(masks, ".png")] if kind == "jpg" else [])
            for place, ending in copies:
                shutil.copyfile(place / (original + ending), place / (name + ending))
        elif kind == "rgba":
            pixels = np.dstack((photo(index, side), soft_mask(index, side)))
            Image.fromarray(pixels).save(folder / f"{name}.png")
        else:
            Image.fromarray(photo(index, side)).save(folder / f"{name}.jpg", quality=92)
            Image.fromarray(soft_mask(index, side)).save(masks / f"{name}.png")
        (folder / f"{name}.txt").write_text("a photo, natural light, sharp focus", encoding="utf-8")
    return folder


def dataset_config(folder: Path, side: int, *, is_masked: bool, kind: str, batch_size: int = 1) -> Path:
    """Write the dataset config of a folder from write_pictures beside it, and return its path."""
    source = "alpha_mask = true" if kind == "rgba" else f"conditioning_data_dir = '{folder.as_posix()}_mask'"
    lines = [
        "[[datasets]]",
        f"resolution = {side}",
        f"batch_size = {batch_size}",
        "[[datasets.subsets]]",
        f"image_dir = '{folder.as_posix()}'",
        "caption_extension = '.txt'",
        source if is_masked else "",
    ]
    path = folder.with_name(f"{folder.name}{'' if is_masked else '_unmasked'}.toml")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
