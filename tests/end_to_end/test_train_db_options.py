"""What the options of full DreamBooth alone do to the models that are saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import Pictures, subset, tensors_of, write_toml
from tiny_models import tiny_sd15

from library.cli import main

Parts = tuple[bool, bool]  # whether the U-Net and the text encoder are others than the base model's


@pytest.fixture
def train(pictures: Pictures, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Return a function that trains for four steps and gives the tensors that are saved."""
    dataset = write_toml(tmp_path / "d.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))

    def run(*more: str, name: str = "run") -> dict[str, torch.Tensor]:
        argv = [f"--pretrained_model_name_or_path={tiny_sd15()}", f"--dataset_config={dataset}", "--seed=1"]
        argv += [f"--output_dir={tmp_path / name}", "--output_name=m", "--max_data_loader_n_workers=0"]
        argv += ["--max_train_steps=4", "--learning_rate=1e-4", *more]
        assert main("train_db", "library.models.sd:Sd", argv, method="library.training.full_model:FullModel") == 0
        return tensors_of(tmp_path / name / "m.safetensors")

    return run


def text_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("cond_stage_model.")}


def changed(tensors: dict[str, torch.Tensor]) -> Parts:
    base = tensors_of(tiny_sd15())
    names = {name.partition(".")[0] for name in base if not torch.equal(base[name], tensors[name].to(base[name].dtype))}
    assert names <= {"model", "cond_stage_model"}
    return "model" in names, "cond_stage_model" in names


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], (True, True)),
        (["--stop_text_encoder_training=0"], (True, False)),
        (["--stop_text_encoder_training=-1"], (True, False)),
        (["--learning_rate_te=0"], (True, False)),
        (["--learning_rate=0", "--learning_rate_te=1e-4"], (False, True)),
    ],
)
def test_rates_and_stop_decide_what_is_trained(train, options: list[str], parts: Parts):
    assert changed(train(*options)) == parts


def test_the_text_encoder_stays_after_its_last_step_as_it_was_then(train):
    two = train("--max_train_steps=2", name="two")
    stopped = train("--stop_text_encoder_training=2", name="stopped")
    on = train(name="on")
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in text_of(two).items())
    assert not all(torch.equal(tensor, on[name]) for name, tensor in text_of(two).items())


def test_captions_without_padding_train_otherwise(train):
    padded, unpadded = train(name="padded"), train("--no_token_padding", name="unpadded")
    assert changed(unpadded) == (True, True)
    assert not all(torch.equal(tensor, unpadded[name]) for name, tensor in padded.items())
