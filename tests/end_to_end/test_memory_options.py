"""Runs that trade time for memory: steps within the backward pass, checkpoints in main memory."""

from pathlib import Path

import pytest
from end_to_end.conftest import Train
from end_to_end.training_runs import Family, Pictures, arguments, differing, subset, write_toml


@pytest.fixture
def config(tmp_path: Path, pictures: Pictures) -> Path:
    return write_toml(tmp_path / "data.toml", subset(pictures.photos, conditioning_data_dir=pictures.photo_masks))


def test_a_run_with_steps_in_the_backward_pass_is_the_plain_run(train: Train, config: Path) -> None:
    options = ("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False")
    options += ("--max_grad_norm", 0, "--max_train_steps", 4, "--lr_scheduler", "linear")
    plain = train(config, *options, name="plain")
    fused = train(config, *options, "--fused_backward_pass", "--gradient_checkpointing", name="fused")
    assert fused.losses == plain.losses
    assert not differing(fused.tensors, plain.tensors)


def test_a_run_with_steps_in_the_backward_pass_is_resumed_bit_for_bit(train: Train, config: Path) -> None:
    options = ("--fused_backward_pass", "--max_grad_norm", 1, "--max_train_steps", 4)
    whole = train(config, *options, "--save_state", "--save_every_n_steps", 2, name="whole")
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = train(config, *options, "--resume", state, name="resumed")
    assert not differing(resumed.tensors, whole.tensors)


def test_a_run_with_groups_that_step_in_the_backward_pass_is_the_plain_run(train: Train, config: Path) -> None:
    options = ("--max_grad_norm", 0, "--max_train_steps", 4, "--lr_scheduler", "linear", "--text_encoder_lr", 1e-4)
    plain = train(config, *options, name="plain")
    fused = train(config, *options, "--fused_optimizer_groups", 10, "--gradient_checkpointing", name="fused")
    assert fused.losses == plain.losses
    assert fused.curve("lr/unet") == plain.curve("lr/unet")
    assert not differing(fused.tensors, plain.tensors)


def test_a_run_with_groups_that_adapt_their_rates_is_resumed_bit_for_bit(train: Train, config: Path) -> None:
    pytest.importorskip("prodigyopt")
    options = ("--fused_optimizer_groups", 3, "--optimizer_type", "Prodigy", "--learning_rate", 1)
    options += ("--max_grad_norm", 1, "--max_train_steps", 4)
    whole = train(config, *options, "--save_state", "--save_every_n_steps", 2, name="whole")
    state = whole.folder / "out" / "lora-step00000002-state"
    resumed = train(config, *options, "--resume", state, name="resumed")
    assert not differing(resumed.tensors, whole.tensors)


def test_clipping_weight_by_weight_is_announced_and_not_the_same(
    train: Train, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--optimizer_type", "SGDNesterov", "--max_grad_norm", 1e-4)
    plain = train(config, *options, name="plain")
    fused = train(config, *options, "--fused_backward_pass", name="fused")
    assert (
        "--max_grad_norm 0.0001 with --fused_backward_pass: clips each weight's gradient alone"
        in capfd.readouterr().err
    )
    assert differing(fused.tensors, plain.tensors)


def test_an_optimizer_for_all_weights_at_once_is_refused_before_a_model_is_loaded(
    family: Family, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prodigyopt")
    more = ("--fused_backward_pass", "--optimizer_type", "Prodigy", "--learning_rate", 1)
    assert family.run(*arguments(family, tmp_path, config, *more)) == 2
    errors = capfd.readouterr().err
    assert "Prodigy looks at all of them together" in errors
    assert "loaded" not in errors


def test_checkpoints_in_main_memory_change_nothing(train: Train, config: Path) -> None:
    """The option switches checkpointing on by itself."""
    plain = train(config, "--gradient_checkpointing", name="plain")
    offloaded = train(config, "--cpu_offload_checkpointing", name="offloaded")
    assert not differing(offloaded.tensors, plain.tensors)
    assert offloaded.metadata["ss_gradient_checkpointing"] == "True"
