"""Data sets of which only what is masked out differs, for the tests of isolation."""

from collections.abc import Container
from pathlib import Path

import numpy as np
from end_to_end.training_runs import half, picture, save, subset, write_toml
from PIL import Image

FILLS: dict[str, object] = {
    "files": "extend",
    "alpha": ["noise", "noise", "mean"],
    "wide": "mean",
    "jpeg": "noise",
    "reg": "extend",
}
"""The subsets, by the names of their folders: mask images, mirrored; soft transparency that hides colours, mirrored,
with several fills; a wide picture whose mask is shaped, in a bucket of its own; a JPEG that becomes a PNG; soft masks
of regularisation images."""


def soft() -> np.ndarray:
    """Return a mask (64, 64) uint8: black in its right third, then rising to white at the left border."""
    return np.broadcast_to(np.linspace(510, -255, 64).clip(0, 255), (64, 64)).astype(np.uint8)


def changed(pixels: np.ndarray, mask: np.ndarray, hidden: int) -> np.ndarray:
    """Return pixels with others, which depend on `hidden`, where a mask is black."""
    other = np.random.default_rng(hidden).integers(0, 256, pixels.shape, dtype=np.uint8)
    return np.where(mask[..., None] > 0, pixels, other)


def draw(folder: Path, hidden: int, kept: Container[str] = ()) -> Path:
    """Draw pictures whose colours under black depend on `hidden`, 1 or 2, and write their config.

    Args:
        folder: where the pictures and dataset.toml go.
        hidden: decides what is masked out.
        kept: names of subsets that are not filled.
    """
    for i in range(2):
        save(folder / "files", f"photo{i}", changed(picture(i), half(), hidden), "a photo")
        save(folder / "masks", f"photo{i}", half())
        save(folder / "alpha", f"cat{i}", np.dstack((changed(picture(9 + i), soft(), hidden), soft())), "a cat")
    wide, wide_mask = np.hstack((picture(3), picture(4))), np.hstack((half(), half(90)))
    save(folder / "wide", "wide", np.dstack((changed(wide, wide_mask, hidden), wide_mask)), "wide")
    save(folder / "reg", "reg", changed(picture(20), soft(), hidden), "a person")
    save(folder / "masks", "reg", soft())
    _draw_jpeg(folder / "jpeg", hidden)
    save(folder / "masks", "picture", half())
    fills = {name: {"mask_fill": "keep" if name in kept else fill} for name, fill in FILLS.items()}
    masks = {"conditioning_data_dir": folder / "masks"}
    return write_toml(
        folder / "dataset.toml",
        subset(folder / "files", flip_aug=True, **masks, **fills["files"]),
        subset(folder / "alpha", flip_aug=True, alpha_mask=True, **fills["alpha"]),
        subset(folder / "wide", alpha_mask=True, mask_erode=6, mask_feather=4, **fills["wide"]),
        subset(folder / "jpeg", **masks, **fills["jpeg"]),
        subset(folder / "reg", is_reg=True, **masks, **fills["reg"]),
        resolution=[128, 64],
        batch_size=4,
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=128,
    )


def _draw_jpeg(folder: Path, hidden: int) -> None:
    """Write a JPEG, or for 2 a PNG of its pixels with others under black."""
    folder.mkdir()
    path = folder / "picture.jpg"
    Image.fromarray(picture(30)).save(path)
    path.with_suffix(".txt").write_text("a jpeg", encoding="utf-8")
    if hidden == 2:
        save(folder, "picture", changed(np.asarray(Image.open(path)), half(), hidden))
        path.unlink()
