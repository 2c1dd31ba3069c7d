"""What sd3_train_network.py makes of options: its own, and those that SD3 has no use for."""

import pytest

from library.errors import OptionError
from library.options import CommandLine, read_training
from library.options.checks import check_files
from library.options.reference import IGNORED_BY_SCRIPT

SCRIPT = "sd3_train_network"
NEEDED = [
    "--pretrained_model_name_or_path=model.safetensors",
    "--dataset_config=data.toml",
    "--network_module=networks.lora_sd3",
    "--output_dir=output",
]
GUIDE = (
    *("--clip_l=l.safetensors", "--clip_g=g.safetensors", "--t5xxl=t5.safetensors", "--output_name=my_sd3_lora"),
    *("--save_model_as=safetensors", "--network_dim=16", "--network_alpha=1", "--learning_rate=1e-4"),
    *("--optimizer_type=AdamW8bit", "--lr_scheduler=constant", "--sdpa", "--max_train_epochs=10"),
    *("--save_every_n_epochs=1", "--mixed_precision=fp16", "--gradient_checkpointing"),
    *("--weighting_scheme=sigma_sqrt", "--blocks_to_swap=32"),
)
IDLE = {  # a value other than the default, of each option that has no effect
    "v2": "",
    "v_parameterization": "",
    "clip_skip": "=2",
    "max_token_length": "=225",
    "noise_offset": "=0.1",
    "noise_offset_random_strength": "",
    "adaptive_noise_scale": "=0.1",
    "multires_noise_iterations": "=6",
    "multires_noise_discount": "=0.8",
    "ip_noise_gamma": "=0.1",
    "ip_noise_gamma_random_strength": "",
    "zero_terminal_snr": "",
    "min_snr_gamma": "=5",
    "scale_v_pred_loss_like_noise_pred": "",
    "v_pred_like_loss": "=0.5",
    "debiased_estimation_loss": "",
    "sample_sampler": "=euler_a",
    "xformers": "",
}


def read(*more: str, script: str = SCRIPT) -> CommandLine:
    return read_training([*NEEDED, *more], script)


def test_the_guides_command_gives_no_warning():
    result = read(*GUIDE)
    assert result.warnings == ()
    assert result.options.training.blocks_to_swap == 32
    assert result.options.flow.weighting_scheme == "sigma_sqrt"
    assert (result.options.sd3.clip_l, result.options.sd3.t5xxl) == ("l.safetensors", "t5.safetensors")


def test_every_option_of_sd3_is_read():
    sd3 = read(
        *("--save_clip", "--save_t5xxl", "--t5xxl_device=cuda:1", "--t5xxl_dtype=bf16", "--t5xxl_max_token_length=77"),
        *("--apply_lg_attn_mask", "--apply_t5_attn_mask", "--clip_l_dropout_rate=0.1", "--clip_g_dropout_rate=0.2"),
        *("--t5_dropout_rate=0.3", "--pos_emb_random_crop_rate=0.4", "--enable_scaled_pos_embed"),
    ).options.sd3
    assert (sd3.save_clip, sd3.save_t5xxl, sd3.t5xxl_device, sd3.t5xxl_dtype) == (True, True, "cuda:1", "bf16")
    assert (sd3.t5xxl_max_token_length, sd3.apply_lg_attn_mask, sd3.apply_t5_attn_mask) == (77, True, True)
    assert (sd3.clip_l_dropout_rate, sd3.clip_g_dropout_rate, sd3.t5_dropout_rate) == (0.1, 0.2, 0.3)
    assert (sd3.pos_emb_random_crop_rate, sd3.enable_scaled_pos_embed) == (0.4, True)


def test_other_scripts_warn_about_what_only_sd3_has():
    given = ("--t5_dropout_rate=0.1", "--mask_token_drop=4", "--weighting_scheme=mode", "--enable_scaled_pos_embed")
    result = read(*given, script="sdxl_train_network")
    assert [text.split()[0] for text in result.warnings] == [option.partition("=")[0] for option in given]
    assert result.options.masks.mask_token_drop is None


# ---- what SD3 has no use for ---------------------------------------------------------------------------------------
def test_the_list_of_idle_options_is_whole():
    assert set(IDLE) == set(IGNORED_BY_SCRIPT[SCRIPT])


