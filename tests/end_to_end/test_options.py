"""Options of the training in whole runs: each does what it says, and none stands in the way of another."""

import numpy as np
import pytest
import torch
from end_to_end.training_runs import differing, events_of, save, subset, tensors_of, write_toml

from networks.network import LoraNetwork


@pytest.fixture
def config(pictures, tmp_path):
    """Write a config of two masked images: one batch of two an epoch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))


def changes(run, base) -> float:
    """Return the largest difference between two runs' tensors."""
    return max(float((tensor - base.tensors[name]).abs().max()) for name, tensor in run.tensors.items())


def events(run) -> list[str]:
    return events_of(run.folder / "logs").Tags()["scalars"]


def groups(run) -> set[str]:
    return {name.split("_")[1] for name in run.tensors}


# ---- steps -----------------------------------------------------------------------------------------------------


def test_an_epochs_last_step_may_take_fewer_batches(train, pictures, tmp_path):
    """Three batches of one, accumulated over two: two steps an epoch, of two and of one batch."""
    save(tmp_path / "images", "a", np.zeros((64, 64, 3), np.uint8), "a")
    photos = subset(pictures.photos, num_repeats=1)
    config = write_toml(tmp_path / "d.toml", photos, subset(tmp_path / "images"), batch_size=1)
    run = train(config, "--gradient_accumulation_steps", 2, "--max_train_epochs", 2, "--save_every_n_epochs", 1)
    assert len(run.losses) == 4
    assert run.metadata["ss_steps"] == "4"
    assert run.metadata["ss_max_train_steps"] == "4"
    assert run.names() == ["lora-000001.safetensors", "lora.safetensors"]


def test_the_loss_of_a_step_is_the_mean_over_its_accumulated_batches(train, pictures, tmp_path):
    config = write_toml(tmp_path / "d.toml", subset(pictures.photos), batch_size=1)
    once = train(config, "--max_train_steps", 2, "--learning_rate", "1e-12", name="once")
    accumulated = train(
        config, "--max_train_steps", 1, "--gradient_accumulation_steps", 2, "--learning_rate", "1e-12", name="twice"
    )
    assert accumulated.losses == pytest.approx([sum(once.losses) / 2], rel=1e-6)


def test_max_train_epochs_counts_epochs(train, config):
    run = train(config, "--max_train_epochs", 3)
    assert (len(run.losses), run.metadata["ss_epoch"]) == (3, "3")


# ---- precision and speed ---------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_loss(train, config):
    plain = train(config, "--max_train_steps", 3, name="plain")
    checkpointed = train(config, "--max_train_steps", 3, "--gradient_checkpointing", name="checkpointed")
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert changes(checkpointed, plain) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_model_has_the_same_loss(train, config):
    plain = train(config, name="plain")
    compiled = train(config, "--torch_compile", "--dynamo_backend", "eager", name="compiled")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


def test_bf16_stays_near_float32(train, config):
    plain = train(config, name="plain").losses
    mixed = train(config, "--mixed_precision", "bf16", name="mixed")
    assert mixed.losses == pytest.approx(plain, rel=0.05)
    assert mixed.losses != plain
    assert {tensor.dtype for tensor in mixed.tensors.values()} == {torch.float32}


def test_full_bf16_trains_and_saves_in_bf16(train, config):
    run = train(config, "--mixed_precision", "bf16", "--full_bf16")
    assert {tensor.dtype for tensor in run.tensors.values()} == {torch.bfloat16}
    assert all(np.isfinite(run.losses))


def test_two_runs_of_one_process_may_differ_in_precision(train, config):
    train(config, "--mixed_precision", "bf16", "--max_train_steps", 1, name="bf16")
    run = train(config, "--mixed_precision", "no", "--max_train_steps", 1, name="no")
    assert run.metadata["ss_mixed_precision"] == "no"


def test_an_8_bit_optimizer_trains(train, config):
    pytest.importorskip("bitsandbytes")
    run = train(config, "--optimizer_type", "AdamW8bit")
    assert run.metadata["ss_optimizer"].startswith("bitsandbytes.optim.adamw.AdamW8bit")
    assert any(tensor.any() for name, tensor in run.tensors.items() if "lora_up" in name)


# ---- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [("--clip_skip", 2), ("--max_token_length", 225), ("--weighted_captions",)])
def test_a_text_option_changes_what_the_model_reads(option, family, train, tmp_path):
    if option[0] in family.refused:
        pytest.skip("is refused, see tests/options")
    save(tmp_path / "images", "a", np.full((64, 64, 3), 90, np.uint8), "(a very:1.4) long caption, " * 20)
    config = write_toml(tmp_path / "d.toml", subset(tmp_path / "images"))
    plain = train(config, "--max_train_steps", 1, name="plain")
    changed = train(config, "--max_train_steps", 1, *option, name="changed")
    assert (changed.losses[0] == plain.losses[0]) is (option[0] in family.idle)
    assert changed.losses[0] == pytest.approx(plain.losses[0], rel=0.2)


# ---- network ---------------------------------------------------------------------------------------------------


