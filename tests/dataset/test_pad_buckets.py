import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from library.dataset import images, padded_copies, scan
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.images import ORIENTATION
from library.masks import FULL
from tools.pad_buckets import main

SMALL = ("--resolution", "64", "--bucket_reso_steps", "16", "--min_bucket_reso", "32", "--max_bucket_reso", "128")
ROOT = Path(__file__).resolve().parents[2]


def noise(seed, height=40, width=60, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def disc(height=40, width=60):
    y, x = np.indices((height, width))
    return ((((y - 18) ** 2 + (x - 35) ** 2) < 100) * 255).astype(np.uint8)


@pytest.fixture
def tree(tmp_path):
    """A tree of three pictures with captions of several extensions, two of them with masks."""
    for seed, name in enumerate(("a", "2_cats/b", "2_cats/within/c")):
        path = save(tmp_path / "in" / f"{name}.png", noise(seed))
        path.with_suffix(".txt").write_text(f"a picture {name}", encoding="utf-8")
        save(tmp_path / "masks" / f"{name}.png", disc())
    (tmp_path / "in" / "a.caption").write_text("another", encoding="utf-8")
    (tmp_path / "masks" / "a.txt").write_text("only the disc", encoding="utf-8")
    (tmp_path / "in" / "a.png.64x64_sd.safetensors").write_bytes(b"a cache")
    return tmp_path


def pad(folder, *more, code=0, out="out"):
    given = [str(each) for each in (folder / "in", folder / out, *SMALL, *more)]
    assert main(given) == code
    return {
        path.relative_to(folder / out).as_posix(): path.read_bytes()
        for path in sorted((folder / out).rglob("*"))
        if path.is_file()
    }


def with_masks(folder):
    return ("--mask_dir", folder / "masks", "--mask_out", folder / "out_masks")


def test_folders_names_and_captions_are_kept(tree):
    made = pad(tree, *with_masks(tree))
    assert list(made) == [
        "2_cats/b.png",
        "2_cats/b.txt",
        "2_cats/within/c.png",
        "2_cats/within/c.txt",
        "a.caption",
        "a.png",
        "a.txt",
    ]
    assert made["2_cats/b.txt"] == b"a picture 2_cats/b"
    assert (tree / "out_masks" / "2_cats" / "within" / "c.png").exists()
    assert (tree / "out_masks" / "a.txt").read_bytes() == b"only the disc"


def test_several_variants_are_numbered_and_differ(tree):
    made = pad(tree, "--variants", 3)
    assert {"a_1.png", "a_2.png", "a_3.png", "a_2.txt", "a_2.caption"} <= made.keys()
    assert len({made[f"a_{number}.png"] for number in (1, 2, 3)}) == 3


def test_the_same_seed_gives_the_same_bytes_whatever_else_is_there(tree):
    one = pad(tree, "--variants", 2, "--rotate", 15, "--fill", "noise")
    (tree / "in" / "2_cats" / "b.png").unlink()
    save(tree / "in" / "0.png", noise(9))
    two = pad(tree, "--variants", 3, "--rotate", 15, "--fill", "noise", out="again")
    shared = {name for name in one.keys() & two.keys() if name.endswith(".png")}
    assert shared == {"a_1.png", "a_2.png", "2_cats/within/c_1.png", "2_cats/within/c_2.png"}
    assert all(one[name] == two[name] for name in shared)
    other = pad(tree, "--variants", 3, "--rotate", 15, "--fill", "noise", "--seed", 1, out="other")
    assert all(one[name] != other[name] for name in shared)


def test_the_mask_goes_where_its_picture_goes(tree):
    blob = np.zeros((40, 60, 3), np.uint8)
    blob[disc() > 0] = 255
    save(tree / "in" / "a.png", blob)
    pad(tree, *with_masks(tree), "--rotate", 40, "--fill", "black", "--scale", "0.9,0.9")
    shown = images.read_image(tree / "out" / "a.png", want_alpha=False).rgb[..., 0]
    mask = images.read_mask(tree / "out_masks" / "a.png")
    assert mask.shape == shown.shape
    assert ((mask > 127) == (shown > 127)).mean() > 0.99
    assert (mask > 127).sum() > 100


def test_alpha_is_carried_along_and_the_free_canvas_is_transparent(tree):
    save(tree / "in" / "a.png", np.dstack((noise(0), np.full((40, 60), 128, np.uint8))))
    pad(tree, "--scale", "0.5,0.5")
    copy = images.read_image(tree / "out" / "a.png", want_alpha=True)
    assert copy.alpha is not None
    assert set(np.unique(copy.alpha)) == {0, 128}
    plain = images.read_image(tree / "out" / "2_cats" / "b.png", want_alpha=True)
    assert set(np.unique(plain.alpha)) == {0, 255}  # a picture without a mask gets one


def test_a_mask_file_may_become_the_alpha_channel(tree):
    pad(tree, "--mask_dir", tree / "masks")
    alpha = images.read_image(tree / "out" / "a.png", want_alpha=True).alpha
    assert alpha is not None
    assert 0 < (alpha > 127).mean() < 0.2


@pytest.mark.parametrize(("fill", "colour"), [("#0a141e", (10, 20, 30)), ("mean", (60, 0, 120))])
def test_the_free_canvas_has_the_colour_asked_for(tree, fill, colour):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (120, 0, 240)
    save(tree / "in" / "a.png", pixels)
    pad(tree, "--fill", fill, "--scale", "0.4,0.4")
    copy = images.read_image(tree / "out" / "a.png", want_alpha=True)
    free = copy.rgb[copy.alpha == 0]
    assert len(free) > 500
    assert np.abs(free.astype(int) - colour).max() <= 2


def test_what_is_masked_out_can_be_filled_too_and_leaves_no_trace(tree):
    made = []
    for hidden in (0, 255):
        save(tree / "in" / "a.png", np.where(disc()[..., None] > 0, noise(0), hidden).astype(np.uint8))
        made.append(pad(tree, *with_masks(tree), "--fill", "extend", "--fill_masked", "--overwrite")["a.png"])
    assert made[0] == made[1]


def test_a_picture_in_the_middle_is_not_shifted(tree):
    pad(tree, "--shift", 0, "--scale", "0.5,0.5", "--bucket_aspect", 1)
    alpha = images.read_image(tree / "out" / "a.png", want_alpha=True).alpha
    rows, columns = np.nonzero(alpha)
    assert abs(rows.min() - (alpha.shape[0] - 1 - rows.max())) <= 1
    assert abs(columns.min() - (alpha.shape[1] - 1 - columns.max())) <= 1


def test_buckets_are_near_the_picture_s_shape(tree):
    pad(tree, "--variants", 12, "--bucket_reso_steps", 8)
    sizes = {images.read_image(path, want_alpha=False).rgb.shape[1::-1] for path in (tree / "out").glob("a_*.png")}
    assert len(sizes) > 2
    assert all(1 <= width / height <= 2.25 for width, height in sizes)  # 1.5 up to 1.5 times either way


def test_a_random_crop_keeps_most_of_the_mask(tree):
    settings = padded_copies.PadSettings(((64, 64),), crop=(0.4, 0.6))
    mask = disc()
    for seed in range(40):
        _, image, cut = padded_copies.draw(images.Decoded(noise(0), None), mask, settings, Random(seed))
        assert cut.shape == image.rgb.shape[:2]
        assert (cut > 0).sum() >= 0.75 * (mask > 0).sum()
        assert cut.shape[0] <= 24
        assert cut.shape[1] <= 36


def test_copies_that_are_whole_are_not_made_again(tree, caplog):
    caplog.set_level(logging.INFO)
    pad(tree, *with_masks(tree))
    before = (tree / "out" / "2_cats" / "b.png").stat().st_mtime_ns
    whole = (tree / "out" / "a.png").read_bytes()
    (tree / "out" / "a.png").write_bytes(whole[:-200])  # cut short
    (tree / "out_masks" / "2_cats" / "within" / "c.png").unlink()
    (tree / "in" / "a.txt").write_text("a new caption", encoding="utf-8")
    made = pad(tree, *with_masks(tree))
    assert (tree / "out" / "2_cats" / "b.png").stat().st_mtime_ns == before
    assert made["a.png"] == whole
    assert made["a.txt"] == b"a new caption"
    assert "2 copies of 3 pictures made, 1 were there and stay as they are: --overwrite makes them again" in caplog.text
    pad(tree, *with_masks(tree), "--overwrite")
    assert "3 copies of 3 pictures made, 0 were there" in caplog.text


def test_an_upright_picture_is_placed_upright(tree):
    image = Image.fromarray(noise(0))
    exif = image.getexif()
    exif[ORIENTATION] = 6
    image.save(tree / "in" / "a.png", exif=exif)
    pad(tree, "--scale", "1,1", "--bucket_aspect", 1)
    assert images.read_image(tree / "out" / "a.png", want_alpha=False).rgb.shape[:2] == (80, 48)


def test_the_result_is_a_data_set_of_mask_images(tree):
    pad(tree, *with_masks(tree), "--variants", 2)
    subset = SubsetConfig(tree / "out" / "2_cats", caption_extension=".txt")
    subset = replace(subset, conditioning_data_dir=tree / "out_masks" / "2_cats")
    found = scan.scan([DatasetConfig((64, 64), (subset,), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128)])
    assert not found.problems
    assert [sample.mask.kind for sample in found.samples] == ["file", "file"]
    assert found.samples[0].captions == ("a picture 2_cats/b",)


def test_the_result_is_a_data_set_of_alpha_masks(tree):
    pad(tree)
    subset = SubsetConfig(tree / "out", caption_extension=".txt", alpha_mask=True)
    found = scan.scan([DatasetConfig((64, 64), (subset,))])
    assert not found.problems
    (sample,) = found.samples
    weights = images.read_mask_weights(sample)
    assert weights is not None
    assert 0 < weights.mean() < 1
    assert FULL == 64 * 255


def test_a_sheet_shows_every_copy_before_and_after(tree):
    pad(tree, *with_masks(tree), "--variants", 2, "--sheet", tree / "sheet.png")
    with Image.open(tree / "sheet.png") as sheet:
        assert sheet.size == (2 * 664 + 8, 3 * 242 + 26)  # six copies in two columns


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--scale", "2,1"), "--scale must be two numbers above 0"),
        (("--crop", "0.5,1.5"), "--crop must not be above 1"),
        (("--fill", "exten"), "--fill must be one of mean, extend, noise, or a colour like #808080, got exten"),
        (("--min_bucket_reso", "128"), "must enclose --resolution 64"),
        (("--resolution", "x"), "--resolution must be a side or WIDTH,HEIGHT"),
        (("--variantz", "2"), "--variants"),
        (("--mask_dir", "nowhere"), "nowhere"),
        (("--sheet", "sheet.jpg"), "the ending must be .png"),
    ],
)
def test_a_mistake_is_told_in_one_line(tree, more, message, capsys):
    pad(tree, *more, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_an_output_folder_within_the_input_is_refused(tree, capsys):
    pad(tree, out="in/padded", code=2)
    assert "is within a folder that is read" in capsys.readouterr().err
    pad(tree, "--mask_out", tree / "out", code=2)
    assert "--mask_out is the output folder" in capsys.readouterr().err


def test_two_pictures_that_would_share_a_copy_are_refused(tree, capsys):
    Image.fromarray(noise(0)).save(tree / "in" / "a.jpg")
    pad(tree, code=2)
    assert "has the name of a.jpg but for the extension" in capsys.readouterr().err


def test_a_damaged_picture_or_a_mask_of_another_shape_leaves_the_others_made(tree, capsys):
    (tree / "in" / "a.png").write_bytes(b"no picture")
    save(tree / "masks" / "2_cats" / "b.png", disc(40, 50))
    made = pad(tree, *with_masks(tree), code=2)
    assert "a.png: cannot be decoded" in (error := capsys.readouterr().err)
    assert "(1 more copies failed)" in error
    assert "2_cats/within/c.png" in made
    assert "2_cats/b.png" not in made


def test_masks_within_the_pictures_folder_are_no_pictures(tree):
    save(tree / "in" / "masks" / "a.png", disc())
    made = pad(tree, "--mask_dir", tree / "in" / "masks")
    assert not any(name.startswith("masks/") for name in made)


def test_a_run_that_is_stopped_leaves_no_half_copies_and_goes_on(tree, monkeypatch):
    for seed in range(40):
        save(tree / "in" / "many" / f"{seed:02}.png", noise(seed))
    make = padded_copies.make

    def stop_at_the_fifth(copy, settings):
        if copy.picture.stem == "05":
            raise KeyboardInterrupt
        make(copy, settings)
        time.sleep(0.02)

    monkeypatch.setattr(padded_copies, "make", stop_at_the_fifth)
    made = pad(tree, code=130)
    assert len(made) < 40
    assert not any(".part" in name for name in made)
    monkeypatch.setattr(padded_copies, "make", make)
    whole = pad(tree)
    assert all(whole[name] == data for name, data in made.items())
    assert {f"many/{seed:02}.png" for seed in range(40)} <= whole.keys()


def test_the_command_runs_from_any_folder(tree):
    argv = [sys.executable, str(ROOT / "tools" / "pad_buckets.py"), "in", "out", *SMALL]
    subprocess.run(argv, cwd=tree, check=True, capture_output=True, timeout=60)
    assert (tree / "out" / "a.png").exists()
