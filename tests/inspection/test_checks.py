"""Checks that look at more than one file, or that need settings of their own; and what training tells of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from inspection.planted import Folder, ellipse, scene
from PIL import Image

from library.options import read_training
from library.training import data as training_data
from tools import check_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Three good pictures with masks, in a folder "pets"."""
    made = Folder(tmp_path, "pets")
    for stem in ("ant", "bee", "cow"):
        made.good(stem)
    return made


def config(folder: Folder, settings: str = "", *, more: str = "", dataset: str = "") -> Path:
    """Write a config of the folder, and return its path."""
    text = f"[[datasets]]\nresolution = [160, 128]\ncaption_extension = '.txt'\n{dataset}\n[[datasets.subsets]]\n"
    text += f"image_dir = {str(folder.images)!r}\nconditioning_data_dir = {str(folder.masks)!r}\n{settings}\n{more}"
    path = folder.images.parent / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def found(path: Path, *flags: str) -> list[tuple[str, str]]:
    """Return code and file of every problem."""
    out = path.with_name("out.json")
    check_dataset.main(["--dataset_config", str(path), "--json", str(out), *flags])
    problems = json.loads(out.read_text(encoding="utf-8"))["problems"]
    return [(each["code"], Path(each["path"]).name) for each in problems]


def subset(folder: Path, settings: str = "") -> str:
    return f"[[datasets.subsets]]\nimage_dir = {str(folder)!r}\n{settings}\n"


def test_a_picture_held_back_that_is_trained_on_too_is_told(folder, tmp_path):
    other = Folder(tmp_path, "held")
    other.good("dog")
    (other.images / "dog.png").write_bytes((folder.images / "ant.png").read_bytes())
    more = subset(other.images, "validation_split = 1.0")
    assert ("validation-leak", "dog.png") in found(config(folder, more=more))


def test_a_smaller_copy_saved_again_is_nearly_the_same_picture(folder):
    folder.good("dog")
    with Image.open(folder.images / "cow.png") as image:
        image.resize((120, 96)).save(folder.images / "dog.png")
    assert found(config(folder)) == [("image-similar", "dog.png")]


def test_masks_are_judged_as_they_are_used(folder):
    ellipse(inverted=True).save(folder.masks / "ant.png")
    assert found(config(folder)) == [("mask-inverted", "ant.png")]
    for stem in ("bee", "cow"):
        ellipse(inverted=True).save(folder.masks / f"{stem}.png")
    assert found(config(folder, "mask_invert = true")) == []


def test_strokes_that_are_grown_as_advised_are_not_told_of_again(folder):
    mask = np.zeros((128, 160), np.uint8)
    mask[21:122:20, 8:150] = 255
    folder.mask("ant", mask)
    path = config(folder)
    assert found(path) == [("mask-thin", "ant.png")]
    advice = json.loads(path.with_name("out.json").read_text(encoding="utf-8"))["problems"][0]["remedy"]
    setting = advice.removeprefix("Set ").partition(" in the subset")[0]
    assert found(config(folder, setting)) == []


def test_a_tag_that_is_dropped_with_its_mask_is_not_told_of(folder):
    folder.caption("bee", "a bee, Watermark")
    assert found(config(folder)) == [("caption-names-masked", "bee.png")]
    assert found(config(folder, "mask_drop_tags = ['watermark']")) == []


def test_a_word_in_a_sentence_is_told_without_advice_to_drop_the_sentence(folder, capsys):
    folder.caption("ant", "an ant on a leaf beside a small watermark of the shop")
    assert found(config(folder)) == [("caption-names-masked", "ant.png")]
    printed = capsys.readouterr().out
    assert 'its caption names "watermark", which is learnt nowhere if the mask leaves it out. Take it out' in printed
    assert "mask_drop_tags" not in printed


