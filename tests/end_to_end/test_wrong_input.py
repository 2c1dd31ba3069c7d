"""What a user gets wrong ends with exit code 2 and one line that names it, before any model is loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end.training_runs import Family, Pictures, arguments, save, subset, write_toml
from PIL import Image
from safetensors.torch import save_file


@dataclass
class Attempt:
    """A run with one thing wrong; a case changes it and returns the words that the message must hold."""

    folder: Path
    pictures: Pictures
    subset: dict[str, object]
    dataset: dict[str, object] = field(default_factory=dict)
    more: list[object] = field(default_factory=list)
    config: Path | None = None  # in place of one written from subset and dataset


Case = Callable[[Attempt], tuple[str, ...]]


def unknown_option(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--lerning_rate", "1e-4"]
    return "--lerning_rate", "Did you mean --learning_rate?"


def option_of_the_wrong_type(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--network_dim", "four"]
    return "--network_dim", "four"


def unknown_choice(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--mixed_precision", "bf61"]
    return "--mixed_precision", "bf61", "bf16"


def unknown_key_of_a_config_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "settings.toml").write_text("netwrok_dim = 4\n")
    attempt.more = ["--config_file", attempt.folder / "settings.toml"]
    return "settings.toml", "netwrok_dim", "network_dim"


def broken_config_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "settings.toml").write_text("network_dim = 4\nseed = = 3\n")
    attempt.more = ["--config_file", attempt.folder / "settings.toml"]
    return "settings.toml", "line 2"


def unknown_dataset_key(attempt: Attempt) -> tuple[str, ...]:
    attempt.subset["alpha_msk"] = True
    return "dataset.toml", "alpha_msk", "alpha_mask"


def dataset_key_of_the_wrong_type(attempt: Attempt) -> tuple[str, ...]:
    attempt.subset["num_repeats"] = "many"
    return "dataset.toml", "num_repeats", "many"


def no_dataset_config(attempt: Attempt) -> tuple[str, ...]:
    attempt.config = attempt.folder / "nowhere.toml"
    return ("nowhere.toml",)


def no_image_folder(attempt: Attempt) -> tuple[str, ...]:
    attempt.subset["image_dir"] = attempt.folder / "nowhere"
    return ("nowhere",)


def no_image_in_the_folder(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "empty").mkdir()
    attempt.subset["image_dir"] = attempt.folder / "empty"
    return "empty", "no image"


def no_resolution(attempt: Attempt) -> tuple[str, ...]:
    attempt.config = attempt.folder / "dataset.toml"
    folder = attempt.pictures.photos
    attempt.config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n")
    return ("resolution",)


def missing_mask_with_a_near_miss(attempt: Attempt) -> tuple[str, ...]:
    save(attempt.folder / "masks", "photo0", np.zeros((64, 64), np.uint8))
    save(attempt.folder / "masks", "photo1_mask", np.zeros((64, 64), np.uint8))
    attempt.subset["conditioning_data_dir"] = attempt.folder / "masks"
    return "photo1.png", "photo1_mask.png"


def mask_of_another_aspect(attempt: Attempt) -> tuple[str, ...]:
    for name in ("photo0", "photo1"):
        save(attempt.folder / "masks", name, np.zeros((64, 96), np.uint8))
    attempt.subset["conditioning_data_dir"] = attempt.folder / "masks"
    return "photo0.png", "96x64", "64x64"


def masked_loss_without_masks(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--masked_loss"]
    return "--masked_loss", "conditioning_data_dir", "alpha_mask"


def file_that_is_no_image(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "images").mkdir()
    (attempt.folder / "images" / "notes.png").write_text("no picture")
    attempt.subset["image_dir"] = attempt.folder / "images"
    return ("notes.png",)


def unknown_optimizer(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--optimizer_type", "AdamWW"]
    return "AdamWW", "AdamW"


def unknown_optimizer_argument(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--optimizer_args", "weight_decoy=0.1"]
    return "weight_decoy", "weight_decay"


def unknown_schedule(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--lr_scheduler", "cosin"]
    return "cosin", "cosine"


def unknown_network_argument(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--network_args", "conv_dimm=4"]
    return "conv_dimm", "conv_dim"


def unknown_network_module(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--network_module", "networks.lore"]
    return "networks.lore", "networks.lora"


def no_network_weights(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--network_weights", attempt.folder / "nowhere.safetensors"]
    return "--network_weights", "nowhere.safetensors"


def output_folder_that_is_a_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "taken").write_text("")
    attempt.more = ["--output_dir", attempt.folder / "taken"]
    return "--output_dir", "taken"


def prompts_that_are_not_there(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--sample_prompts", attempt.folder / "nowhere.txt", "--sample_at_first"]
    return ("nowhere.txt",)


def checkpoint_that_is_not_there(attempt: Attempt) -> tuple[str, ...]:
    attempt.more = ["--pretrained_model_name_or_path", attempt.folder / "nowhere.safetensors"]
    return ("nowhere.safetensors",)


def checkpoint_of_another_family(attempt: Attempt) -> tuple[str, ...]:
    names = ("conditioner.embedders.0.transformer.text_model.x", "model.diffusion_model.input_blocks.0.0.weight")
    save_file({name: torch.zeros(1) for name in names}, attempt.folder / "xl.safetensors")
    attempt.more = ["--pretrained_model_name_or_path", attempt.folder / "xl.safetensors"]
    return "xl.safetensors", "SDXL", "sdxl_train_network.py"


def checkpoint_that_is_a_lora(attempt: Attempt) -> tuple[str, ...]:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, attempt.folder / "lora.safetensors")
    attempt.more = ["--pretrained_model_name_or_path", attempt.folder / "lora.safetensors"]
    return "lora.safetensors", "LoRA"


def checkpoint_that_is_cut_off(attempt: Attempt) -> tuple[str, ...]:
    save_file({"model.diffusion_model.x": torch.zeros(1000)}, attempt.folder / "whole.safetensors")
    (attempt.folder / "cut.safetensors").write_bytes((attempt.folder / "whole.safetensors").read_bytes()[:1000])
    attempt.more = ["--pretrained_model_name_or_path", attempt.folder / "cut.safetensors"]
    return ("cut.safetensors",)


CASES: tuple[Case, ...] = (
    unknown_option, option_of_the_wrong_type, unknown_choice, unknown_key_of_a_config_file, broken_config_file,
    unknown_dataset_key, dataset_key_of_the_wrong_type, no_dataset_config, no_image_folder, no_image_in_the_folder,
    no_resolution, missing_mask_with_a_near_miss, mask_of_another_aspect, masked_loss_without_masks,
    file_that_is_no_image, unknown_optimizer, unknown_optimizer_argument, unknown_schedule, unknown_network_argument,
    unknown_network_module, no_network_weights, output_folder_that_is_a_file, prompts_that_are_not_there,
    checkpoint_that_is_not_there, checkpoint_of_another_family, checkpoint_that_is_a_lora, checkpoint_that_is_cut_off,
)  # fmt: skip


def error_of(family: Family, attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of the error that a run ends with."""
    config = attempt.config or write_toml(attempt.folder / "dataset.toml", attempt.subset, **attempt.dataset)
    capsys.readouterr()
    assert family.run(*arguments(family, attempt.folder, config, *attempt.more)) == 2
    written = capsys.readouterr().err.splitlines()
    errors = [line for line in written if line.startswith("error: ")]
    assert written[-1:] == errors, "\n".join(written)
    assert not [line for line in written if " INFO loaded " in line], "a model was loaded before the error was found"
    assert not list((attempt.folder / "out").glob("*")) if (attempt.folder / "out").is_dir() else True
    return errors[0]


