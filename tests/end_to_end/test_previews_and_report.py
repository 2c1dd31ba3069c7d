"""What a run shows of itself: previews, curves, and the report."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import Family, Pictures, Trained, arguments, events_of, subset, write_toml
from PIL import Image


@pytest.fixture(scope="module")
def shown(family: Family, pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of four steps, two epochs, with previews, TensorBoard and a report. Do not change its files."""
    folder = tmp_path_factory.mktemp("shown")
    prompts = folder / "prompts.txt"
    prompts.write_text(
        "# comment\na cat --n dog --w 64 --h 128 --d 5 --s 2 --l 3\na <b>bold</b> dog --w 64 --h 64 --s 2\n"
    )
    previews = ["--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", 2]
    more = [*previews, "--sample_sampler", "euler_a", "--report", "--unet_lr", "2e-3", "--masked_loss"]
    argv = arguments(family, folder, masks_and_alpha(folder, pictures), "--max_train_steps", 4, *more)
    assert family.run(*argv) == 0
    return Trained(folder, tuple(argv))


def stamps(run: Trained) -> list[str]:
    return sorted({path.name.split("_")[1] for path in (run.folder / "out" / "sample").iterdir()})


# ---- previews --------------------------------------------------------------------------------------------------


def test_previews_are_named_after_run_place_prompt_time_and_seed(shown: Trained):
    names = sorted(path.name for path in (shown.folder / "out" / "sample").iterdir())
    assert len(names) == 6
    pattern = r"lora_(e000000|000002|000004)_(00_\d{14}_5|01_\d{14})\.png"
    assert [name for name in names if not re.fullmatch(pattern, name)] == []


def test_previews_come_at_first_and_every_n_steps(shown: Trained):
    assert stamps(shown) == ["000002", "000004", "e000000"]


def test_a_preview_has_the_size_of_its_prompt(shown: Trained):
    sizes = {}
    for path in (shown.folder / "out" / "sample").iterdir():
        with Image.open(path) as image:
            sizes[path.name.split("_")[2]] = image.size
    assert sizes == {"00": (64, 128), "01": (64, 64)}


def test_training_shows_in_the_previews(shown: Trained):
    pixels = []
    for stamp in ("e000000", "000004"):
        (path,) = (shown.folder / "out" / "sample").glob(f"lora_{stamp}_00_*")
        with Image.open(path) as image:
            pixels.append(np.asarray(image))
    assert (pixels[0] != pixels[1]).any()


def test_previews_come_every_n_epochs(train, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))
    every = ("--sample_prompts", prompts, "--sample_every_n_epochs", 2)
    assert stamps(train(config, *every, "--max_train_epochs", 4)) == ["e000002", "e000004"]


# ---- TensorBoard -----------------------------------------------------------------------------------------------


def test_tensorboard_has_the_curves_that_sd_scripts_writes(shown: Trained):
    tags = events_of(shown.folder / "logs").Tags()["scalars"]
    expected = {"loss/current", "loss/average", "loss/epoch_average", "lr/unet", "lr/textencoder"}
    assert set(tags) >= expected
    assert shown.curve("lr/unet") == pytest.approx([2e-3] * 4)
    assert shown.curve("lr/textencoder") == pytest.approx([1e-3] * 4)


def test_the_average_is_over_the_last_epochs_worth_of_steps(shown: Trained):
    losses = shown.losses
    assert len(losses) == 4
    expected = [losses[0], sum(losses[:2]) / 2, sum(losses[1:3]) / 2, sum(losses[2:4]) / 2]
    assert shown.curve("loss/average") == pytest.approx(expected, rel=1e-6)
    assert shown.curve("loss/epoch_average") == pytest.approx([expected[1], expected[3]], rel=1e-6)


def test_tensorboard_has_the_previews(shown: Trained):
    assert set(events_of(shown.folder / "logs").Tags()["images"]) == {"sample_0", "sample_1"}


# ---- the report ------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects whatever a page names to be fetched, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


@pytest.fixture(scope="module")
def report(shown: Trained) -> str:
    """The report's text."""
    return (shown.folder / "out" / "lora-report.html").read_text(encoding="utf-8")


def test_the_report_stands_alone(report: str):
    links = Links()
    links.feed(report)
    assert {link.partition(":")[0] for link in links.links} == {"data"}
    assert "script" not in links.tags
    assert "://" not in re.sub(r'xmlns="http://www\.w3\.org/[^"]*"', "", report)


def test_the_report_shows_every_preview_and_what_the_masks_let_through(report: str):
    links = Links()
    links.feed(report)
    assert len([link for link in links.links if link.startswith("data:image/")]) == 6 + 1


def test_the_report_says_what_the_masks_do_and_what_was_made(report: str, shown: Trained):
    assert "masks: 4 of 4 images (2 files, 2 alpha), mean weight 0.50" in report
    assert "lora.safetensors" in report
    assert str(shown.folder / "prompts.txt") in report
    assert "unet_lr" in report
    assert "<b>bold</b>" not in report  # what a prompt holds is text, not HTML


def test_the_report_tells_when_the_run_began_and_ended(report: str):
    times = dict(re.findall(r">(Started|Finished)</th><td>([^<]+)<", report))
    assert set(times) == {"Started", "Finished"}
    assert times["Started"] < times["Finished"]


def test_the_contact_sheet_lies_beside_the_model(shown: Trained):
    assert shown.names("*.png") == ["lora-masks.png"]
    with Image.open(shown.folder / "out" / "lora-masks.png") as sheet:
        assert min(sheet.size) >= 64


def test_without_report_there_is_none(plain_run: Trained):
    assert plain_run.names("*.html") == []
    assert not Path(plain_run.folder / "out" / "sample").exists()
