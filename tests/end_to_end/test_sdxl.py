"""What is SDXL's own in whole runs: two text encoders, names of modules, 23 blocks, sizes that the U-Net is told."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from end_to_end.training_runs import (
    SD15,
    SDXL,
    Family,
    Pictures,
    Trained,
    arguments,
    differing,
    events_of,
    save,
    subset,
    write_toml,
)
from PIL import Image
from safetensors.torch import save_file

from library.models import lora_targets
from library.models.sdxl import Sdxl
from library.options import read_training
from library.training import data as training_data
from tests.tiny_models import tiny_sdxl_folder

STILL = ("--learning_rate", "1e-12", "--max_train_steps", 1)  # so slow that nothing is learnt
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_ID = "somebody/tiny-sdxl"
# the guide's, without the paths
GUIDE = """
    --save_model_as=safetensors --network_module=networks.lora --network_dim=32 --network_alpha=16
    --learning_rate=1e-4 --unet_lr=1e-4 --text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5 --optimizer_type=AdamW8bit
    --lr_scheduler=constant --max_train_epochs=2 --save_every_n_epochs=1 --mixed_precision=bf16
    --gradient_checkpointing --cache_text_encoder_outputs --cache_latents
"""


@pytest.fixture(scope="module")
def config(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a config of two pictures with transparency: one batch."""
    return write_toml(tmp_path_factory.mktemp("config") / "d.toml", subset(pictures.cutouts, alpha_mask=True))


@pytest.fixture
def sdxl(config: Path, tmp_path: Path) -> Callable[..., Trained]:
    """Return a function that trains SDXL, which must end well."""

    def run(*more: object, name: str = "run", dataset: Path | None = None) -> Trained:
        argv = arguments(SDXL, tmp_path / name, dataset or config, *more)
        assert SDXL.run(*argv) == 0
        return Trained(tmp_path / name, tuple(argv))

    return run


def test_the_guides_command_trains_with_mask_images_and_transparency(sdxl, pictures, tmp_path):
    pytest.importorskip("bitsandbytes")
    dataset = write_toml(
        tmp_path / "both.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks),
        subset(pictures.cutouts, alpha_mask=True),
        enable_bucket=True,
        min_bucket_reso=64,
    )
    run = sdxl(*GUIDE.split(), dataset=dataset)
    assert run.names() == ["lora-000001.safetensors", "lora.safetensors"]
    down = run.tensors["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"]
    assert down.shape[0] == 32
    assert {name.partition("_")[2].partition("_")[0] for name in run.tensors} == {"unet"}  # as a warning says
    assert json.loads(run.metadata["ss_datasets"])[0]["num_train_images"] == 4


def test_each_text_encoder_has_its_learning_rate(sdxl):
    run = sdxl("--text_encoder_lr1", 0, "--text_encoder_lr2", "1e-4")
    trained = {name.split("_")[1] for name, tensor in run.tensors.items() if "lora_up" in name and tensor.any()}
    assert trained == {"te2", "unet"}
    tags = set(events_of(run.folder / "logs").Tags()["scalars"])
    assert {tag for tag in tags if tag.startswith("lr/")} == {"lr/textencoder 2", "lr/unet"}
    assert run.curve("lr/textencoder 2") == pytest.approx([1e-4] * 2)
    assert run.metadata["ss_text_encoder_lr"] == "[0.0, 0.0001]"


def test_one_rate_for_both_text_encoders_is_one_group_as_in_sd_scripts(sdxl):
    run = sdxl("--text_encoder_lr", "1e-4")
    assert run.curve("lr/textencoder") == pytest.approx([1e-4] * 2)