def test_a_tag_of_the_background_is_told_of_where_the_mask_leaves_the_border_out(folder):
    folder.caption("bee", "a bee, grey background")
    assert found(config(folder)) == [("caption-names-masked", "bee.png")]
    Image.fromarray(np.pad(np.zeros((64, 80), np.uint8), ((0, 64), (0, 80)), constant_values=255)).save(
        folder.masks / "bee.png"
    )
    assert found(config(folder)) == []


def test_a_folder_for_masks_that_a_subset_names_is_not_told_of(folder):
    folder.masks.rename(folder.images.parent / "pets_mask")
    folder.masks = folder.images.parent / "pets_mask"
    assert found(config(folder)) == []


def test_most_of_a_picture_is_cut_away_without_buckets(folder):
    scene("dog", (640, 160)).save(folder.images / "dog.png")
    folder.caption("dog", "a dog")
    ellipse((640, 160)).save(folder.masks / "dog.png")
    assert found(config(folder)) == [("image-cut", "dog.png")]


@pytest.mark.parametrize("settings", ["random_crop = true", "random_placement = true"])
def test_what_each_draw_cuts_elsewhere_is_not_told_to_be_cut_away(settings, folder):
    scene("dog", (640, 160)).save(folder.images / "dog.png")
    folder.caption("dog", "a dog")
    mask = np.zeros((160, 640), np.uint8)
    mask[20:140, 20:120] = 255
    Image.fromarray(mask).save(folder.masks / "dog.png")
    assert found(config(folder)) == [("mask-cut-away", "dog.png")]
    assert found(config(folder, settings)) == []


def test_a_mask_that_is_wrong_altogether_is_told_of_a_placed_picture_too(folder):
    for stem, grey in (("ant", 0), ("bee", 255)):
        Image.fromarray(np.full((128, 160), grey, np.uint8)).save(folder.masks / f"{stem}.png")
    settings = "random_placement = true\nplacement_scale = [0.3, 0.3]"
    assert found(config(folder, settings)) == [("mask-empty", "ant.png"), ("mask-full", "bee.png")]


def test_the_background_of_a_placed_picture_is_not_the_canvas_around_it(folder):
    Image.fromarray(np.full((128, 160), 254, np.uint8)).save(folder.masks / "ant.png")
    folder.caption("ant", "an ant, white background")
    assert found(config(folder, "random_placement = true\nplacement_scale = [0.5, 0.5]")) == []


