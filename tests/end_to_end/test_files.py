"""The files that a run leaves: tensors, metadata, names, and what diffusers makes of them."""

import gzip
import hashlib
import json
import re
import struct
from pathlib import Path

import diffusers
import pytest
import torch
from end_to_end.training_runs import Family, Trained, metadata_of, subset, tensors_of, uncropped_batch, write_toml

from library.training.model_hashes import file_hashes
from networks import lora

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Write a config of two images: one batch of two an epoch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))


@pytest.fixture
def reference_keys(family: Family) -> list[str]:
    """The names in the reference's LoRA file, in its order."""
    names = json.loads(gzip.decompress((DATA / "networks" / family.keys).read_bytes()))["variants"]["default"]
    return [name for name in names if not re.search(family.lacks, name)]


# ---- tensors ---------------------------------------------------------------------------------------------------


def test_the_file_has_the_references_names(plain_run: Trained, reference_keys):
    assert sorted(plain_run.tensors) == sorted(reference_keys)


def test_every_module_was_trained(plain_run: Trained, family: Family):
    untrained = [name for name, tensor in plain_run.tensors.items() if "lora_up" in name and not tensor.any()]
    # pictures of 64 pixels are one cell in the middle of the U-Net, and attention over one cell has nothing to choose
    surprising = [name for name in untrained if "_mid_block_" not in name or "_attn1_to_" not in name]
    unread = [name for name in surprising if not family.is_last_layer_read and name.startswith(family.last_layers[0])]
    assert surprising == unread
    assert bool(unread) is not family.is_last_layer_read
    assert all(tensor.isfinite().all() for tensor in plain_run.tensors.values())


def test_weights_are_saved_as_trained_unless_told_otherwise(plain_run: Trained, train, config):
    assert {tensor.dtype for tensor in plain_run.tensors.values()} == {torch.float32}
    run = train(config, "--save_precision", "fp16")
    assert {tensor.dtype for tensor in run.tensors.values()} == {torch.float16}


