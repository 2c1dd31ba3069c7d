import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset import contact_sheet
from library.dataset.images import ORIENTATION
from tools.check_dataset import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset of a photo with a mask, a cut-out with alpha, a picture without either, and a regularisation image."""
    for name in ("photos", "masks", "cutouts", "reg"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (96, 64), (200, 100, 50)).save(tmp_path / "photos" / "cat.png")
    (tmp_path / "photos" / "cat.txt").write_text("a cat", encoding="utf-8")
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 48:] = 255  # the right half
    Image.fromarray(mask).save(tmp_path / "masks" / "cat.png")
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :20, 3] = 0  # two and a half cells
    Image.fromarray(pixels).save(tmp_path / "cutouts" / "dog.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "cutouts" / "eel.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "reg" / "fox.png")
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, *, photos: str = "") -> None:
    subsets = [
        f"image_dir = {str(folder / 'photos')!r}\nconditioning_data_dir = {str(folder / 'masks')!r}\nnum_repeats = 3\n"
        f"caption_extension = '.txt'\n{photos}",
        f"image_dir = {str(folder / 'cutouts')!r}\nalpha_mask = true\nclass_tokens = 'animal'",
        f"image_dir = {str(folder / 'reg')!r}\nis_reg = true\nclass_tokens = 'animal'",
    ]
    text = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 64\n"
    text += "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
    (folder / "dataset.toml").write_text(text, encoding="utf-8")


def check(folder: Path, *options: str) -> int:
    return main(["--dataset_config", str(folder / "dataset.toml"), *options])


def findings(folder: Path, *options: str) -> dict:
    check(folder, "--json", str(folder / "out.json"), *options)
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def problems_of(folder: Path) -> list[tuple[str, str, str]]:
    return [
        (problem["severity"], Path(problem["path"]).name, problem["message"])
        for problem in findings(folder)["problems"]
    ]


def damage_pixels(path: Path) -> None:
    """Spoil a PNG's pixels and leave its header and its end."""
    data = path.read_bytes()
    path.write_bytes(data[:45] + bytes(len(data) - 57) + data[-12:])


def test_the_findings_as_json_are_what_training_sees(folder):
    found = findings(folder)
    assert found["images"][0] == {
        "path": str(folder / "photos" / "cat.png"),
        "dataset": 0,
        "subset": 0,
        "size": [96, 64],
        "caption": "a cat",
        "is_reg": False,
        "num_repeats": 3,
        "bucket": [64, 64],
        "resized": [96, 64],
        "crop": [16, 0],
        "mask": {"source": "file", "path": str(folder / "masks" / "cat.png"), "mean_weight": 0.5, "weights": None},
    }
    assert [(Path(image["path"]).stem, image["subset"], image["num_repeats"]) for image in found["images"]] == [
        ("cat", 0, 3),
        ("dog", 1, 1),
        ("eel", 1, 1),
        ("fox", 2, 5),
    ]
    assert [image["mask"]["source"] for image in found["images"]] == ["file", "alpha", "none", "none"]
    assert [image["mask"]["mean_weight"] for image in found["images"]] == [0.5, 0.6875, 1, 1]
    assert found["images"][3]["is_reg"]
    assert found["buckets"] == [{"resolution": [64, 64], "count": 10}]
    assert found["problems"] == []


