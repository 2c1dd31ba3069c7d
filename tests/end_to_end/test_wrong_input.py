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


MODEL, NETWORK = "--pretrained_model_name_or_path", "--network_weights"
NAN, INFINITE = float("nan"), float("inf")
WEIGHTS: Mapping[str, tuple[str, Mapping[str, float], tuple[str, ...]]] = {  # an option, its file's content, the words
    "checkpoint of SDXL": (
        MODEL,
        {"conditioner.embedders.0.transformer.x": 0, "model.diffusion_model.input_blocks.0.0.weight": 0},
        ("weights.safetensors", "SDXL", "sdxl_train_network.py"),
    ),
    "checkpoint of SD 3": (
        MODEL,
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": 0},
        ("Stable Diffusion 3", "sd3_train_network.py"),
    ),
    "checkpoint that is a LoRA": (MODEL, {"lora_unet_x.lora_up.weight": 0}, ("weights.safetensors", "LoRA")),
    "network of SDXL": (
        NETWORK,
        {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": 0},
        (NETWORK, "weights.safetensors", "SDXL", "sdxl_train_network.py"),
    ),
    "network weights that are a model": (NETWORK, {"model.diffusion_model.x": 0}, (NETWORK, "whole model", MODEL)),
    "network weights with NaN": (
        NETWORK,
        {"lora_unet_x.lora_down.weight": 1, "lora_unet_x.lora_up.weight": NAN},
        (NETWORK, "lora_unet_x.lora_up.weight", "NaN"),
    ),
    "base weights with infinite numbers": (
        "--base_weights",
        {"lora_unet_x.lora_down.weight": INFINITE, "lora_unet_x.lora_up.weight": 1},
        ("--base_weights", "lora_unet_x.lora_down.weight", "infinite"),
    ),
}
METADATA: Mapping[str, tuple[str, tuple[str, ...]]] = {  # the text of a metadata file, the words
    "metadata file that is broken": ('{"photo0.png":\n{"caption": "a cat",}}', ("m.json", "line 2", "not valid JSON")),
    "metadata file of an absent image": ('{"ghost.png": {"caption": "a cat"}}', ("m.json", "ghost.png")),
}
TAKEN: Mapping[str, tuple[str, ...]] = {  # a file stands where a folder is to be
    "output folder that is a file": ("--output_dir",),
    "log folder that is a file": ("--logging_dir",),
    "cache folder that is a file": ("--cache_latents_to_disk", "--cache_dir"),
}


def weights_case(name: str) -> Case:
    """Return the case of a file of weights."""
    option, content, words = WEIGHTS[name]

    def case(attempt: Attempt) -> tuple[str, ...]:
        file = attempt.folder / "weights.safetensors"
        save_file({name: torch.full((1, 1), float(value)) for name, value in content.items()}, file)
        attempt.more = [option, file]
        return words

    case.__name__ = name
    return case


def cut_off_case(option: str) -> Case:
    """Return the case of a file of weights whose end is missing."""

    def case(attempt: Attempt) -> tuple[str, ...]:
        file = attempt.folder / "cut.safetensors"
        save_file({"x": torch.zeros(1000)}, file)
        file.write_bytes(file.read_bytes()[:1000])
        attempt.more = [option, file]
        return ("cut.safetensors",)

    case.__name__ = f"{option} cut off"
    return case


def metadata_case(name: str) -> Case:
    """Return the case of a metadata file."""
    text, words = METADATA[name]

    def case(attempt: Attempt) -> tuple[str, ...]:
        (attempt.folder / "m.json").write_text(text)
        attempt.subset = {"image_dir": attempt.pictures.photos, "metadata_file": attempt.folder / "m.json"}
        return words

    case.__name__ = name
    return case


def taken_case(name: str) -> Case:
    """Return the case of a file where a folder is to be."""

    def case(attempt: Attempt) -> tuple[str, ...]:
        (attempt.folder / "taken").write_text("")
        attempt.more = [*TAKEN[name], attempt.folder / "taken"]
        return TAKEN[name][-1], "taken"

    case.__name__ = name
    return case


def masks_case(name: str, content: Mapping[str, bool], *words: str) -> Case:
    """Return the case of a folder of masks: names and whether they are pictures."""

    def case(attempt: Attempt) -> tuple[str, ...]:
        for mask, is_picture in content.items():
            path = save(attempt.folder / "masks", mask, np.zeros((64, 64), np.uint8))
            if not is_picture:
                path.write_text("no picture")
        attempt.subset["conditioning_data_dir"] = attempt.folder / "masks"
        return words

    case.__name__ = name
    return case


CASES: tuple[Case, ...] = (
    *map(option_case, OPTIONS), *map(weights_case, WEIGHTS), *map(cut_off_case, (MODEL, NETWORK)),
    *map(metadata_case, METADATA), *map(taken_case, TAKEN),
    unknown_key_of_a_config_file, broken_config_file, unknown_dataset_key, dataset_key_of_the_wrong_type,
    nested_key_of_the_wrong_type, no_dataset_config, no_image_folder, no_image_in_the_folder, no_resolution,
    empty_caption_file, file_that_is_no_image, mask_of_another_aspect,
    masks_case("missing mask with a near miss", {"photo0": True, "photo1_mask": True}, "photo1.png", "photo1_mask.png"),
    masks_case("masks for other images only", {"ghost": True}, "photo0.png", "photo1.png", "no mask"),
    masks_case("mask that is no image", {"photo0": True, "photo1": False}, "masks/photo1.png", "cannot be read"),
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
    if case.__name__ in family.right:
        pytest.skip("no mistake with this family")
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


@pytest.mark.parametrize("part", ["denoiser_part", "text_prefix", "first_stage_model.encoder"])
@pytest.mark.parametrize("cache", [(), ("--cache_latents",)], ids=["decoded", "cached"])
def test_a_checkpoint_with_nan_is_blamed_and_not_the_images(part, cache, attempt: Attempt, family: Family, capsys):
    """Looking for it at the start would read gigabytes, so that it is looked for when a loss breaks."""
    tensors, part = load_file(family.checkpoint()), getattr(family, part, part)
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