@pytest.mark.filterwarnings("ignore")  # of peft and diffusers
def test_diffusers_gives_our_own_forward_with_the_file_of_a_run(plain_run: Trained, family: Family):
    """Text encoders and U-Net, each to 1e-5."""
    if family.script == "sd3_train_network":
        pytest.skip("diffusers does not read LoRA files of this layout for SD3")
    made, parts = family.load()
    tokens = made.tokenize(["a cat on a mat"])
    noisy, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    batch = uncropped_batch()

    @torch.no_grad()
    def outputs() -> tuple[torch.Tensor, ...]:
        text = made.encode_text(parts, tokens)
        states = (text,) if isinstance(text, torch.Tensor) else text
        return (*states, made.predict(parts, noisy, timesteps, text, batch))

    targets = tuple(made.lora_targets(parts))
    network, tensors = lora.create_network_from_weights(1.0, plain_run.file, None, None, None, targets=targets)
    network.load_state_dict(tensors)
    network.set_multiplier(20.0)  # four steps change little
    plain = outputs()
    with network.eval().attached():
        ours = outputs()
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(family.folder(), local_files_only=True)
    for part in (pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", pipeline.unet)):
        part.eval()
    pipeline.load_lora_weights(plain_run.file.parent, weight_name=plain_run.file.name)
    pipeline.set_adapters(pipeline.get_active_adapters(), 20.0)
    theirs = outputs_of_diffusers(pipeline, "a cat on a mat", noisy, timesteps)
    for before, own, other in zip(plain, ours, theirs, strict=True):
        assert (own - before).abs().max() > 1e-3
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def outputs_of_diffusers(pipeline, caption: str, noisy: torch.Tensor, timesteps: torch.Tensor):
    """Return what diffusers' models make of the caption, and of noise; of a picture of 64 pixels, not cropped."""
    states, _, *pooled = pipeline.encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if not pooled:
        return states, pipeline.unet(noisy, timesteps, states).sample
    ids = torch.tensor([[64, 64, 0, 0, 64, 64]])
    told = {"text_embeds": pooled[0], "time_ids": ids}
    width = pipeline.text_encoder.config.hidden_size
    predicted = pipeline.unet(noisy, timesteps, states, added_cond_kwargs=told).sample
    return states[..., :width], states[..., width:], pooled[0], predicted


# ---- metadata --------------------------------------------------------------------------------------------------


def test_the_metadata_has_the_references_keys(plain_run: Trained, family: Family):
    if family.script == "sd3_train_network":
        pytest.skip("the reference's run is of SD 1.5")
    expected = json.loads((DATA / "metadata" / "sd15_run.json").read_text())
    own = {"ss_masked_loss", "ss_alpha_mask", "ss_num_masked_images", "ss_mean_mask_weight"}  # of a run with masks
    assert set(plain_run.metadata) - own == set(expected)


def test_the_metadata_says_what_was_trained_on(plain_run: Trained):
    metadata = plain_run.metadata
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert [entry["img_count"] for entry in dataset["subsets"]] == [2, 2]
    assert (dataset["resolution"], dataset["batch_size_per_device"]) == ([64, 64], 2)
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags["photos"] == {"zundamon": 2, "photo 0": 1, "photo 1": 1, "sitting": 2}
    assert tags["cutouts"]["cat"] == 2
    assert json.loads(metadata["ss_dataset_dirs"])["photos"] == {"n_repeats": 1, "img_count": 2}


def test_the_metadata_says_how_it_was_trained(plain_run: Trained, family: Family):
    metadata = plain_run.metadata
    expected = {
        "ss_steps": "4", "ss_epoch": "2", "ss_num_epochs": "2", "ss_max_train_steps": "4", "ss_seed": "7",
        "ss_num_batches_per_epoch": "2", "ss_num_train_images": "4", "ss_num_reg_images": "0",
        "ss_learning_rate": "0.001", "ss_network_module": "networks.lora", "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_base_model_version": family.base_model_version, "ss_output_name": "lora",
        "ss_sd_model_name": family.checkpoint().name, "modelspec.architecture": family.architecture,
        "modelspec.title": "lora", "modelspec.resolution": "64x64",
    }  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected


def test_the_metadata_identifies_the_base_model(plain_run: Trained, family: Family):
    short, full = file_hashes(family.checkpoint())
    assert (plain_run.metadata["ss_sd_model_hash"], plain_run.metadata["ss_new_sd_model_hash"]) == (short, full)
    assert full == hashlib.sha256(family.checkpoint().read_bytes()).hexdigest()


def test_the_metadata_has_the_hash_of_the_tensors(plain_run: Trained):
    blob = plain_run.file.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    assert plain_run.metadata["sshs_model_hash"] == hashlib.sha256(blob[8 + length :]).hexdigest()


def test_no_metadata_leaves_out_how_it_was_trained(train, config):
    metadata = train(config, "--no_metadata", "--network_args", "conv_dim=2").metadata
    kept = {key for key in metadata if key.startswith("ss_")}
    assert kept == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    }  # fmt: skip
    assert "sshs_model_hash" in metadata
    assert metadata["modelspec.architecture"].endswith("/lora")


# ---- names -----------------------------------------------------------------------------------------------------


def test_epoch_files_are_named_and_rotated(train, config):
    run = train(config, "--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_last_n_epochs", 2)
    assert run.names() == ["lora-000002.safetensors", "lora-000003.safetensors", "lora.safetensors"]
    epochs = [metadata_of(run.folder / "out" / name)["ss_epoch"] for name in run.names()]
    assert epochs == ["2", "3", "4"]


def test_step_files_are_named_and_rotated(train, config):
    run = train(config, "--max_train_steps", 5, "--save_every_n_steps", 1, "--save_last_n_steps", 1)
    assert run.names() == ["lora-step00000003.safetensors", "lora-step00000004.safetensors", "lora.safetensors"]
    middle = run.folder / "out" / "lora-step00000004.safetensors"
    assert metadata_of(middle)["ss_steps"] == "4"
    assert metadata_of(middle)["ss_epoch"] == "3"  # as sd-scripts: of a step file, the epochs finished before it


def test_a_step_file_holds_the_weights_of_its_step(train, config):
    short = train(config, "--max_train_steps", 2, name="short")
    longer = train(config, "--max_train_steps", 4, "--save_every_n_steps", 2, name="longer")
    step_file = longer.folder / "out" / "lora-step00000002.safetensors"
    assert all(torch.equal(tensor, short.tensors[name]) for name, tensor in tensors_of(step_file).items())


def test_a_checkpoint_of_another_type_is_named_by_it(train, config):
    run = train(config, "--save_model_as", "pt")
    loaded = torch.load(run.folder / "out" / "lora.pt", weights_only=True)
    assert all(torch.is_tensor(tensor) for tensor in loaded.values())
    assert run.names("*") == ["lora.pt"]


def test_nothing_but_the_result_is_left(plain_run: Trained):
    assert plain_run.names("*") == ["lora.safetensors"]