def test_ranks_and_rates_by_block_have_23_and_9_3_9_places(sdxl):
    ranks = ",".join(str(1 + index) for index in range(23))
    weights = ("down_lr_weight=1,1,1,1,0,1,1,1,1", "mid_lr_weight=1,0.5,1", "up_lr_weight=1,1,1,1,1,1,1,1,0")
    run = sdxl("--network_train_unet_only", "--network_args", f"block_dims={ranks}", *weights, "conv_dim=1")
    names = {name.partition(".")[0] for name in run.tensors}
    assert not any(name.startswith(("lora_unet_input_blocks_4_", "lora_unet_output_blocks_8_")) for name in names)
    rank_of = {name: run.tensors[f"{name}.lora_down.weight"].shape[0] for name in names}
    assert rank_of["lora_unet_input_blocks_8_1_proj_in"] == 1 + 9
    assert rank_of["lora_unet_middle_block_1_proj_in"] == 1 + 11
    assert rank_of["lora_unet_output_blocks_0_1_proj_in"] == 1 + 13
    assert run.curve("lr/unet_block11") == pytest.approx([5e-4] * 2)


def by_diffusers_names(run: Trained, file: Path) -> Path:
    """Write a run's LoRA with the U-Net's modules named as diffusers names them."""
    _, parts = SDXL.load()
    aliases = {
        target.name: target.alias or target.name for target in lora_targets.of(parts.text_encoders, parts.denoiser)
    }
    renamed = {}
    for name, tensor in run.tensors.items():
        stem, _, rest = name.partition(".")
        renamed[f"{aliases[stem]}.{rest}"] = tensor
    assert any(name.startswith("lora_unet_down_blocks_1_attentions_0_") for name in renamed)
    save_file(renamed, file)
    return file


@pytest.mark.parametrize(
    "route",
    [
        ("--network_weights",),
        pytest.param(("--dim_from_weights", "--network_weights"), marks=pytest.mark.slow),
        pytest.param(("--base_weights",), marks=pytest.mark.slow),
    ],
)
def test_a_file_with_diffusers_names_counts_as_one_with_the_original_names(route, sdxl, tmp_path):
    trained = sdxl("--learning_rate", "1e-2", "--network_args", "conv_dim=4", name="trained")
    other = by_diffusers_names(trained, tmp_path / "diffusers.safetensors")
    still = (*STILL, "--network_args", "conv_dim=4") if route[0] == "--network_weights" else STILL
    plain = sdxl(*still, name="plain")
    runs = [sdxl(*still, *route, file, name=file.stem) for file in (trained.file, other)]
    assert runs[1].losses == runs[0].losses
    assert runs[0].losses != pytest.approx(plain.losses, rel=1e-4)
    assert not differing(runs[0].tensors, runs[1].tensors)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.filterwarnings("ignore")  # of the hub's library, about the missing network
def test_a_folder_and_an_id_in_the_hubs_cache_train_as_the_file_does(sdxl, tmp_path, monkeypatch):
    plain = sdxl(*STILL, name="file")
    folder = sdxl(*STILL, "--pretrained_model_name_or_path", tiny_sdxl_folder(), name="folder")
    assert folder.losses == pytest.approx(plain.losses, rel=1e-5)
    place = tmp_path / "hub" / f"models--{MODEL_ID.replace('/', '--')}"
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).symlink_to(tiny_sdxl_folder())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    run = sdxl(*STILL, "--pretrained_model_name_or_path", MODEL_ID, name="id")
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert run.metadata["ss_sd_model_name"] == MODEL_ID


def test_files_that_are_not_mapped_train_the_same_network(sdxl):
    mapped, read = sdxl(name="mapped"), sdxl("--disable_mmap_load_safetensors", name="read")
    assert not differing(mapped.tensors, read.tensors)