def test_the_unet_alone_can_be_trained(train, config):
    run = train(config, "--network_train_unet_only")
    assert groups(run) == {"unet"}
    assert set(events(run)) >= {"lr/unet"}
    assert "lr/textencoder" not in events(run)


def test_the_text_encoders_alone_can_be_trained(family, train, config):
    run = train(config, "--network_train_text_encoder_only")
    assert groups(run) == set(family.text_groups)
    assert any(tensor.any() for name, tensor in run.tensors.items() if "lora_up" in name)


def test_a_text_encoder_rate_of_0_leaves_it_untrained(train, config):
    run = train(config, "--text_encoder_lr", 0)
    trained = {name.split("_")[1] for name, tensor in run.tensors.items() if "lora_up" in name and tensor.any()}
    assert trained == {"unet"}


def test_network_weights_are_gone_on_from(train, config):
    first = train(config, "--network_dim", 2, name="first")
    still = ("--learning_rate", "1e-12", "--max_train_steps", 1)
    going_on = train(config, "--network_dim", 2, "--network_weights", first.file, *still, name="on")
    assert changes(going_on, first) < 1e-9
    afresh = train(config, "--network_dim", 2, *still, name="afresh")
    assert going_on.losses != afresh.losses


def test_ranks_come_from_the_weights_if_asked(train, config):
    ranks = ("--network_dim", 3, "--network_alpha", 2, "--network_args", "conv_dim=2", "conv_alpha=1")
    first = train(config, *ranks, name="first")
    run = train(config, "--network_weights", first.file, "--dim_from_weights", name="on")
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    assert {name: tensor.shape for name, tensor in run.tensors.items()} == shapes
    alphas = [name for name in shapes if name.endswith(".alpha")]
    assert all(torch.equal(run.tensors[name], first.tensors[name]) for name in alphas)


def test_base_weights_are_part_of_the_model_that_is_trained_on(train, config):
    """Merged whole they give the loss of the network they are; times 0 they give the plain loss."""
    first = train(config, "--max_train_steps", 4, name="first")
    still = ("--learning_rate", "1e-12", "--max_train_steps", 1)
    plain = train(config, *still, name="plain").losses
    attached = train(config, *still, "--network_weights", first.file, name="attached").losses
    merged = train(config, *still, "--base_weights", first.file, name="merged").losses
    none = train(config, *still, "--base_weights", first.file, "--base_weights_multiplier", 0, name="none").losses
    assert attached != pytest.approx(plain, rel=1e-4)
    assert merged == pytest.approx(attached, rel=1e-5)
    assert none == pytest.approx(plain, rel=1e-6)


def test_scale_weight_norms_caps_every_module(train, config):
    limit = 0.01
    run = train(config, "--scale_weight_norms", limit, "--max_train_steps", 3)
    stems = {name.split(".")[0] for name in run.tensors}
    norms = []
    for stem in stems:
        up, down, alpha = (run.tensors[f"{stem}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        norms.append(float((up.flatten(1) @ down.flatten(1) * alpha / len(down)).norm()))
    assert max(norms) == pytest.approx(limit, rel=1e-3)
    assert "max_norm/keys_scaled" in events(run)


def test_dropouts_of_the_network_change_what_is_learnt(train, config):
    plain = train(config, name="plain")
    dropped = train(config, "--network_dropout", 0.5, "--network_args", "rank_dropout=0.1", name="dropped")
    assert dropped.losses[0] == plain.losses[0]  # nothing is learnt yet, so nothing can be dropped
    assert differing(dropped.tensors, plain.tensors)


def test_a_network_that_asks_for_it_is_told_of_each_batch(train, config, monkeypatch):
    """Third-party networks may have on_step_start; ours, standing in for one here, has none."""
    told = []
    monkeypatch.setattr(LoraNetwork, "on_step_start", lambda *network_and_models: told.append(1), raising=False)
    train(config, "--max_train_steps", 2)
    assert len(told) == 2


def test_flips_are_drawn_from_a_cache(train, pictures, tmp_path):
    """Flipped and unflipped latents both appear in the losses of eight still steps."""
    keys = {"alpha_mask": True, "flip_aug": True}
    flipping = write_toml(tmp_path / "f.toml", subset(pictures.cutouts, **keys), batch_size=1)
    fixed = write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True), batch_size=1)
    still = ("--cache_latents", "--learning_rate", "1e-12", "--max_train_steps", 8)
    both = zip(train(flipping, *still, name="f").losses, train(fixed, *still, name="d").losses, strict=True)
    assert {abs(one - other) < 1e-9 for one, other in both} == {True, False}


# ---- where options come from -----------------------------------------------------------------------------------


def test_a_config_file_trains_as_the_command_line_does_and_is_beaten_by_it(train, config, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text('[network]\nnetwork_dim = 2\n[training]\nmax_train_steps = 50\noptimizer_type = "AdamW"\n')
    by_file = train(config, "--config_file", settings, name="file")
    by_line = train(config, "--network_dim", 2, name="line")
    assert len(by_file.losses) == 2
    assert not differing(tensors_of(by_file.file), tensors_of(by_line.file))