@pytest.mark.parametrize("name", IDLE)
def test_an_option_that_sd3_has_no_use_for_is_named_with_the_reason(name: str):
    (warning,) = read(f"--{name}{IDLE[name]}").warnings
    assert warning == f"--{name} has no effect: {IGNORED_BY_SCRIPT[SCRIPT][name]}"


def test_an_option_at_its_default_is_not_named():
    given = ("--noise_offset=0", "--multires_noise_discount=0.3", "--sample_sampler=ddim", "--min_snr_gamma=0")
    assert read(*given).warnings == ()


def test_what_has_no_effect_counts_as_not_given():
    options = read(*(f"--{name}{value}" for name, value in IDLE.items())).options
    assert (options.model.v2, options.model.v_parameterization, options.model.max_token_length) == (False, False, None)
    assert (options.noise.noise_offset, options.noise.zero_terminal_snr) == (None, False)
    assert (options.loss.v_pred_like_loss, options.loss.scale_v_pred_loss_like_noise_pred) == (None, False)
    assert options.sampling.sample_sampler == "ddim"
    assert not options.training.xformers


def test_files_record_clip_skip_though_it_has_no_effect():
    assert read("--clip_skip=2").options.model.clip_skip == 2


def test_weighted_captions_are_refused():
    with pytest.raises(OptionError, match=r"--weighted_captions cannot be used with sd3_train_network.py: T5-XXL"):
        read("--weighted_captions")


# ---- numbers of another scheme -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "scheme"),
    [("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")],
)
def test_a_number_without_its_scheme_is_named(number: str, scheme: str):
    (warning,) = read(f"--{number}=0.5", "--weighting_scheme=sigma_sqrt").warnings
    assert warning == f"--{number} has no effect without --weighting_scheme {scheme}"
    assert read(f"--{number}=0.5", f"--weighting_scheme={scheme}").warnings == ()


def test_the_shift_goes_with_every_scheme():
    for scheme in ("uniform", "mode", "logit_normal", "sigma_sqrt", "cosmap", "none"):
        assert read("--training_shift=3", f"--weighting_scheme={scheme}").warnings == ()


# ---- cached text ---------------------------------------------------------------------------------------------------
CACHED = "--cache_text_encoder_outputs"


def test_clip_is_trained_beside_cached_text():
    result = read(CACHED)
    assert result.warnings == ()
    assert not result.options.network.network_train_unet_only


def test_clip_alone_is_trained_beside_cached_text():
    assert read(CACHED, "--network_train_text_encoder_only").warnings == ()


@pytest.mark.parametrize("value", ["True", "true"])
def test_t5_cannot_be_trained_where_its_text_is_cached(value: str):
    with pytest.raises(OptionError, match="train_t5xxl of --network_args has nothing to train"):
        read(CACHED, "--network_args", f"train_t5xxl={value}")


def test_t5_that_is_not_trained_can_be_cached():
    assert read(CACHED, "--network_args", "train_t5xxl=False", "verbose=True").warnings == ()


def test_t5_is_not_trained_with_the_denoiser_alone():
    (warning,) = read("--network_train_unet_only", "--network_args", "train_t5xxl=True").warnings
    assert warning.startswith("--network_args train_t5xxl has no effect: --network_train_unet_only")


def test_captions_of_a_class_of_the_users_own_are_not_cached():
    with pytest.raises(OptionError, match="--cache_text_encoder_outputs cannot be with --dataset_class"):
        read(CACHED, "--dataset_class=a.B", "--resolution=512")


def test_the_number_of_captions_at_a_time_needs_the_cache():
    assert read(CACHED, "--text_encoder_batch_size=4").warnings == ()
    (warning,) = read("--text_encoder_batch_size=4").warnings
    assert warning.startswith("--text_encoder_batch_size has no effect")


# ---- files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5xxl"])
def test_a_text_encoder_that_is_not_there_is_named(tmp_path, name: str):
    for file in ("model.safetensors", "data.toml"):
        (tmp_path / file).touch()
    needed = [
        f"--pretrained_model_name_or_path={tmp_path}/model.safetensors",
        f"--dataset_config={tmp_path}/data.toml",
        "--network_module=networks.lora",
        "--output_dir=output",
    ]
    check_files(read_training(needed, SCRIPT).options)
    with pytest.raises(OptionError, match=rf"^--{name}: there is no file gone.safetensors. Check the path\.$"):
        check_files(read_training([*needed, f"--{name}=gone.safetensors"], SCRIPT).options)
