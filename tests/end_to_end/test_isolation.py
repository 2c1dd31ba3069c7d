"""Isolation: with a fill, whole runs do not depend on what is masked out. Each has several kinds of data at once."""

from pathlib import Path

import numpy as np
import pytest
from end_to_end.conftest import Train
from end_to_end.training_runs import Family, arguments, differing, half, picture, save, subset, write_toml
from PIL import Image

FILLS = {"files": "extend", "alpha": ["noise", "noise", "mean"], "wide": "mean", "jpeg": "noise", "reg": "extend"}
STEPS = ("--max_train_steps", 3)


def soft() -> np.ndarray:
    """Return a mask (64, 64) uint8: black in its right half, then rising to white at the left border."""
    return np.broadcast_to(np.linspace(510, -255, 64).clip(0, 255), (64, 64)).astype(np.uint8)


def changed(pixels: np.ndarray, mask: np.ndarray, hidden: int) -> np.ndarray:
    """Return pixels with others, which depend on `hidden`, where a mask is black."""
    other = np.random.default_rng(hidden).integers(0, 256, pixels.shape, dtype=np.uint8)
    return np.where(mask[..., None] > 0, pixels, other)


def draw(folder: Path, hidden: int, *, keep: bool = False) -> Path:
    """Draw pictures whose colours under black depend on `hidden` and write their config: 64 pixels and 128 by 64.

    Mask images, soft transparency that hides colours, a wide picture, a JPEG that becomes a PNG, and regularisation.
    """
    for i in range(2):
        save(folder / "files", f"photo{i}", changed(picture(i), half(), hidden), "a photo")
        save(folder / "masks", f"photo{i}", half())
        save(folder / "alpha", f"cat{i}", np.dstack((changed(picture(9 + i), soft(), hidden), soft())), "a cat")
    wide, wide_mask = np.hstack((picture(3), picture(4))), np.hstack((half(), half(90)))
    save(folder / "wide", "wide", np.dstack((changed(wide, wide_mask, hidden), wide_mask)), "wide")
    save(folder / "reg", "reg", changed(picture(20), soft(), hidden), "a person")
    save(folder / "masks", "reg", soft())
    jpeg = folder / "jpeg" / "picture.jpg"
    jpeg.parent.mkdir()
    Image.fromarray(picture(30)).save(jpeg)
    save(folder / "masks", "picture", half())
    if hidden == 2:
        save(jpeg.parent, "picture", changed(np.asarray(Image.open(jpeg)), half(), hidden))
        jpeg.unlink()
    jpeg.with_suffix(".txt").write_text("a jpeg", encoding="utf-8")
    keys: dict[str, dict[str, object]] = {name: {"mask_fill": "keep" if keep else FILLS[name]} for name in FILLS}
    masks = {"conditioning_data_dir": folder / "masks"}
    return write_toml(
        folder / "dataset.toml",
        subset(folder / "files", flip_aug=True, **masks, **keys["files"]),
        subset(folder / "alpha", flip_aug=True, alpha_mask=True, **keys["alpha"]),
        subset(folder / "wide", alpha_mask=True, mask_erode=6, mask_feather=4, **keys["wide"]),
        subset(folder / "jpeg", **masks, **keys["jpeg"]),
        subset(folder / "reg", is_reg=True, **masks, **keys["reg"]),
        resolution=[128, 64],
        batch_size=4,
        enable_bucket=True,
        min_bucket_reso=64,
        max_bucket_reso=128,
    )


CACHES = {
    "uncached": ((), ()),
    "cached on disk, then in memory": (("--cache_latents", "--cache_latents_to_disk"), ("--cache_latents",)),
}


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
def test_with_fills_what_is_masked_out_changes_no_bit_of_the_network(
    train: Train, tmp_path: Path, caches: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    one, other = (
        train(draw(tmp_path / str(hidden), hidden), *caches[hidden - 1], *STEPS, name=f"run{hidden}")
        for hidden in (1, 2)
    )
    assert not differing(one.tensors, other.tensors)
    assert one.losses == other.losses
    assert any(tensor.any() for name, tensor in one.tensors.items() if "lora_up" in name)


def test_with_keep_what_is_masked_out_does_change_the_network(train: Train, tmp_path: Path) -> None:
    one, other = (
        train(draw(tmp_path / str(hidden), hidden, keep=True), "--cache_latents", *STEPS, name=f"run{hidden}")
        for hidden in (1, 2)
    )
    assert differing(one.tensors, other.tensors)


def test_a_fill_with_draws_that_show_what_is_masked_out_is_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = draw(tmp_path / "1", 1)
    assert family.run(*arguments(family, tmp_path, config, "--unmasked_probability", 0.1)) == 2
    assert "unmasked_probability 0.1 shows and learns what mask_fill extend" in capsys.readouterr().err
