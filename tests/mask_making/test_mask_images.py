import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset import config, scan
from library.dataset.images import ORIENTATION
from library.mask_making import making, review, summary
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions
from tests.mask_making.tiny_networks import write_network
from tools.mask_images import main

ROOT = Path(__file__).resolve().parents[2]


def save(path: Path, *, width: int = 48, height: int = 32, learnt: int = 24, **settings) -> Path:
    """Write a picture that is opaque and white in its left part, and transparent and black in the rest."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, :learnt] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if path.suffix == ".png" else image.convert("RGB")).save(path, **settings)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with two cut-outs, and one in a folder within."""
    for name in ("a.png", "b.png", "sub/c.png"):
        save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.asarray(image)


def test_masks_lie_as_their_pictures_do_and_are_grey(pictures, tmp_path, capsys):
    assert run(pictures, tmp_path / "masks", "--from_alpha") == 0
    assert tree(tmp_path / "masks") == ["a.png", "b.png", "sub/c.png"]
    mask = mask_of(tmp_path / "masks" / "sub" / "c.png")
    assert (mask[:, :24] == 255).all()
    assert (mask[:, 24:] == 0).all()
    assert "masks: 3 made, 0 kept, 0 not made, 0 empty, 0 full" in capsys.readouterr().out


def test_masks_go_beside_the_pictures_if_no_folder_is_named(pictures, tmp_path):
    assert run(f"{pictures}{os.sep}", "--from_alpha") == 0
    assert len(tree(tmp_path / "pictures_mask")) == 3


def test_masks_of_a_folder_named_by_two_dots_go_beside_it(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures / "sub")
    assert run("..", "--from_alpha") == 0
    assert len(tree(tmp_path / "pictures_mask")) == 3


def test_training_finds_every_mask_that_was_made(pictures, tmp_path):
    masks = tmp_path / "masks"
    save(pictures / "turned.jpg", exif=exif_of(6))
    assert run(pictures, masks, "--threshold", 128) == 0
    subsets = [(pictures, masks), (pictures / "sub", masks / "sub")]
    lines = [f"[[datasets.subsets]]\nimage_dir = {str(a)!r}\nconditioning_data_dir = {str(b)!r}\n" for a, b in subsets]
    path = tmp_path / "dataset.toml"
    path.write_text(
        "[general]\nclass_tokens = 'cat'\nenable_bucket = true\n[[datasets]]\nresolution = 256\n" + "".join(lines),
        encoding="utf-8",
    )
    found = scan.scan(config.load(DatasetOptions(dataset_config=path), CaptionOptions(), MaskOptions()))
    assert {sample.path.stem: sample.mask.path for sample in found.samples} == {
        "a": masks / "a.png",
        "b": masks / "b.png",
        "turned": masks / "turned.png",
        "c": masks / "sub" / "c.png",
    }
    assert not found.problems


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def test_a_mask_is_turned_as_its_picture_is_seen(tmp_path):
    save(tmp_path / "pictures" / "a.jpg", exif=exif_of(6))
    run(tmp_path / "pictures", tmp_path / "masks", "--threshold", 128)
    mask = mask_of(tmp_path / "masks" / "a.png")
    assert mask.shape == (48, 32)
    assert (mask[4], mask[44]) == (pytest.approx(255), pytest.approx(0))


def test_a_second_run_keeps_what_is_there_and_makes_the_rest(pictures, tmp_path, capsys):
    masks = tmp_path / "masks"
    run(pictures, masks, "--from_alpha")
    kept = (masks / "a.png").stat().st_mtime_ns
    (masks / "b.png").unlink()
    (masks / "sub" / "c.png").write_bytes((masks / "sub" / "c.png").read_bytes()[:50])  # cut short by another program
    assert run(pictures, masks, "--from_alpha", "--invert") == 0
    assert "masks: 2 made, 1 kept" in capsys.readouterr().out
    assert (masks / "a.png").stat().st_mtime_ns == kept
    assert mask_of(masks / "b.png")[0, 0] == 0
    assert mask_of(masks / "sub" / "c.png")[0, 0] == 0


