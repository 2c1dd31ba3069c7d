"""The commands of the guide to full DreamBooth, as it shows them but for paths and what a GPU has, train and save."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import ROOT, Pictures, tensors_of
from tiny_models import tiny_sd15

from library.cli import main

GUIDE = (ROOT / "docs" / "train_db.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```\naccelerate launch .*?train_db\.py (.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
CONFIG = re.search(r"^```toml\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
SMALL = ("--resolution=64", "--train_batch_size=2", "--min_bucket_reso=64", "--max_train_steps=20")  # of old-style ones


@pytest.fixture
def place(pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out all that the guide's commands name, in the folder where they run."""
    pytest.importorskip("bitsandbytes")
    shutil.copy(tiny_sd15(), tmp_path / "sd15.safetensors")
    shutil.copytree(pictures.photos, tmp_path / "pictures")
    shutil.copytree(pictures.photo_masks, tmp_path / "pictures_mask")
    for name, folder in (("cats", "cats"), ("train/2_sks cat", "photos"), ("reg/1_cat", "cats")):
        source = pictures.photos if folder == "photos" else pictures.regularisation
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.txt"))
    assert CONFIG is not None
    (tmp_path / "dataset.toml").write_text(
        CONFIG[1].replace("resolution = 512", "resolution = 64\nmin_bucket_reso = 64"), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(command: str, *more: str) -> None:
    argv = shlex.split(command.replace("\\\n", " ").replace("fp16", "bf16"))  # fp16 needs a GPU
    argv += ["--max_data_loader_n_workers=0", "--seed=1", *more]
    assert main("train_db", "library.models.sd:Sd", argv, method="library.training.full_model:FullModel") == 0


def changed_parts(before: Path, after: Path) -> set[str]:
    """Return how the names begin of tensors that a training has changed; all names and shapes must be the same."""
    old, new = tensors_of(before), tensors_of(after)
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    return {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name].to(old[name].dtype))}


def test_the_guide_has_three_commands() -> None:
    assert len(COMMANDS) == 3


def test_the_first_command_trains_unet_and_text_encoder_with_masks_and_regularisation(place: Path) -> None:
    train(COMMANDS[0], "--max_train_steps=20", "--masked_loss")
    assert [path.name for path in (place / "output").iterdir()] == ["my-cat.safetensors"]
    parts = changed_parts(place / "sd15.safetensors", place / "output" / "my-cat.safetensors")
    assert parts == {"model", "cond_stage_model"}


@pytest.mark.slow
def test_the_old_style_command_trains_from_folders(place: Path) -> None:
    train(COMMANDS[1], *SMALL)
    parts = changed_parts(place / "sd15.safetensors", place / "output" / "my-cat.safetensors")
    assert parts == {"model", "cond_stage_model"}


@pytest.mark.slow
def test_the_command_with_buckets_and_augmentation_saves_models_and_states(place: Path) -> None:
    train(COMMANDS[2], *SMALL, "--max_bucket_reso=128", "--max_train_steps=4")
    assert sorted(path.name for path in (place / "output").iterdir()) == [
        "my-cat-000001-state",
        "my-cat-000001.safetensors",
        "my-cat-state",
        "my-cat.safetensors",
    ]
    assert {
        tensor.dtype
        for name, tensor in tensors_of(place / "output" / "my-cat.safetensors").items()
        if name.startswith("model.diffusion_model.")
    } == {torch.bfloat16}