def test_a_name_that_is_not_utf_8_is_written_as_it_may_be(folder):
    try:
        odd = folder.images / os.fsdecode(b"caf\xe9.png")
        scene("dog").save(odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    page = folder.images.parent / "page.html"
    problems = found(config(folder, 'missing_mask = "skip"'), "--html", str(page))
    assert ("mask-missing", odd.name) in problems
    assert "caf\\udce9.png" in page.read_text(encoding="utf-8")


def test_of_many_warnings_of_a_kind_some_are_printed(folder, capsys):
    for number in range(check_dataset.MOST_WARNINGS + 5):
        folder.good(f"dog{number}")
        folder.caption(f"dog{number}", "a dog, watermark")
    assert check_dataset.main(["--dataset_config", str(config(folder))]) == 0
    printed = capsys.readouterr().out
    assert f"0 errors, {check_dataset.MOST_WARNINGS + 5} warnings" in printed
    assert printed.count("its caption names") == check_dataset.MOST_WARNINGS
    assert "warning: 5 more of this kind, which --json lists [caption-names-masked]" in printed


def test_what_the_zoom_of_mask_aware_crop_cuts_is_meant(folder):
    mask = np.zeros((128, 160), np.uint8)
    mask[56:72, 70:90] = 255
    for stem in ("ant", "bee", "cow"):
        Image.fromarray(mask).save(folder.masks / f"{stem}.png")
    zoom = "mask_aware_crop = true\nmask_aware_zoom ="
    assert found(config(folder, f"{zoom} 1.9")) == []
    assert {code for code, _ in found(config(folder, f"{zoom} 3.0"))} == {"image-enlarged"}
    assert remedies(config(folder, f"{zoom} 3.0"))[0] == "Lower mask_aware_zoom, or find a larger original."


def test_what_is_placed_is_not_cut(folder):
    scene("dog", (640, 160)).save(folder.images / "dog.png")
    folder.caption("dog", "a dog")
    mask = np.zeros((160, 640), np.uint8)
    mask[40:120, :160] = 255
    Image.fromarray(mask).save(folder.masks / "dog.png")
    assert [code for code, _ in found(config(folder))] == ["mask-cut-away"]
    assert found(config(folder, "random_placement = true")) == []


def remedies(path: Path) -> list[str]:
    found(path)
    problems = json.loads(path.with_name("out.json").read_text(encoding="utf-8"))["problems"]
    return [each["remedy"] for each in problems if each["severity"] != "note"]


def test_what_is_cut_away_is_not_mended_by_what_is_on_already(folder):
    scene("dog", (640, 160)).save(folder.images / "dog.png")
    folder.caption("dog", "a dog")
    ellipse((640, 160)).save(folder.masks / "dog.png")
    buckets = "enable_bucket = true\nmin_bucket_reso = 128\nmax_bucket_reso = 192"
    assert remedies(config(folder))[0].startswith("Set enable_bucket = true")
    assert remedies(config(folder, dataset=buckets))[0].startswith("Set smaller bucket_reso_steps")
    mask = np.zeros((160, 640), np.uint8)
    mask[40:120, :160] = 255
    Image.fromarray(mask).save(folder.masks / "dog.png")
    assert remedies(config(folder))[0] == "Set mask_aware_crop = true or enable_bucket = true."
    assert remedies(config(folder, dataset=buckets))[0] == "Set mask_aware_crop = true."
    mask[40:120, :] = 255
    Image.fromarray(mask).save(folder.masks / "dog.png")
    assert remedies(config(folder, "mask_aware_crop = true"))[0] == "There is more room with enable_bucket."
    told = remedies(config(folder, "mask_aware_crop = true", dataset=buckets))[0]
    assert told == "There is more room with smaller bucket_reso_steps, or a wider range of bucket sides."


def test_the_weights_told_are_those_of_training(folder):
    out = folder.images.parent / "out.json"
    found(config(folder))
    plain = [each["mask"]["mean_weight"] for each in json.loads(out.read_text(encoding="utf-8"))["images"]]
    found(config(folder, "mask_weight_min = 0.5"))
    raised = [each["mask"]["mean_weight"] for each in json.loads(out.read_text(encoding="utf-8"))["images"]]
    assert all(0.5 < high > low for high, low in zip(raised, plain, strict=True))
    found(config(folder, "random_placement = true\nplacement_scale = [0.4, 0.4]\nmask_weight_min = 0.5"))
    placed = [each["mask"]["mean_weight"] for each in json.loads(out.read_text(encoding="utf-8"))["images"]]
    assert all(share < 0.17 for share in placed)  # the canvas that the picture leaves free weighs nothing


def test_masked_loss_without_masks_is_an_error_with_its_code(folder, tmp_path):
    path = tmp_path / "bare.toml"
    head = "[[datasets]]\nresolution = [160, 128]\ncaption_extension = '.txt'\n"
    folder.masks.rename(tmp_path / "elsewhere")
    path.write_text(head + subset(folder.images), encoding="utf-8")
    assert ("masked-loss-idle", "pets") in found(path, "--masked_loss")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("10_dog", "It looks like one itself: give the folder that it lies in"), ("dogs", "Move its images into one, or")],
)
def test_a_folder_a_level_off_on_the_command_line_is_refused_with_the_right_one(name, hint, tmp_path, capsys):
    (tmp_path / name).mkdir()
    scene("dog").save(tmp_path / name / "dog.png")
    assert check_dataset.main(["--train_data_dir", str(tmp_path / name), "--resolution", "64"]) == 2
    assert hint in capsys.readouterr().err


