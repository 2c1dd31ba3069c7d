"""What is refused where processes share out what is trained."""

import pytest

from library.errors import OptionError
from library.options.deepspeed import DeepSpeedOptions
from library.options.groups import build_all
from library.options.sharing import check_deepspeed, check_sharing, idle_deepspeed_options

CPU = {"offload_optimizer_device": "cpu"}
WRONG_ALONE = [
    ({"zero_stage": 4}, "--zero_stage must be one of 0, 1, 2, 3"),
    ({"zero_stage": 0, **CPU}, "--offload_optimizer_device cpu needs --zero_stage 1 or more, got 0"),
    ({"offload_optimizer_device": "nvme"}, "--offload_optimizer_device nvme needs --zero_stage 3 or more, got 2"),
    ({"offload_param_device": "cpu"}, "--offload_param_device cpu needs --zero_stage 3"),
    ({"zero_stage": 3, "offload_param_device": "nvme"}, "needs --offload_param_nvme_path=FOLDER"),
    ({"zero_stage": 3, "offload_optimizer_device": "nvme"}, "needs --offload_optimizer_nvme_path=FOLDER"),
    ({"zero3_save_16bit_model": True}, "--zero3_save_16bit_model needs --zero_stage 3, got 2"),
    ({"fp16_master_weights_and_gradients": True}, "needs --zero_stage 2 and --offload_optimizer_device cpu"),
]
WRONG_TOGETHER = [
    ({"save_state": True}, "--save_state does not go with --deepspeed"),
    ({"resume": "a-state"}, "--resume does not go with --deepspeed"),
    ({"save_state_on_train_end": True}, "--save_state_on_train_end does not go with --deepspeed"),
    ({"scale_weight_norms": 1.0}, "--scale_weight_norms does not go with --deepspeed"),
    ({"ema_decay": 0.9}, "--ema_decay does not go with --deepspeed"),
    ({"fused_backward_pass": True}, "--fused_backward_pass does not go with --deepspeed"),
    ({"fused_optimizer_groups": 2}, "--fused_optimizer_groups does not go with --deepspeed"),
    ({"network_args": ("module_dropout=0.1",)}, "module_dropout does not go with --deepspeed"),
    ({"optimizer_type": "Prodigy"}, "--optimizer_type Prodigy does not go with --deepspeed"),
    ({"optimizer_type": "Adafactor"}, "--optimizer_type Adafactor needs whole weights"),
    ({"optimizer_type": "AdamWScheduleFree"}, "--optimizer_type AdamWScheduleFree needs whole weights"),
    ({"optimizer_type": "Lion", **CPU}, "DeepSpeed would run its own Adam in place of Lion"),
    ({**CPU, "fp16_master_weights_and_gradients": True}, "needs --mixed_precision fp16, got no"),
    (
        {"zero_stage": 3, "sample_every_n_steps": 5, "sample_prompts": "p.txt"},
        "--zero_stage 3 has no weights for sample pictures",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG_ALONE, ids=lambda value: str(value)[:50])
def test_deepspeed_options_that_contradict_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        DeepSpeedOptions(deepspeed=True, **values)


@pytest.mark.parametrize(("values", "message"), WRONG_TOGETHER, ids=lambda value: str(value)[:50])
def test_what_does_not_go_with_deepspeed_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        check_deepspeed(build_all({"deepspeed": True, **values}))


@pytest.mark.parametrize(("values", "_message"), WRONG_TOGETHER, ids=lambda value: str(value)[:50])
def test_without_deepspeed_all_of_that_is_fine(values, _message):
    check_deepspeed(build_all(values))


@pytest.mark.parametrize("values", [{}, CPU, {"zero_stage": 0, "optimizer_type": "Adafactor"}, {"zero_stage": 3}])
def test_what_goes_with_deepspeed_passes(values):
    check_deepspeed(build_all({"deepspeed": True, **values}))


def test_fsdp_has_no_adafactor():
    with pytest.raises(OptionError, match="--optimizer_type Adafactor does not go with FSDP"):
        check_sharing(build_all({"optimizer_type": "Adafactor"}), "FSDP")


def test_fsdp_has_no_8bit_optimizers():
    with pytest.raises(OptionError, match="--optimizer_type AdamW8bit does not go with FSDP"):
        check_sharing(build_all({"optimizer_type": "AdamW8bit"}), "FSDP")
    check_sharing(build_all({"optimizer_type": "Lion"}), "FSDP")


def test_deepspeeds_options_without_it_are_told():
    idle = list(idle_deepspeed_options(build_all({"zero_stage": 1, **CPU})))
    assert [warning.split()[0] for warning in idle] == ["--zero_stage", "--offload_optimizer_device"]
    assert list(idle_deepspeed_options(build_all({"deepspeed": True, "zero_stage": 1}))) == []
