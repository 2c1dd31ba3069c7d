"""What the groups check, and what follows from their values."""

from dataclasses import FrozenInstanceError, fields

import pytest

from library.errors import OptionError
from library.options import GROUPS, Options, public_values
from library.options.caching import CachingOptions
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.declare import declared
from library.options.flow import FlowOptions
from library.options.groups import build_all
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions
from library.options.masks import MaskOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.sd3 import Sd3Options
from library.options.training import TrainingOptions

WRONG = [
    (ModelOptions, {"clip_skip": 0}, "--clip_skip must be at least 1"),
    (ModelOptions, {"max_token_length": 100}, "--max_token_length must be one of 75, 150, 225; got 100"),
    (Sd3Options, {"t5xxl_max_token_length": 0}, "--t5xxl_max_token_length must be at least 1 and at most 512"),
    (Sd3Options, {"t5xxl_max_token_length": 1000}, "--t5xxl_max_token_length must be at least 1 and at most 512"),
    (Sd3Options, {"t5xxl_dtype": "bf15"}, "--t5xxl_dtype must be one of"),
    (Sd3Options, {"t5xxl_device": "gpu"}, "--t5xxl_device must be cpu, cuda or cuda:N, got gpu"),
    (Sd3Options, {"clip_l_dropout_rate": 1.1}, "--clip_l_dropout_rate must be at least 0 and at most 1"),
    (Sd3Options, {"clip_g_dropout_rate": -0.1}, "--clip_g_dropout_rate must be at least 0 and at most 1"),
    (Sd3Options, {"t5_dropout_rate": 2.0}, "--t5_dropout_rate must be at least 0 and at most 1"),
    (Sd3Options, {"pos_emb_random_crop_rate": 2.0}, "--pos_emb_random_crop_rate must be at least 0 and at most 1"),
    (FlowOptions, {"weighting_scheme": "sigma"}, "--weighting_scheme must be one of"),
    (FlowOptions, {"training_shift": 0.0}, "--training_shift must be above 0"),
    (FlowOptions, {"logit_std": -1.0}, "--logit_std must be at least 0"),
    (FlowOptions, {"mode_scale": 1.8}, "--mode_scale must be at least -1 and at most 1.75194"),
    (FlowOptions, {"mode_scale": -1.1}, "--mode_scale must be at least -1 and at most 1.75194"),
    (MaskOptions, {"mask_token_drop": -1}, "--mask_token_drop must be at least 0"),
    (TrainingOptions, {"blocks_to_swap": -1}, "--blocks_to_swap must be at least 0"),
    (
        TrainingOptions,
        {"blocks_to_swap": 8, "cpu_offload_checkpointing": True},
        "--blocks_to_swap 8 cannot be with --cpu_offload_checkpointing",
    ),
    (DatasetOptions, {"resolution": "large"}, "--resolution must be SIZE or WIDTH,HEIGHT"),
    (DatasetOptions, {"resolution": "512,"}, "--resolution must be SIZE or WIDTH,HEIGHT"),
    (DatasetOptions, {"train_batch_size": 0}, "--train_batch_size must be at least 1"),
    (DatasetOptions, {"min_bucket_reso": 2048}, "--min_bucket_reso 2048 is above --max_bucket_reso 1024"),
    (DatasetOptions, {"face_crop_aug_range": "4,2"}, "--face_crop_aug_range must be MIN,MAX"),
    (DatasetOptions, {"face_crop_aug_range": "2"}, "--face_crop_aug_range must be MIN,MAX"),
    (DatasetOptions, {"prior_loss_weight": -1.0}, "--prior_loss_weight must be at least 0"),
    (CaptionOptions, {"caption_dropout_rate": 1.5}, "--caption_dropout_rate must be at least 0 and at most 1"),
    (CachingOptions, {"vae_batch_size": -1}, "--vae_batch_size must be at least 0"),
    (NoiseOptions, {"min_timestep": 600, "max_timestep": 400}, "--min_timestep 600 is above --max_timestep 400"),
    (NoiseOptions, {"max_timestep": 1001}, "--max_timestep must be at least 0 and at most 1000"),
    (LossOptions, {"huber_c": 0.0}, "--huber_c must be above 0"),
    (LossOptions, {"loss_type": "l3"}, "--loss_type must be one of"),
    (NetworkOptions, {"network_args": ("conv_dim",)}, "--network_args takes key=value, got 'conv_dim'"),
    (NetworkOptions, {"dim_from_weights": True}, "--dim_from_weights takes the ranks from --network_weights"),
    (NetworkOptions, {"base_weights_multiplier": (1.0,)}, "has 1 values for 0 files"),
    (
        NetworkOptions,
        {"network_train_unet_only": True, "network_train_text_encoder_only": True},
        "leave nothing to train",
    ),
    (NetworkOptions, {"text_encoder_lr": (1e-4, -1.0)}, "--text_encoder_lr must be at least 0"),
    (OptimizerOptions, {"optimizer_args": ("=1",)}, "--optimizer_args takes key=value"),
    (OptimizerOptions, {"optimizer_type": "Prodigy", "use_8bit_adam": True}, "--use_8bit_adam means AdamW8bit"),
    (OptimizerOptions, {"use_lion_optimizer": True, "use_8bit_adam": True}, "--use_lion_optimizer means Lion"),
    (TrainingOptions, {"fp8_base": True}, "--fp8_base needs --mixed_precision fp16 or bf16"),
    (TrainingOptions, {"fp8_base_unet": True}, "--fp8_base_unet needs --mixed_precision fp16 or bf16"),
    (ScheduleOptions, {"lr_scheduler_args": ("oops",)}, "--lr_scheduler_args takes key=value"),
    (ScheduleOptions, {"lr_warmup_steps": 0.1}, "--lr_warmup_steps 0.1: --lr_scheduler constant has no warm-up"),
    (ScheduleOptions, {"lr_warmup_steps": 5, "lr_scheduler_type": "StepLR"}, "--lr_scheduler_type StepLR has no warm"),
    (TrainingOptions, {"full_fp16": True}, "--full_fp16 needs --mixed_precision fp16, got no"),
    (TrainingOptions, {"full_bf16": True, "mixed_precision": "fp16"}, "--full_bf16 needs --mixed_precision bf16"),
    (TrainingOptions, {"torch_compile": True, "dynamo_backend": "no"}, "compiles nothing"),
    (TrainingOptions, {"seed": -1}, "--seed must be at least 0"),
    (SamplingOptions, {"sample_every_n_steps": 5}, "--sample_every_n_steps has no prompts"),
    (SamplingOptions, {"sample_at_first": True}, "--sample_at_first has no prompts"),
    (SavingOptions, {"save_model_as": "zip"}, "--save_model_as must be one of ckpt, pt, safetensors"),
    (LoggingOptions, {"log_with": "tensorboard"}, "--log_with tensorboard needs a folder"),
]


