"""Runs on the class of the documentation: nothing of its pictures is in a file."""

import re
from pathlib import Path

import pytest
from end_to_end.conftest import Train
from end_to_end.training_runs import ROOT, Family, arguments, differing

CLASS = re.compile(r"^```python\n(.*?class Stripes:.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = ("--dataset_class", "my_pictures.Stripes", "--resolution", 64, "--train_batch_size", 2)


@pytest.fixture(autouse=True)
def my_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented class, where its module can be found."""
    found = CLASS.search((ROOT / "docs" / "datasets.md").read_text(encoding="utf-8"))
    assert found is not None
    (tmp_path / "my_pictures.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_pictures", raising=False)


def test_the_documented_class_trains_alike_with_any_number_of_loader_processes(train: Train) -> None:
    alone, two = (
        train(None, *OPTIONS, "--max_train_steps", 4, "--max_data_loader_n_workers", number, name=f"run{number}")
        for number in (0, 2)
    )
    assert not differing(two.tensors, alone.tensors)
    assert two.losses == alone.losses
    assert len(set(alone.losses)) == 4


def test_a_resumed_run_is_the_whole_one(train: Train) -> None:
    """From the middle of an epoch, over stripes that are of another width each time."""
    more = (*OPTIONS, "--max_train_steps", 5, "--shuffle_caption", "--flip_aug")
    whole = train(None, *more, "--save_state", "--save_every_n_steps", 2, name="whole")
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = train(None, *more, "--resume", state, name="resumed")
    assert not differing(resumed.tensors, whole.tensors)


def test_its_masks_count_and_are_told_of(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    masked = train(None, *OPTIONS, "--masked_loss", "--max_train_steps", 1, "--report", name="masked")
    assert "masks: 6 of 6 images (6 of the class), mean weight 0.50" in capfd.readouterr().err
    source = masked.folder.parent / "my_pictures.py"
    source.write_text(source.read_text().replace('"mask": mask', '"mask": None'))
    __import__("sys").modules.pop("my_pictures")
    whole = train(None, *OPTIONS, "--max_train_steps", 1, name="whole")
    assert masked.losses[0] < 0.75 * whole.losses[0]


def test_its_pictures_are_shown_without_a_model(family: Family, tmp_path: Path) -> None:
    assert family.run(*OPTIONS, "--debug_dataset", "--output_dir", tmp_path / "shown") == 0
    assert len(list((tmp_path / "shown").glob("*-masks.png"))) == 1


def test_latents_are_not_cached_and_the_option_is_refused(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert family.run(*arguments(family, tmp_path, None, *OPTIONS, "--cache_latents")) == 2
    assert "--cache_latents cannot be with --dataset_class" in capfd.readouterr().err


def test_options_for_files_are_named_as_idle(family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more = ("--alpha_mask", "--mask_captions", "--validation_split", 0.5, "--max_train_steps", 1)
    assert family.run(*arguments(family, tmp_path, None, *OPTIONS, *more)) == 0
    said = capfd.readouterr().err
    for name in ("alpha_mask", "mask_captions", "validation_split"):
        assert f"--{name} has no effect: --dataset_class makes the images" in said