def test_weights_are_written_at_latent_size(folder):
    images = findings(folder, "--masks", str(folder / "weights"))["images"]
    arrays = [np.load(folder / "weights" / image["mask"]["weights"]) for image in images]
    assert [array.dtype for array in arrays] == [np.float32] * 4
    row = [0, 0, 0.5, 1, 1, 1, 1, 1]
    assert (arrays[1] == [row] * 8).all()
    assert arrays[0][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (arrays[2] == np.ones((8, 8))).all()


def test_what_is_seen_is_said_in_words(folder, capsys):
    assert check(folder) == 0
    said = capsys.readouterr().out
    assert "dataset 0: 64x64, buckets in steps of 64, sides from 64 to 64, batch size 1" in said
    assert "bucket 64x64        4 images, 10 with repeats, 10 batches" in said
    assert "masks: 2 of 4 images (1 file, 1 alpha), 2 unmasked; white (255) is learnt, black (0) is not" in said
    assert "problems: 0 errors, 0 warnings" in said


def test_the_mean_weight_is_that_of_masked_images(folder, capsys):
    check(folder, "--masks", str(folder / "weights"))
    said = capsys.readouterr().out
    assert "(1 file, 1 alpha), mean weight 0.59, 2 unmasked" in said
    assert "learnt at latent size: from 50.0% (cat.png) to 68.8% (dog.png)" in said


def test_no_pixel_is_read_unless_something_is_asked_for(folder):
    for path in (folder / "photos" / "cat.png", folder / "masks" / "cat.png"):
        damage_pixels(path)
    assert check(folder) == 0
    assert check(folder, "--json", str(folder / "out.json")) == 1


def test_a_missing_mask_is_an_error_with_its_near_miss(folder, capsys):
    (folder / "masks" / "cat.png").rename(folder / "masks" / "cat-mask.png")
    assert check(folder) == 1
    said = capsys.readouterr().out
    assert "error: " in said
    assert "cat.png: has no mask in" in said
    assert "(is cat-mask.png meant?)" in said
    assert "problems: 1 errors, 1 warnings" in said


def test_all_errors_are_listed(folder):
    (folder / "photos" / "bat.png").write_bytes(b"hello")
    (folder / "cutouts" / "gnu.png").write_bytes(b"hello")
    (folder / "photos" / "cat.txt").write_bytes(b"")
    assert [(severity, name) for severity, name, _ in problems_of(folder)] == [
        ("error", "bat.png"),
        ("error", "cat.png"),
        ("error", "gnu.png"),
    ]


def test_a_surplus_mask_is_a_warning_and_no_error(folder):
    Image.new("L", (8, 8)).save(folder / "masks" / "bat.png")
    assert [(severity, name) for severity, name, _ in problems_of(folder)] == [("warning", "bat.png")]
    assert check(folder) == 0


def test_a_mask_of_another_shape_is_an_error_with_a_hint_at_exif(folder):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    Image.new("RGB", (96, 64)).save(folder / "photos" / "cat.png", exif=exif)
    ((severity, name, message),) = problems_of(folder)
    assert (severity, name) == ("error", "cat.png")
    assert (
        "mask is 96x64, its image cat.png is 64x96. The image is stored lying on its side (EXIF orientation 8)"
        in message
    )


KEPT = "in the 64x64 that are kept of 96x64"
SPECK = np.pad(np.full((8, 8), 255, np.uint8), ((28, 28), (44, 44)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((64, 96), np.uint8), f"the mask is black everywhere {KEPT}: nothing of cat.png is learnt"),
        (SPECK, "the mask lets only 1.6% of cat.png through"),
        (np.full((64, 96), 255, np.uint8), f"the mask is white everywhere {KEPT}: all of cat.png is learnt"),
        (np.pad(np.zeros((48, 48), np.uint8), ((8, 8), (24, 24)), constant_values=255), "is it inverted?"),
    ],
)
def test_a_doubtful_mask_is_a_warning(folder, mask, message):
    Image.fromarray(mask).save(folder / "masks" / "cat.png")
    ((severity, name, text),) = problems_of(folder)
    assert (severity, name) == ("warning", "cat.png")
    assert message in text


def test_masked_loss_without_any_mask_is_an_error(folder, capsys):
    folders = [folder / name for name in ("cutouts", "reg")]
    text = "".join(f"[[datasets.subsets]]\nimage_dir={str(path)!r}\nclass_tokens='a'\n" for path in folders)
    (folder / "dataset.toml").write_text(f"[[datasets]]\nresolution=64\n{text}", encoding="utf-8")
    assert check(folder) == 0
    assert "masks: none; all 3 images are learnt whole" in capsys.readouterr().out
    assert check(folder, "--masked_loss") == 1
    assert "--masked_loss: none of the 3 images has a mask" in capsys.readouterr().out