def test_a_mask_of_another_shape_than_its_picture_is_made_anew(pictures, tmp_path):
    Image.new("L", (32, 32)).save((tmp_path / "masks").mkdir() or tmp_path / "masks" / "a.png")
    run(pictures, tmp_path / "masks", "--from_alpha")
    assert mask_of(tmp_path / "masks" / "a.png").shape == (32, 48)


def test_overwriting_makes_every_mask_anew(pictures, tmp_path, capsys):
    run(pictures, tmp_path / "masks", "--from_alpha")
    assert run(pictures, tmp_path / "masks", "--from_alpha", "--invert", "--overwrite") == 0
    assert "masks: 3 made, 0 kept" in capsys.readouterr().out.splitlines()[1]
    assert mask_of(tmp_path / "masks" / "a.png")[0, 0] == 0


def test_a_dry_run_says_what_it_would_make_and_makes_nothing(pictures, tmp_path, capsys):
    assert run(pictures, tmp_path / "masks", "--from_alpha", "--dry_run") == 0
    said = capsys.readouterr().out
    assert f"sub/c.png -> {tmp_path / 'masks' / 'sub' / 'c.png'}" in said
    assert "masks: 3 to be made, 0 to be kept" in said
    assert not (tmp_path / "masks").exists()


def test_boxes_come_off_the_masks_that_are_there(pictures, tmp_path):
    masks, listed = tmp_path / "masks", tmp_path / "boxes.csv"
    listed.write_text("*,-48,0,8,8\n", encoding="utf-8")
    run(pictures, masks, "--from_alpha")
    for _ in range(2):  # to run it again changes nothing
        assert run(pictures, masks, "--boxes", listed, "--combine", "intersect") == 0
        mask = mask_of(masks / "a.png")
        assert mask.sum() == 255 * (24 * 32 - 64)
        assert (mask[:8, :8] == 0).all()


