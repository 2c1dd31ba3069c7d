"""Where a base model and its VAE may come from: files of any precision, folders, and ids in the hub's cache."""

import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from end_to_end.training_runs import SD15, Pictures, Trained, arguments, subset, write_toml
from safetensors.torch import load_file, save_file

from examples.embedded_model.make import write, write_diffusers
from tests.tiny_models import SD15 as SIZE

STILL = ("--learning_rate", "1e-12", "--max_train_steps", 1)  # so slow that nothing is learnt
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_ID, VAE_ID = "somebody/tiny-model", "somebody/tiny-vae"


@pytest.fixture(scope="module")
def config(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a config of two pictures with transparency: one batch."""
    return write_toml(tmp_path_factory.mktemp("config") / "d.toml", subset(pictures.cutouts, alpha_mask=True))


@pytest.fixture(scope="module")
def losses(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Return a function that gives the loss of a still run on a model."""

    def run(*more: object) -> list[float]:
        folder = tmp_path_factory.mktemp("run")
        argv = arguments(SD15, folder, config, *STILL, *more)
        assert SD15.run(*argv) == 0
        return Trained(folder, tuple(argv)).losses

    return run


@pytest.fixture(scope="module")
def plain(losses) -> list[float]:
    """The loss on the tiny checkpoint in float32."""
    return losses()


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with other weights."""
    return write_diffusers(tmp_path_factory.mktemp("other") / "model", seed=1, precision="float", size=SIZE)


def in_dtype(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in load_file(SD15.checkpoint()).items()}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_file_in_half_precision_trains_as_the_whole_one_does(ending, dtype, tolerance, losses, plain, tmp_path):
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": in_dtype(dtype), "global_step": 3}, path)
    else:
        save_file(in_dtype(dtype), path)
    found = losses("--pretrained_model_name_or_path", path)
    assert found == pytest.approx(plain, rel=tolerance)
    assert found != plain


def test_a_folder_trains_as_the_file_does(losses, plain):
    assert losses("--pretrained_model_name_or_path", SD15.folder()) == pytest.approx(plain, rel=1e-5)


def test_a_folder_that_has_only_the_fp16_variant_is_read(losses, plain, tmp_path):
    folder = write_diffusers(tmp_path / "model", precision="fp16", size=SIZE)
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert losses("--pretrained_model_name_or_path", folder) == pytest.approx(plain, rel=2e-3)


def test_another_vae_counts_in_whatever_form_it_comes(losses, plain, other_vae, tmp_path):
    whole = write(tmp_path / "whole.safetensors", seed=1, precision="float", size=SIZE)
    prefix = "first_stage_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(whole).items() if name.startswith(prefix)}
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    places = (whole, tmp_path / "bare.safetensors", tmp_path / "bare.ckpt", other_vae, other_vae / "vae")
    found = [losses("--vae", place) for place in places]
    assert found[0] != pytest.approx(plain, rel=1e-5)
    for each in found[1:]:
        assert each == pytest.approx(found[0], rel=1e-6)


def cached_on_the_hub(cache: Path, name: str, folder: Path) -> None:
    """Put a folder where a download of a hub id leaves it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).symlink_to(folder)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.filterwarnings("ignore")  # of the hub's library, about the missing network
def test_ids_in_the_hubs_cache_are_found_without_a_network(losses, config, other_vae, tmp_path, monkeypatch):
    cached_on_the_hub(tmp_path / "hub", MODEL_ID, SD15.folder())
    cached_on_the_hub(tmp_path / "hub", VAE_ID, other_vae / "vae")
    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub")
    )  # as HF_HUB_CACHE does at start
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    argv = arguments(SD15, tmp_path, config, *STILL, "--pretrained_model_name_or_path", MODEL_ID, "--vae", VAE_ID)
    assert SD15.run(*argv) == 0
    run = Trained(tmp_path, tuple(argv))
    assert run.losses == pytest.approx(losses("--vae", other_vae), rel=1e-6)
    assert (run.metadata["ss_sd_model_name"], run.metadata["ss_vae_name"]) == (MODEL_ID, VAE_ID)