@pytest.fixture
def attempt(tmp_path: Path, pictures: Pictures) -> Attempt:
    """A run that would go well."""
    return Attempt(tmp_path, pictures, subset(pictures.photos))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.replace("_", " "))
def test_a_mistake_is_named_in_one_line(case: Case, attempt: Attempt, family: Family, capsys):
    words = case(attempt)
    error = error_of(family, attempt, capsys)
    assert [word for word in words if word not in error] == [], error


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may write everywhere")
def test_an_output_folder_without_permission_is_named(attempt: Attempt, family: Family, capsys):
    (attempt.folder / "locked").mkdir(mode=0o500)
    attempt.more = ["--output_dir", attempt.folder / "locked"]
    assert "locked" in error_of(family, attempt, capsys)


@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["decoded", "cached"])
def test_an_image_that_is_cut_off_is_named(cache, attempt: Attempt, family: Family, capsys):
    """Its header is whole, so only decoding finds it."""
    (attempt.folder / "images").mkdir()
    whole = attempt.folder / "images" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:-2000])
    attempt.subset["image_dir"] = attempt.folder / "images"
    config = write_toml(attempt.folder / "dataset.toml", attempt.subset)
    assert family.run(*arguments(family, attempt.folder, config, *cache)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "cut.jpg" in last


def test_an_image_that_a_loader_process_cannot_decode_is_named_without_a_traceback(attempt, family: Family, capfd):
    (attempt.folder / "images").mkdir()
    whole = attempt.folder / "images" / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:-2000])
    attempt.subset["image_dir"] = attempt.folder / "images"
    config = write_toml(attempt.folder / "dataset.toml", attempt.subset)
    assert family.run(*arguments(family, attempt.folder, config, "--max_data_loader_n_workers", 2)) == 2
    error = capfd.readouterr().err
    assert "cut.jpg" in error
    assert "Traceback" not in error


def test_several_wrong_images_are_named_together(attempt: Attempt, family: Family, capsys):
    for name in ("a", "b"):
        save(attempt.folder / "images", name, np.zeros((64, 64, 3), np.uint8))
    (attempt.folder / "masks").mkdir()
    attempt.subset |= {"image_dir": attempt.folder / "images", "conditioning_data_dir": attempt.folder / "masks"}
    error = error_of(family, attempt, capsys)
    assert "a.png" in error
    assert "b.png" in error