def test_the_unet_is_told_of_the_crop_that_was_made(tmp_path):
    """A picture of 200x100 fills a bucket of 128x64 exactly; in one of 64x64, 32 of 128 pixels are cut on each side."""
    folder = tmp_path / "wide"
    save(folder, "wide", np.zeros((100, 200, 3), np.uint8), "a cat")
    dataset = write_toml(tmp_path / "d.toml", subset(folder))
    options = read_training(arguments(SDXL, tmp_path, dataset), "sdxl_train_network").options
    data = training_data.read(options, Sdxl.bucket_step_multiple)
    plan = training_data.make_plan(data, options, 1, 1)
    batch = next(iter(training_data.load(data, options, plan, training_data.Stores(), Sdxl(), 1)))
    assert batch.original_sizes.tolist() == [[100, 200]]
    assert batch.crop_top_lefts.tolist() == [[0, 32]]
    assert batch.target_sizes.tolist() == [[64, 64]]


def test_a_preview_without_a_size_is_1024_pixels_a_side(sdxl, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --s 1 --d 1 --ss euler --h 64\n")
    run = sdxl(*STILL, "--sample_prompts", tmp_path / "prompts.txt", "--sample_at_first")
    (picture,) = (run.folder / "out" / "sample").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (1024, 64)


def test_buckets_may_be_32_pixels_apart(sdxl, tmp_path):
    save(tmp_path / "wide", "wide", np.zeros((32, 96, 3), np.uint8), "a cat")
    buckets = {"enable_bucket": True, "bucket_reso_steps": 32, "min_bucket_reso": 32}
    run = sdxl(*STILL, dataset=write_toml(tmp_path / "d.toml", subset(tmp_path / "wide"), **buckets))
    (bucket,) = json.loads(run.metadata["ss_datasets"])[0]["bucket_info"]["buckets"].values()
    assert bucket["resolution"] == [96, 32]
    assert run.losses[0] > 0


@pytest.mark.parametrize(
    ("given", "content", "said"),
    [
        (SDXL, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "train_network.py"),
        (SDXL, "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "train_network.py"),
        (SDXL, "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight", "sd3_train_network.py"),
        (SD15, "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "sdxl_train_network.py"),
    ],
)
def test_a_network_of_another_family_names_its_script(given: Family, content, said, config, tmp_path, capsys):
    save_file({content: torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    argv = arguments(given, tmp_path / "run", config, "--network_weights", tmp_path / "other.safetensors")
    assert given.run(*argv) == 2
    assert f"Train it with {said}." in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "model", "said"),
    [(SDXL, SD15, "train_network.py"), (SD15, SDXL, "sdxl_train_network.py")],
    ids=["SD 1.x", "SDXL"],
)
@pytest.mark.parametrize("place", ["checkpoint", "folder"])
def test_a_model_of_another_family_names_its_script(
    given: Family, model: Family, said, place, config, tmp_path, capsys
):
    argv = arguments(given, tmp_path / "run", config, "--pretrained_model_name_or_path", getattr(model, place)())
    assert given.run(*argv) == 2
    assert f"Train it with {said}." in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_predicts_velocity_is_trained_so(sdxl):
    noise, velocity = sdxl(*STILL, name="noise"), sdxl(*STILL, "--v_parameterization", name="velocity")
    assert velocity.losses != pytest.approx(noise.losses, rel=1e-3)
    assert velocity.metadata["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("module", "starts"),
    [
        ("networks.lora_fa", {"lora_te1", "lora_te2", "lora_unet"}),
        ("networks.dylora", {"lora_te1", "lora_te2", "lora_unet"}),
        ("networks.oft", {"oft_unet"}),
    ],
)
def test_other_networks_train_on_sdxl_under_its_names(sdxl, module, starts):
    run = sdxl("--network_module", module, "--network_dim", 4, "--network_alpha", "1e-3")
    assert {"_".join(name.split("_")[:2]) for name in run.tensors} == starts
    assert any("_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q." in name for name in run.tensors)


def test_lycoris_trains_on_sdxl(sdxl):
    pytest.importorskip("lycoris")
    run = sdxl("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp")
    assert any(name.startswith(("lora_te2_", "lycoris_te2_")) for name in run.tensors)