def test_old_masks_in_another_folder_are_left_alone(pictures, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    run(pictures, old, "--from_alpha")
    before = {name: (old / name).read_bytes() for name in tree(old)}
    assert run(pictures, new, "--threshold", 1, "--invert", "--combine", "add", "--combine_with", old) == 0
    assert (mask_of(new / "a.png") == 255).all()
    assert {name: (old / name).read_bytes() for name in tree(old)} == before


def test_an_old_mask_may_be_a_rescaled_copy_but_not_of_another_shape(pictures, tmp_path, capsys):
    old = tmp_path / "old"
    (old / "sub").mkdir(parents=True)
    Image.new("L", (96, 64), 255).save(old / "a.png")
    Image.new("L", (64, 64), 255).save(old / "b.png")
    command = (pictures, tmp_path / "new", "--from_alpha", "--combine", "add", "--combine_with", old)
    assert run(*command) == 1
    assert (mask_of(tmp_path / "new" / "a.png") == 255).all()
    shown = capsys.readouterr()
    assert "b.png: is 64x64, its picture b.png is 48x32. Make both the same size." in shown.err
    assert "2 made, 0 kept, 1 not made" in shown.out


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_done(pictures, tmp_path, capsys):
    (pictures / "b.png").write_bytes(b"no picture")
    assert run(pictures, tmp_path / "masks", "--from_alpha") == 1
    shown = capsys.readouterr()
    assert "2 made, 0 kept, 1 not made" in shown.out
    assert shown.err.count("error:") == 1
    assert "b.png: cannot be decoded" in shown.err
    assert tree(tmp_path / "masks") == ["a.png", "sub/c.png"]


def test_two_pictures_of_one_stem_are_named(pictures, tmp_path, capsys):
    save(pictures / "a.jpg")
    assert run(pictures, tmp_path / "masks", "--from_alpha") == 1
    assert "a.jpg: has the name of a.png, and all of them would have the mask a.png" in capsys.readouterr().err
    assert tree(tmp_path / "masks") == ["b.png", "sub/c.png"]


def test_empty_full_and_faint_masks_are_named(tmp_path, capsys):
    folder = tmp_path / "pictures"
    save(folder / "none.png", learnt=0)
    save(folder / "all.png", learnt=48)
    save(folder / "some.png")
    half = np.full((32, 48, 4), 100, np.uint8)
    Image.fromarray(half).save(folder / "half.png")
    save(folder / "opaque.jpg")
    run(folder, tmp_path / "masks", "--from_alpha")
    said = capsys.readouterr().out
    assert "masks: 5 made, 0 kept, 0 not made, 1 empty, 2 full" in said
    assert "  empty, nothing of them would be learnt: none.png" in said
    assert "  full, nothing of them is masked out: all.png, opaque.jpg" in said
    assert "  faint, nothing of them counts more than half: half.png" in said
    assert "  opaque.jpg: has no transparency" in said
    assert "some.png" not in said


def test_many_doubts_are_counted(tmp_path):
    def outcome(number: int) -> making.Outcome:
        return making.Outcome(making.Job(Path(), f"{number:02}", Path(), Path()), "made", doubt=f"odd by {number}")

    said = summary.lines([outcome(number) for number in range(25)])
    assert said[1] == "  00: odd by 0"
    assert said[-1] == "  5 more are doubtful; --sheet shows them"


def test_names_in_a_list_of_boxes_that_no_picture_has_are_warned_about(pictures, tmp_path, capsys):
    (tmp_path / "boxes.csv").write_text("bb.png,1,1,9,9\nc,1,1,9,9\n", encoding="utf-8")
    assert run(pictures, tmp_path / "masks", "--boxes", tmp_path / "boxes.csv") == 0
    shown = capsys.readouterr()
    assert "no picture is named bb.png (is b.png meant?)" in shown.err
    assert "  a.png, b.png: has no box in the list" in shown.out


def test_a_folder_of_masks_within_the_pictures_is_not_masked_again(pictures):
    for _ in range(2):
        assert run(pictures, pictures / "masks", "--from_alpha", "--overwrite") == 0
    assert tree(pictures / "masks") == ["a.png", "b.png", "sub/c.png"]


def test_a_link_to_the_folder_above_is_walked_once(pictures, tmp_path):
    (pictures / "again").symlink_to(pictures, target_is_directory=True)
    run(pictures, tmp_path / "masks", "--from_alpha")
    assert tree(tmp_path / "masks") == ["a.png", "b.png", "sub/c.png"]


def test_a_model_masks_a_folder(pictures, tmp_path):
    network = write_network(tmp_path / "n.onnx")
    assert run(pictures, tmp_path / "masks", "--model", network, "--engine", "opencv", "--batch_size", 2) == 0
    # what is transparent is white for a model: all of the picture is
    assert len(tree(tmp_path / "masks")) == 3
    save(tmp_path / "photos" / "d.jpg")
    run(tmp_path / "photos", tmp_path / "masks", "--model", network)
    mask = mask_of(tmp_path / "masks" / "d.png")
    assert (mask[:, :20] > 250).all()
    assert (mask[:, 28:] < 5).all()


def test_a_model_that_cannot_be_run_stops_all_with_one_line(pictures, tmp_path, capsys):
    network = write_network(tmp_path / "n.onnx", weights=((1, 0, 0), (0, 1, 0)))
    assert run(pictures, tmp_path / "masks", "--model", network) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_the_sheet_shows_picture_mask_and_veil_side_by_side(pictures, tmp_path):
    assert run(pictures, tmp_path / "masks", "--from_alpha", "--sheet", tmp_path / "sheet.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    top, left, side = review.LINE_HEIGHT + 2 * review.GAP, review.GAP, review.SIDE + review.GAP
    learnt = [tuple(sheet[top, left + number * side + 40]) for number in range(3)]
    out = [tuple(sheet[top, left + number * side + 200]) for number in range(3)]
    assert learnt == [(255, 255, 255)] * 3
    assert out[0] in {(grey, grey, grey) for grey in review.CHECK_GREYS}  # transparent
    assert out[1] == (0, 0, 0)
    assert out[2][0] > 2 * out[2][1]  # red


def test_the_sheet_has_the_doubtful_masks_first_and_others_spread_over_the_rest():
    def outcome(number: int) -> making.Outcome:
        job = making.Job(Path(f"{number:03}"), f"{number:03}", Path(), Path())
        return making.Outcome(job, "failed" if number == 7 else "made", doubt="odd" if number == 90 else "")

    shown = [each.job.name for each in review.chosen([outcome(number) for number in range(100)], most=11)]
    assert shown[0] == "090"
    assert len(shown) == 11
    assert shown[1:] == sorted(shown[1:])
    assert int(shown[-1]) >= 89


WRONG = {
    "no source": ([], "what the masks are made from is missing. Give one of --from_alpha, --from_color"),
    "two sources": (["--from_alpha", "--threshold", "9"], "--from_alpha and --threshold cannot be used together"),
    "an option of another source": (["--from_alpha", "--preset", "u2net"], "--preset belongs to --model"),
    "a tolerance without a colour": (["--threshold", "9", "--tolerance", "0"], "--tolerance belongs to --from_color"),
    "a misspelt option": (["--from_alfa"], "there is no option --from_alfa. Did you mean --from_alpha?"),
    "a word too many": (["masks", "--from_alpha", "odd"], "'odd' belongs to no option"),
    "a brightness that is none": (["--threshold", "300"], "--threshold must be at least 1 and at most 255, got 300"),
    "a colour that is none": (["--from_color", "pinkish"], "--from_color: 'pinkish' is no colour"),
    "a model that is not there": (["--model", "gone.onnx"], "--model: there is no file gone.onnx"),
    "a preset that is none": (["--model", "a.onnx", "--preset", "u2nt"], "Did you mean u2net?"),
    "old masks and no way to combine": (["--from_alpha", "--combine_with", "old"], "Add --combine add"),
    "old masks that are not there": (
        ["--from_alpha", "--combine", "add", "--combine_with", "gone"],
        "--combine_with gone: there is no such folder",
    ),
    "a sheet that cannot be written": (["--from_alpha", "--sheet", f"{__file__}/a.png"], "a.png: cannot be written"),
    "a sheet that is no PNG": (["--from_alpha", "--sheet", "a.jpg"], "--sheet a.jpg: the ending must be .png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(case, pictures, capsys):
    arguments, message = WRONG[case]
    assert run(pictures, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ("gone", "masks", "gone: there is no such folder"),
        ("pictures/a.png", "masks", "a.png: is a file. Name its folder"),
        ("pictures", "pictures", "is the folder of the pictures"),
        ("pictures", "pictures/a.png", "is a file. Name a folder for the masks"),
        ("empty", "masks", "empty: has no picture in it"),
    ],
)
def test_folders_that_cannot_be_used_are_named(images, masks, message, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / images, tmp_path / masks, "--from_alpha") == 2
    assert message in capsys.readouterr().err


def test_a_mask_folder_that_takes_no_files_fails_each_picture(pictures, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "sub").write_bytes(b"a file where a folder is needed")
    assert run(pictures, tmp_path / "masks", "--from_alpha") == 1
    assert "c.png: cannot be written" in capsys.readouterr().err
    assert tree(tmp_path / "masks") == ["a.png", "b.png", "sub"]


def test_help_names_every_option_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "mask_images.py PICTURES [MASKS]" in said
    assert "--min_area" in said
    assert "examples:" in said


def test_a_killed_run_leaves_whole_masks_and_is_gone_on_with(tmp_path):
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 4), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "000.png", compress_level=0)
    for number in range(1, 24):
        (folder / f"{number:03}.png").write_bytes((folder / "000.png").read_bytes())
    command = [sys.executable, str(ROOT / "tools" / "mask_images.py"), str(folder), str(masks), "--from_alpha"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(masks.glob("0*.png"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = sorted(masks.glob("0*.png"))
    assert 2 <= len(made) < 24
    for path in made:
        np.testing.assert_array_equal(mask_of(path), noise[..., 3])
    assert run(folder, masks, "--from_alpha") == 0
    assert len(list(masks.glob("0*.png"))) == 24


def test_what_a_killed_run_left_is_taken_away_once_it_is_old(pictures, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    old, young = masks / ".a.123.part.png", masks / ".b.124.part.png"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(pictures, masks, "--from_alpha")
    assert not old.exists()
    assert young.exists()