def test_pictures_of_a_class_are_looked_at_too(tmp_path, monkeypatch):
    code = (
        "import numpy as np\nclass Squares:\n    def __init__(self, *_): pass\n    def __len__(self): return 2\n"
        "    def __getitem__(self, index):\n        mask = np.full((64, 64), 255 * index, np.uint8)\n"
        "        return {'image': np.full((64, 64, 3), 90, np.uint8), 'caption': 'a', 'mask': mask}\n"
    )
    (tmp_path / "squares_for_inspection.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["--dataset_class", "squares_for_inspection.Squares", "--resolution", "64"]
    argv += ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert check_dataset.main(argv) == 0
    problems = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["problems"]
    assert [each["code"] for each in problems] == ["mask-empty", "mask-full"]
    assert (tmp_path / "out.html").read_text(encoding="utf-8").count("<img") >= 4


# ---- training ------------------------------------------------------------------------------------------------------
def warnings_of_training(path: Path, caplog) -> list[str]:
    argv = ["--dataset_config", str(path), "--network_module", "networks.lora", "--output_dir", str(path.parent)]
    options = read_training([*argv, "--pretrained_model_name_or_path", "nowhere.safetensors"], "train_network").options
    caplog.clear()
    training_data.read(options, 64)
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("place", ["beside", "within"])
def test_a_folder_that_may_not_be_looked_into_stops_nobody(place, folder, monkeypatch):
    """Such as lost+found, where the pictures lie at the top of a disk of their own."""
    closed = folder.images.parent if place == "beside" else folder.images / "lost+found"
    closed.mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path="."):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    path = folder.images.parent / "dataset.toml"
    path.write_text("[[datasets]]\nresolution = [160, 128]\n" + subset(folder.images, "caption_extension = '.txt'"))
    assert check_dataset.main(["--dataset_config", str(path)]) == 0


def test_training_tells_what_is_found_without_a_look_at_the_pixels(folder, caplog):
    folder.caption("bee", "a bee, watermark")
    folder.caption("cow", "a cow, signature")
    folder.mask("ant", np.zeros((128, 160), np.uint8))  # only a look at the pixels tells that
    (told,) = warnings_of_training(config(folder), caplog)
    assert told.startswith("2 captions of masked images name what masks leave out, like watermarks: bee.png, cow.png. ")


def test_training_tells_nothing_of_a_good_dataset_and_nothing_twice(folder, caplog):
    assert warnings_of_training(config(folder), caplog) == []
    told = warnings_of_training(
        config(folder, "mask_weight_min = 0.2\nmask_fill = 'mean'\nplacement_rotate = 3"), caplog
    )
    assert [sum(name in line for line in told) for name in ("mask_weight_min", "placement_rotate")] == [1, 1]
    (folder.masks / "nobody.png").write_bytes((folder.masks / "ant.png").read_bytes())
    (told,) = warnings_of_training(config(folder), caplog)
    assert "nobody.png: not used" in told


def test_training_tells_of_many_kinds_in_a_few_lines(folder, tmp_path, caplog):
    folder.caption("ant", "an ant, logo")
    folder.caption("bee", "fÃ¼r")
    folder.caption("cow", " \n")
    scene("tiny", (40, 32)).save(folder.images / "tiny.png")
    ellipse((40, 32)).save(folder.masks / "tiny.png")
    folder.caption("tiny", "tiny")
    scene("still").save(folder.images / "still.tif")
    (folder.images / "inner").mkdir()
    scene("inner").save(folder.images / "inner" / "inner.png")
    scene("ant again").save(folder.images / "ant.jpg")
    told = warnings_of_training(config(folder), caplog)
    assert len(told) == training_data.MOST_DOUBTS + 1
    assert told[-1] == "2 more warnings about the data set: see tools/check_dataset.py"
