"""What a user gets wrong ends with exit code 2 and one line that names it, before any model is loaded."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from end_to_end.training_runs import Family, Pictures, arguments, save, subset, write_toml
from full_disk import largest_file
from PIL import Image
from safetensors.torch import load_file, save_file


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


def file_that_is_no_image(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "images").mkdir()
    (attempt.folder / "images" / "notes.png").write_text("no picture")
    attempt.subset["image_dir"] = attempt.folder / "images"
    return ("notes.png",)


def output_folder_that_is_a_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "taken").write_text("")
    attempt.more = ["--output_dir", attempt.folder / "taken"]
    return "--output_dir", "taken"


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


OPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {  # name of the case: the options, words of the message
    "unknown option": ("--lerning_rate 1e-4", ("--lerning_rate", "Did you mean --learning_rate?")),
    "option of the wrong type": ("--network_dim four", ("--network_dim", "four")),
    "unknown choice": ("--mixed_precision bf61", ("--mixed_precision", "bf61", "bf16")),
    "batch of no images": ("--train_batch_size 0", ("--train_batch_size", "at least 1")),
    "rank of 0": ("--network_dim 0", ("--network_dim", "at least 1")),
    "fewer than no workers": ("--max_data_loader_n_workers -1", ("--max_data_loader_n_workers", "-1")),
    "learning rate that is no number": ("--learning_rate nan", ("--learning_rate", "nan")),
    "negative learning rate": ("--learning_rate -0.1", ("--learning_rate", "at least 0")),
    "rates that train nothing": ("--unet_lr 0 --text_encoder_lr 0", ("Nothing is trained", "--unet_lr")),
    "rate of 0 for all that is trained": ("--network_train_unet_only --unet_lr 0", ("Nothing is trained",)),
    "nothing left to train": (
        "--network_train_unet_only --network_train_text_encoder_only",
        ("--network_train_unet_only", "--network_train_text_encoder_only"),
    ),
    "full precision of another format": ("--full_fp16 --mixed_precision bf16", ("--full_fp16", "bf16")),
    "timesteps the wrong way round": ("--min_timestep 900 --max_timestep 100", ("--min_timestep 900", "Swap")),
    "cached latents and random cuts": ("--cache_latents --random_crop", ("--cache_latents", "random_crop")),
    "ranks of no file": ("--dim_from_weights", ("--dim_from_weights", "--network_weights")),
    "factor of no file": ("--base_weights_multiplier 0.5", ("--base_weights_multiplier", "--base_weights")),
    "warm-up of a constant rate": ("--lr_warmup_steps 5", ("--lr_warmup_steps", "constant_with_warmup")),
    "previews without prompts": ("--sample_every_n_steps 1", ("--sample_every_n_steps", "--sample_prompts")),
    "norms of rotations": ("--network_module networks.oft --scale_weight_norms 1", ("--scale_weight_norms", "oft")),
    "masked loss without masks": ("--masked_loss", ("--masked_loss", "conditioning_data_dir", "alpha_mask")),
    "unknown optimizer": ("--optimizer_type AdamWW", ("AdamWW", "AdamW")),
    "unknown optimizer argument": ("--optimizer_args weight_decoy=0.1", ("weight_decoy", "weight_decay")),
    "unknown schedule": ("--lr_scheduler cosin", ("cosin", "cosine")),
    "unknown network argument": ("--network_args conv_dimm=4", ("conv_dimm", "conv_dim")),
    "unknown network module": ("--network_module networks.lore", ("networks.lore", "networks.lora")),
    "no network weights": ("--network_weights nowhere.safetensors", ("--network_weights", "nowhere.safetensors")),
    "no base weights": ("--base_weights nowhere.safetensors", ("--base_weights", "nowhere.safetensors")),
    "no VAE": ("--vae nowhere.safetensors", ("--vae", "nowhere.safetensors")),
    "no prompts": ("--sample_prompts nowhere.txt --sample_at_first", ("nowhere.txt",)),
    "no checkpoint": ("--pretrained_model_name_or_path nowhere.safetensors", ("nowhere.safetensors",)),
    "no state": ("--resume nowhere", ("--resume nowhere", "--save_state")),
    "everything held back": ("--validation_split 1", ("held back", "validation_split")),
    "layers that are not there": ("--clip_skip 99", ("--clip_skip 99", "layers")),
}


def option_case(name: str) -> Case:
    """Return the case of options alone."""
    argv, words = OPTIONS[name]

    def case(attempt: Attempt) -> tuple[str, ...]:
        attempt.more = list(argv.split())
        return words

    case.__name__ = name
    return case


def nested_key_of_the_wrong_type(attempt: Attempt) -> tuple[str, ...]:
    attempt.subset["image_dir"] = attempt.pictures.photos
    attempt.config = write_toml(attempt.folder / "dataset.toml", attempt.subset)
    written = attempt.config.read_text() + '[datasets.subsets.custom_attributes]\ndiff_output_preservation = "yes"\n'
    attempt.config.write_text(written)
    return "datasets[0].subsets[0].custom_attributes.diff_output_preservation", "true or false", "yes"


def empty_caption_file(attempt: Attempt) -> tuple[str, ...]:
    picture = save(attempt.folder / "images", "cat", np.zeros((64, 64, 3), np.uint8), "")
    attempt.subset["image_dir"] = picture.parent
    return "cat.txt", "is empty"


def broken_metadata_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "pictures.json").write_text('{"photo0.png":\n{"caption": "a cat",}}')
    attempt.subset = {"image_dir": attempt.pictures.photos, "metadata_file": attempt.folder / "pictures.json"}
    return "pictures.json", "line 2", "not valid JSON"


def metadata_file_of_an_image_that_is_not_there(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "pictures.json").write_text('{"ghost.png": {"caption": "a cat"}}')
    attempt.subset = {"image_dir": attempt.pictures.photos, "metadata_file": attempt.folder / "pictures.json"}
    return "pictures.json", "ghost.png"


def masks_for_other_images_only(attempt: Attempt) -> tuple[str, ...]:
    for name in ("ghost", "spectre"):
        save(attempt.folder / "masks", name, np.zeros((64, 64), np.uint8))
    attempt.subset["conditioning_data_dir"] = attempt.folder / "masks"
    return "photo0.png", "photo1.png", "no mask"


def mask_that_is_no_image(attempt: Attempt) -> tuple[str, ...]:
    save(attempt.folder / "masks", "photo0", np.zeros((64, 64), np.uint8))
    (attempt.folder / "masks" / "photo1.png").write_text("no picture")
    attempt.subset["conditioning_data_dir"] = attempt.folder / "masks"
    return "masks/photo1.png", "cannot be read"


def checkpoint_of_stable_diffusion_3(attempt: Attempt) -> tuple[str, ...]:
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    save_file({name: torch.zeros(1)}, attempt.folder / "sd3.safetensors")
    attempt.more = ["--pretrained_model_name_or_path", attempt.folder / "sd3.safetensors"]
    return "sd3.safetensors", "Stable Diffusion 3", "sd3_train_network.py"


def network_of_another_family(attempt: Attempt) -> tuple[str, ...]:
    names = (f"lora_unet_input_blocks_4_1_proj_in.{end}" for end in ("lora_down.weight", "lora_up.weight"))
    save_file({name: torch.zeros(1, 1) for name in names}, attempt.folder / "xl.safetensors")
    attempt.more = ["--network_weights", attempt.folder / "xl.safetensors"]
    return "--network_weights", "xl.safetensors", "SDXL", "sdxl_train_network.py"


def network_weights_that_are_a_model(attempt: Attempt) -> tuple[str, ...]:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, attempt.folder / "model.safetensors")
    attempt.more = ["--network_weights", attempt.folder / "model.safetensors"]
    return "--network_weights", "whole model", "--pretrained_model_name_or_path"


def network_weights_that_are_cut_off(attempt: Attempt) -> tuple[str, ...]:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1000)}, attempt.folder / "whole.safetensors")
    (attempt.folder / "cut.safetensors").write_bytes((attempt.folder / "whole.safetensors").read_bytes()[:1000])
    attempt.more = ["--network_weights", attempt.folder / "cut.safetensors"]
    return ("cut.safetensors",)


def network_weights_with_nan(attempt: Attempt) -> tuple[str, ...]:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(1, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 1)}
    tensors["lora_unet_x.lora_up.weight"][2] = float("nan")
    save_file(tensors, attempt.folder / "nan.safetensors")
    attempt.more = ["--network_weights", attempt.folder / "nan.safetensors"]
    return "--network_weights", "lora_unet_x.lora_up.weight", "NaN"


def base_weights_with_infinite_numbers(attempt: Attempt) -> tuple[str, ...]:
    names = ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight")
    save_file({name: torch.full((1, 1), float("inf")) for name in names}, attempt.folder / "inf.safetensors")
    attempt.more = ["--base_weights", attempt.folder / "inf.safetensors"]
    return "--base_weights", "lora_unet_x.lora_down.weight", "infinite"


def log_folder_that_is_a_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "taken").write_text("")
    attempt.more = ["--logging_dir", attempt.folder / "taken"]
    return "--logging_dir", "taken"


def cache_folder_that_is_a_file(attempt: Attempt) -> tuple[str, ...]:
    (attempt.folder / "taken").write_text("")
    attempt.more = ["--cache_latents_to_disk", "--cache_dir", attempt.folder / "taken"]
    return "taken", "--cache_dir"


CASES: tuple[Case, ...] = (
    *map(option_case, OPTIONS),
    unknown_key_of_a_config_file, broken_config_file,
    unknown_dataset_key, dataset_key_of_the_wrong_type, nested_key_of_the_wrong_type, no_dataset_config,
    no_image_folder, no_image_in_the_folder, no_resolution, empty_caption_file, broken_metadata_file,
    metadata_file_of_an_image_that_is_not_there, missing_mask_with_a_near_miss, mask_of_another_aspect,
    masks_for_other_images_only, mask_that_is_no_image, file_that_is_no_image, output_folder_that_is_a_file,
    log_folder_that_is_a_file, cache_folder_that_is_a_file,
    checkpoint_of_another_family, checkpoint_of_stable_diffusion_3, checkpoint_that_is_a_lora,
    checkpoint_that_is_cut_off, network_of_another_family, network_weights_that_are_a_model,
    network_weights_that_are_cut_off, network_weights_with_nan, base_weights_with_infinite_numbers,
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


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("option", ["--pretrained_model_name_or_path", "--network_weights"])
def test_a_file_with_code_in_it_is_refused_and_the_code_not_run(option, attempt, family: Family, capsys):
    content = {"state_dict": {"x": torch.zeros(1)}, "more": Intruder(attempt.folder / "run")}
    torch.save(content, attempt.folder / "model.ckpt")
    attempt.more = [option, attempt.folder / "model.ckpt"]
    assert "could run code" in error_of(family, attempt, capsys)
    assert not (attempt.folder / "run").exists()


@pytest.mark.parametrize(
    "part", ["model.diffusion_model.middle_block", "cond_stage_model", "first_stage_model.encoder"]
)
@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["decoded", "cached"])
def test_a_checkpoint_with_nan_is_blamed_and_not_the_images(part, cache, attempt: Attempt, family: Family, capsys):
    """Looking for it at the start would read gigabytes, so that it is looked for when a loss breaks."""
    tensors = load_file(family.checkpoint())
    name = next(name for name, tensor in tensors.items() if name.startswith(part) and tensor.dim() > 1)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, attempt.folder / "nan.safetensors")
    config = write_toml(attempt.folder / "dataset.toml", attempt.subset)
    model = ("--pretrained_model_name_or_path", attempt.folder / "nan.safetensors")
    assert family.run(*arguments(family, attempt.folder, config, *model, *cache)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    wanted = "the VAE makes NaN" if "first_stage" in part and cache else "nan.safetensors holds numbers"
    assert wanted in last
    assert "--no_half_vae" not in last
    assert "Look at these images" not in last
    assert not list((attempt.folder / "out").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
@pytest.mark.parametrize("state", [(), ("--save_state",)], ids=["file", "state"])
def test_a_full_disk_leaves_the_saved_file_as_it_was(state, attempt: Attempt, family: Family, capsys):
    config = write_toml(attempt.folder / "dataset.toml", attempt.subset)
    argv = [*arguments(family, attempt.folder, config), *state]
    assert family.run(*argv) == 0
    before = content_of(attempt.folder / "out")
    capsys.readouterr()
    with largest_file(20_000):
        assert family.run(*argv, "--network_dim", 8) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "cannot be saved" in last
    assert content_of(attempt.folder / "out") == before


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