@pytest.mark.parametrize(
    ("group", "values", "message"), WRONG, ids=[f"{g.__name__}-{'-'.join(v)}" for g, v, _ in WRONG]
)
def test_a_wrong_or_contradictory_value_is_refused_by_name(group: type, values: dict[str, object], message: str):
    with pytest.raises(OptionError) as caught:
        group(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", GROUPS.values(), ids=lambda group: group.__name__)
def test_a_group_is_frozen_and_its_defaults_are_right(group: type):
    made = group()
    with pytest.raises(FrozenInstanceError):
        setattr(made, declared(group)[0].name, None)


def test_there_is_one_field_per_group():
    assert [entry.name for entry in fields(Options)] == list(GROUPS)
    assert {name: type(getattr(Options(), name)) for name in GROUPS} == dict(GROUPS)


def test_values_find_their_groups():
    options = build_all({"network_dim": 8, "seed": 3})
    assert options.network.network_dim == 8
    assert options.training.seed == 3


def test_a_text_cache_on_disk_is_a_text_cache():
    assert CachingOptions(cache_text_encoder_outputs_to_disk=True).cache_text_encoder_outputs


def test_a_cache_on_disk_is_a_cache():
    assert CachingOptions(cache_latents_to_disk=True).cache_latents


def test_75_tokens_are_what_unset_means():
    assert ModelOptions(max_token_length=75).max_token_length is None


@pytest.mark.parametrize(
    ("values", "extension"),
    [
        ({}, ".caption"),
        ({"caption_extension": "txt"}, ".txt"),
        ({"caption_extension": ".txt"}, ".txt"),
        ({"caption_extension": ".txt", "caption_extention": ".tags"}, ".tags"),
    ],
)
def test_the_caption_ending_has_a_dot_and_its_old_spelling_wins(values: dict[str, str], extension: str):
    assert CaptionOptions(**values).caption_extension == extension


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, ""),
        ({"use_8bit_adam": True}, "AdamW8bit"),
        ({"use_lion_optimizer": True}, "Lion"),
        ({"use_8bit_adam": True, "optimizer_type": "adamw8bit"}, "AdamW8bit"),
        ({"optimizer_type": "Prodigy"}, "Prodigy"),
    ],
)
def test_an_old_optimizer_switch_becomes_its_name(values: dict[str, object], name: str):
    assert OptimizerOptions(**values).optimizer_type == name


def test_an_interval_of_nothing_is_off():
    assert SavingOptions(save_every_n_epochs=0, save_last_n_steps=0) == SavingOptions()
    assert SamplingOptions(sample_every_n_steps=0, sample_every_n_epochs=-1) == SamplingOptions()
    assert NetworkOptions(scale_weight_norms=0.0).scale_weight_norms is None


def test_equal_timestep_bounds_fix_the_timestep():
    assert NoiseOptions(min_timestep=500, max_timestep=500).min_timestep == 500


def test_warm_up_is_fine_where_the_schedule_has_one():
    assert ScheduleOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.1).lr_warmup_steps == 0.1


def test_public_values_hold_no_secret_and_no_path():
    options = Options(
        model=ModelOptions(pretrained_model_name_or_path="model.safetensors"),
        logging=LoggingOptions(wandb_api_key="secret", log_with="wandb"),
        network=NetworkOptions(network_dim=16, base_weights=("a.safetensors",)),
    )
    values = public_values(options)
    assert values["network_dim"] == 16
    assert values["log_with"] == "wandb"
    assert not {"wandb_api_key", "pretrained_model_name_or_path", "base_weights", "output_dir"} & set(values)


def test_a_vae_batch_of_no_image_is_one_of_one():
    assert CachingOptions(vae_batch_size=0).vae_batch_size == 1


@pytest.mark.parametrize(("given", "settled"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float", "fp32")])
def test_a_number_format_of_t5_has_one_name(given: str, settled: str):
    assert Sd3Options(t5xxl_dtype=given).t5xxl_dtype == settled


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_t5_can_be_on_a_device_of_its_own(device: str):
    assert Sd3Options(t5xxl_device=device).t5xxl_device == device


def test_no_blocks_to_swap_is_the_same_as_none_given():
    assert TrainingOptions(blocks_to_swap=0, cpu_offload_checkpointing=True).blocks_to_swap is None


def test_a_reach_of_no_cells_is_a_reach():
    assert MaskOptions(mask_token_drop=0).mask_token_drop == 0