def test_the_caption_is_shown_as_far_as_it_is_certain(folder):
    (folder / "photos" / "cat.txt").write_text("k ||| {a|b}, c\nd", encoding="utf-8")
    write_config(
        folder,
        photos="enable_wildcard=true\nshuffle_caption=true\ncaption_dropout_rate=1\ncaption_prefix='p,'\n"
        "keep_tokens_separator='|||'",
    )
    assert findings(folder)["images"][0]["caption"] == "p, k, {a|b}, c\np, d"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_config", "absent.toml"], "absent.toml: there is no such file"),
        (["--resolution", "512"], "There is no dataset: give --dataset_config=FILE"),
        (["--train_data_dir", "absent", "--resolution", "512"], "there is no folder absent"),
        (["--keep_token_separator", "x"], "Did you mean --keep_tokens_separator?"),
    ],
)
def test_options_that_cannot_be_used_end_with_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_options_of_training_and_its_config_file_are_understood(folder, capsys):
    text = f"dataset_config = {str(folder / 'dataset.toml')!r}\ntrain_batch_size = 4\nlearning_rate = 1e-4\n"
    (folder / "training.toml").write_text(text, encoding="utf-8")
    assert main(["--config_file", str(folder / "training.toml"), "--output_name", "x"]) == 0
    assert "batch size 4" in capsys.readouterr().out


def test_the_contact_sheet_shows_the_picture_and_veils_what_is_not_learnt(folder):
    path = folder / "new" / "sheet.png"
    assert check(folder, "--contact_sheet", str(path)) == 0
    with Image.open(path) as sheet:
        sheet = sheet.convert("RGB")
        heading = contact_sheet.LINE_HEIGHT + contact_sheet.GAP
        middle = heading + contact_sheet.SIDE // 2
        left = contact_sheet.GAP + contact_sheet.SIDE // 2
        right = left + contact_sheet.SIDE + contact_sheet.GAP
        assert sheet.getpixel((left - 10, middle)) == (200, 100, 50)
        assert sheet.getpixel((right + 10, middle)) == (200, 100, 50)
        veiled = sheet.getpixel((right - 10, middle))
    strength, veil = contact_sheet.VEIL_STRENGTH, contact_sheet.VEIL
    assert veiled == pytest.approx(np.array([200, 100, 50]) * (1 - strength) + veil * strength, abs=1)


def test_a_contact_sheet_of_many_pictures_takes_some_of_all(folder, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MOST_PICTURES", 2)
    path = folder / "sheet.png"
    assert check(folder, "--contact_sheet", str(path)) == 0
    with Image.open(path) as sheet:
        assert sheet.width == 2 * (contact_sheet.CELL_WIDTH + 2 * contact_sheet.GAP) + contact_sheet.GAP
        assert sheet.height < 2 * contact_sheet.CELL_HEIGHT


def test_a_picture_that_cannot_be_drawn_is_an_error_and_the_others_are_drawn(folder, capsys):
    damage_pixels(folder / "photos" / "cat.png")
    assert check(folder, "--contact_sheet", str(folder / "sheet.png")) == 1
    assert "cat.png: cannot be decoded" in capsys.readouterr().out
    assert (folder / "sheet.png").is_file()


def test_a_file_that_cannot_be_written_ends_with_2(folder, capsys):
    (folder / "taken").touch()
    assert check(folder, "--json", str(folder / "taken" / "out.json")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_needs_no_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None; from tools.check_dataset import main; "
        "sys.exit(main(['--dataset_config', 'dataset.toml', '--contact_sheet', 'sheet.png', '--json', 'out.json']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True).returncode == 0
    )


def test_the_command_runs_from_any_folder(folder):
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), "--dataset_config", "dataset.toml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0
    assert "an epoch: 4 images" in done.stdout


def test_what_is_held_back_is_told_and_listed_last(folder, capsys):
    out = folder / "out.json"
    argv = ["--dataset_config", str(folder / "dataset.toml"), "--validation_split", "0.5", "--json", str(out)]
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "cutouts: 1 image with 1 repeat, 1 held back" in told
    assert "held back for validation: 1 image" in told
    assert "masks: 2 of 4 images" in told
    listed = json.loads(out.read_text(encoding="utf-8"))["images"]
    assert [entry.get("is_validation", False) for entry in listed] == [False, False, False, True]
    assert listed[-1]["num_repeats"] == 1
