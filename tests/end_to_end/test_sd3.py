"""SD3 and SD3.5 from end to end: the guide's command, what only they have, and what their cache leaves to train."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import (
    ROOT,
    SD3M,
    SD35M,
    TIMEOUT_S,
    Family,
    Pictures,
    Trained,
    arguments,
    differing,
    environment,
    subset,
    tensors_of,
    write_toml,
)
from safetensors.torch import load_file

from examples.embedded_model import sd3 as maker
from library.models.sd3_text import ENCODERS

NINE_BLOCKS = maker.Sd3Size("5-medium", depth=9, vae=(32, 64, 32, 32))
GUIDE = (  # but for paths, and fp16, which needs a GPU
    "--save_model_as=safetensors --network_module=networks.lora --network_dim=16 --network_alpha=1 "
    "--learning_rate=1e-4 --optimizer_type=AdamW8bit --lr_scheduler=constant --sdpa --max_train_epochs=10 "
    "--save_every_n_epochs=1 --mixed_precision=bf16 --gradient_checkpointing --weighting_scheme=sigma_sqrt "
    "--blocks_to_swap=32"
)
NETWORK_ARGS = (
    "context_attn_dim=2 context_mlp_dim=3 context_mod_dim=4 x_attn_dim=5 x_mlp_dim=6 x_mod_dim=7 verbose=True",
    "emb_dims=[2,3,4,5,6,7]",
    "emb_dims=[4,0,0,4,0,0]",
    "train_block_indices=1,2,6-8",
    "train_block_indices=all",
)


def version_of(family: Family) -> str:
    return family.base_model_version


@pytest.fixture(params=(SD35M, SD3M), ids=version_of, scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    """Both architectures of medium size."""
    return request.param


only_35 = pytest.mark.parametrize("family", [SD35M], indirect=True, ids=["5-medium"])


@pytest.fixture
def config(pictures: Pictures, tmp_path: Path) -> Path:
    """Write a config with masks of both kinds."""
    return masks_and_alpha(tmp_path, pictures)


@functools.cache
def nine_blocks(folder: Path) -> Path:
    return maker.write(folder / "nine.safetensors", precision="float", size=NINE_BLOCKS)


# ---- the guide ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [SD35M, pytest.param(SD3M, marks=pytest.mark.slow)], indirect=True, ids=version_of)
def test_the_guides_command_trains(family: Family, config: Path, tmp_path: Path):
    apart = tiny_models.tiny_sd3_apart(family.base_model_version)
    argv = [f"--pretrained_model_name_or_path={apart / 'model.safetensors'}", f"--vae={apart / 'vae.safetensors'}"]
    argv += [f"--{name}={apart / name}.safetensors" for name in ENCODERS]
    argv += [
        f"--dataset_config={config}",
        f"--output_dir={tmp_path / 'out'}",
        "--output_name=my_sd3_lora",
        *GUIDE.split(),
    ]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--num_cpu_threads_per_process", "1", str(ROOT / "sd3_train_network.py"), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(tmp_path), timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert names == [*(f"my_sd3_lora-{epoch:06d}.safetensors" for epoch in range(1, 10)), "my_sd3_lora.safetensors"]
    assert "--blocks_to_swap 32 is too much for this model" in done.stderr
    trained = tensors_of(tmp_path / "out" / "my_sd3_lora.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_up" in name)


@only_35
@pytest.mark.parametrize("given", NETWORK_ARGS)
def test_every_network_argument_of_the_guide_trains(given, train, config, tmp_path_factory):
    model = nine_blocks(tmp_path_factory.getbasetemp())
    more = ["--pretrained_model_name_or_path", model, "--network_module", "networks.lora_sd3"]
    run = train(config, *more, "--network_args", *given.split())
    ranks = {name: len(t) for name, t in run.tensors.items() if name.endswith("lora_down.weight")}
    blocks = {int(name.split("joint_blocks_")[1].split("_")[0]) for name in ranks if "joint_blocks_" in name}
    assert blocks == ({1, 2, 6, 7, 8} if "1,2,6-8" in given else set(range(9)))
    embedders = {name.split(".")[0] for name in ranks if "lora_unet" in name and "joint_blocks" not in name}
    assert len(embedders) == {"emb_dims=[2,3,4,5,6,7]": 8, "emb_dims=[4,0,0,4,0,0]": 3}.get(given, 0)
    if given.startswith("context_attn_dim"):
        kinds = (
            "context_block_attn",
            "context_block_mlp",
            "context_block_ada",
            "x_block_attn",
            "x_block_mlp",
            "x_block_ada",
        )
        found = [{rank for name, rank in ranks.items() if f"_{kind}" in name} for kind in kinds]
        assert found == [{2}, {3}, {4}, {5}, {6}, {7}]


# ---- memory ------------------------------------------------------------------------------------------------------
@only_35
def test_swapping_and_offloaded_checkpoints_are_not_combined(family, config, tmp_path, capsys):
    argv = arguments(family, tmp_path, config, "--blocks_to_swap", 2, "--cpu_offload_checkpointing")
    assert family.run(*argv) == 2
    assert "--cpu_offload_checkpointing" in capsys.readouterr().err.splitlines()[-1]


@only_35
def test_offloaded_checkpoints_change_no_bit(train, config):
    plain = train(config, name="plain")
    offloaded = train(config, "--cpu_offload_checkpointing", name="offloaded")
    assert differing(plain.tensors, offloaded.tensors) == []


# ---- text ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"])
def test_clip_is_trained_beside_cached_t5_as_without_a_cache(where, train, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --l 3 --d 1\n")
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos))
    more = [
        "--cache_dir",
        tmp_path / "cache",
        "--sample_prompts",
        tmp_path / "prompts.txt",
        "--sample_every_n_steps",
        2,
    ]
    plain = train(config, *more, name="plain")
    cached = train(config, *more, where, name="cached")
    assert any(name.startswith("lora_te2_") for name in cached.tensors)
    assert differing(plain.tensors, cached.tensors) == []
    one, other = (next((run.folder / "out" / "sample").glob("*")).read_bytes() for run in (plain, cached))
    assert one == other


@only_35
@pytest.mark.parametrize("mask", ["--apply_t5_attn_mask", "--apply_lg_attn_mask"])
def test_masks_of_padding_work_with_and_without_a_cache(mask, train, config):
    more = ["--network_train_unet_only"]
    live = train(config, *more, mask, name="live")
    cached = train(config, *more, mask, "--cache_text_encoder_outputs", name="cached")
    assert differing(live.tensors, cached.tensors) == []
    assert train(config, *more, name="plain").losses != live.losses


@only_35
def test_t5_is_trained_where_that_is_asked_for(train, config):
    more = ["--network_module", "networks.lora_sd3", "--network_args", "train_t5xxl=True", "--gradient_checkpointing"]
    run = train(config, *more)
    ups = {name: t for name, t in run.tensors.items() if name.startswith("lora_te3_") and "lora_up" in name}
    assert len(ups) == 14
    assert all(tensor.any() for tensor in ups.values())


@only_35
def test_t5_trained_beside_its_cache_is_refused(family, config, tmp_path, capsys):
    more = ["--network_module", "networks.lora_sd3", "--network_args", "train_t5xxl=True"]
    assert family.run(*arguments(family, tmp_path, config, *more, "--cache_text_encoder_outputs")) == 2
    assert "train_t5xxl" in capsys.readouterr().err.splitlines()[-1]


@only_35
@pytest.mark.parametrize("option", ["--clip_l_dropout_rate", "--clip_g_dropout_rate", "--t5_dropout_rate"])
def test_texts_are_left_out_of_training_and_of_nothing_else(option, train, config):
    more = ["--network_train_unet_only", "--validation_split", 0.5, "--validation_seed", 1, "--learning_rate", "1e-12"]
    more += ["--validate_every_n_steps", 1, "--max_train_steps", 1]
    plain = train(config, *more, name="plain")
    dropped = train(config, *more, option, 1, name="dropped")
    assert dropped.losses != plain.losses
    validations = [run.curve("loss/validation/step_average") for run in (plain, dropped)]
    assert validations[0] == pytest.approx(validations[1], rel=1e-6)


@only_35
def test_text_encoders_are_saved_with_what_was_trained_on_them(train, config, family):
    run = train(config, "--save_clip", "--save_t5xxl", "--learning_rate", "1e-2")
    assert run.names() == ["lora.safetensors", *(f"lora_{name}.safetensors" for name in sorted(ENCODERS))]
    apart = tiny_models.tiny_sd3_apart("5-medium")
    saved = {name: load_file(run.folder / "out" / f"lora_{name}.safetensors") for name in ENCODERS}
    given = {name: load_file(apart / f"{name}.safetensors") for name in ENCODERS}
    changed = {name: differing(given[name], saved[name]) for name in ENCODERS}
    assert changed["t5xxl"] == []
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    down, up, alpha = (run.tensors[f"{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    expected = given["clip_l"][name] + up @ down * (alpha / len(down))
    torch.testing.assert_close(saved["clip_l"][name], expected)
    assert name in changed["clip_l"]
    assert len(changed["clip_l"]) == 18
    assert len(changed["clip_g"]) == 24


# ---- formats and files --------------------------------------------------------------------------------------------
@only_35
def test_weights_in_one_byte_train_much_as_whole_ones(train, config):
    plain = train(config, "--mixed_precision", "bf16", name="plain")
    float8 = train(config, "--mixed_precision", "bf16", "--fp8_base", "--blocks_to_swap", 1, name="float8")
    assert float8.losses != plain.losses
    assert float8.losses == pytest.approx(plain.losses, rel=0.1)


@only_35
def test_split_projections_go_on_from_a_state_and_from_a_file(train, config):
    more = ["--network_module", "networks.lora_sd3", "--network_args", "split_qkv=True", "--network_dim", 2]
    whole = train(config, *more, "--max_train_steps", 4, name="whole")
    half = train(config, *more, "--max_train_steps", 4, "--save_every_n_steps", 2, "--save_state", name="half")
    state = next((half.folder / "out").glob("*step00000002-state"))
    resumed = train(config, *more, "--max_train_steps", 4, "--resume", state, name="resumed")
    assert differing(whole.tensors, resumed.tensors) == []
    again = train(config, *more, "--network_weights", whole.file, "--learning_rate", "1e-12", name="again")
    torch.testing.assert_close(again.tensors, whole.tensors)


@only_35
def test_a_run_from_a_folder_is_that_from_a_file(family, train, config):
    whole = train(config, name="file")
    folder = train(config, "--pretrained_model_name_or_path", family.folder(), name="folder")
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(folder.tensors[name], tensor, atol=2e-4, rtol=1e-2)


def test_the_large_model_trains(pictures, tmp_path):
    large = replace(SD35M, checkpoint=functools.partial(tiny_models.tiny_sd3, "5-large"))
    config = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))
    argv = arguments(large, tmp_path, config, "--masked_loss")
    assert large.run(*argv) == 0
    run = Trained(tmp_path, tuple(argv))
    assert run.metadata["ss_base_model_version"] == "5-large"
    assert run.metadata["modelspec.architecture"] == "stable-diffusion-3-5-large/lora"
    assert not [name for name in run.tensors if "attn2" in name]
