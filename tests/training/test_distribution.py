"""What accelerate is told of how a run is spread over processes."""

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.options.deepspeed import DeepSpeedOptions
from library.options.groups import Options
from library.options.training import TrainingOptions
from library.training import distribution


def plugin_config(gradient_accumulation_steps=1, max_grad_norm=1.0, **values):
    options = DeepSpeedOptions(deepspeed=True, **values)
    return distribution.deepspeed_plugin(options, gradient_accumulation_steps, max_grad_norm).deepspeed_config


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", distribution.USE_DEEPSPEED, distribution.USE_FSDP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_the_deepspeed_options_reach_accelerates_plugin():
    config = plugin_config(
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
        zero_stage=3,
        offload_optimizer_device="nvme",
        offload_optimizer_nvme_path="fast/a",
        offload_param_device="nvme",
        offload_param_nvme_path="fast/b",
        zero3_save_16bit_model=True,
    )
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    zero = config["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "fast/a"}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "fast/b"}
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_the_frozen_models_keep_torchs_own_linear():
    assert plugin_config()["zero_optimization"]["memory_efficient_linear"] is False


def test_fp16_master_weights_are_told_to_deepspeed():
    values = {"offload_optimizer_device": "cpu", "fp16_master_weights_and_gradients": True}
    assert plugin_config(**values)["fp16"] == {"enabled": True, "fp16_master_weights_and_grads": True}
    assert "fp16" not in plugin_config()


def test_deepspeed_without_the_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(OptionError, match="pip install deepspeed"):
        distribution.check(Options(deepspeed=DeepSpeedOptions(deepspeed=True)))


def test_deepspeed_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    with pytest.raises(OptionError, match="accelerate launch --use_deepspeed"):
        distribution.check(Options(deepspeed=DeepSpeedOptions(deepspeed=True)))


def test_a_launcher_that_wants_deepspeed_needs_the_option(monkeypatch):
    monkeypatch.setenv(distribution.USE_DEEPSPEED, "true")
    with pytest.raises(OptionError, match="switched on by --deepspeed"):
        distribution.check(Options())


@pytest.mark.parametrize("version", ["1", None])
def test_the_first_fsdp_is_refused(version, monkeypatch):
    monkeypatch.setenv(distribution.USE_FSDP, "true")
    if version:
        monkeypatch.setenv(distribution.FSDP_VERSION, version)
    with pytest.raises(OptionError, match="--fsdp_version 2"):
        distribution.check(Options())


def test_fsdp_and_deepspeed_exclude_each_other(monkeypatch):
    monkeypatch.setenv(distribution.USE_FSDP, "true")
    with pytest.raises(OptionError, match="exclude each other"):
        distribution.check(Options(deepspeed=DeepSpeedOptions(deepspeed=True)))


def test_the_second_fsdp_and_a_plain_run_pass(monkeypatch):
    distribution.check(Options())
    monkeypatch.setenv(distribution.USE_FSDP, "true")
    monkeypatch.setenv(distribution.FSDP_VERSION, "2")
    distribution.check(Options())


def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch):
    made = distribution.accelerator(
        TrainingOptions(), DeepSpeedOptions(), max_grad_norm=1.0, batch_size=1, may_leave_weights_out=False
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 processes were started"):
        distribution.check_processes(made, DeepSpeedOptions())


def test_constants_are_not_sent_to_other_processes_at_each_step():
    (ddp,) = distribution.handlers(TrainingOptions(), may_leave_weights_out=False)
    assert ddp.broadcast_buffers is False


def test_the_innermost_optimizer_is_found_through_wrappers():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    own = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    assert distribution.innermost(Wrapper(Wrapper(own))) is own
    assert distribution.innermost(own) is own


def test_held_back_images_are_refused_only_with_stage_3():
    distribution.check_validation(DeepSpeedOptions(deepspeed=True, zero_stage=2), 5)
    distribution.check_validation(DeepSpeedOptions(deepspeed=True, zero_stage=3), 0)
    with pytest.raises(OptionError, match="--zero_stage 3 has no weights for validation"):
        distribution.check_validation(DeepSpeedOptions(deepspeed=True, zero_stage=3), 5)
