"""What options of different groups demand of each other."""

import pytest

from library.errors import OptionError
from library.options import read_training
from library.options.checks import check_files

NEEDED = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": "images",
    "resolution": "512",
    "network_module": "networks.lora",
    "output_dir": "output",
}


def warnings_of(*arguments: str, **changed: str | None) -> tuple[str, ...]:
    given = {**NEEDED, **changed}
    argv = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return read_training([*argv, *arguments], "train_network").warnings


def test_the_needed_options_alone_give_no_warning():
    assert warnings_of() == ()


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "resolution", "network_module", "output_dir"])
def test_a_needed_option_that_is_missing_is_named(name: str):
    with pytest.raises(OptionError, match=f"--{name} is missing. Add "):
        warnings_of(**{name: None})


def test_there_must_be_a_dataset():
    with pytest.raises(OptionError, match="There is no dataset"):
        warnings_of(train_data_dir=None)


def test_a_dataset_config_stands_for_folder_and_resolution():
    assert warnings_of("--dataset_config=data.toml", train_data_dir=None, resolution=None) == ()


def test_showing_a_dataset_needs_no_model():
    missing = dict.fromkeys(("pretrained_model_name_or_path", "network_module", "output_dir"))
    assert warnings_of("--debug_dataset", **missing) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adaptive_noise_scale=0.1"], "--adaptive_noise_scale changes --noise_offset"),
        (["--scale_v_pred_loss_like_noise_pred"], "needs --v_parameterization"),
        (["--v_pred_like_loss=0.5", "--v_parameterization"], "--v_pred_like_loss is not for --v_parameterization"),
        (["--fused_backward_pass", "--gradient_accumulation_steps=2"], "--gradient_accumulation_steps 2 to add up"),
        (["--cache_text_encoder_outputs", "--network_train_text_encoder_only"], "Leave out one of"),
        (
            ["--cache_text_encoder_outputs", "--network_train_unet_only", "--dataset_class=a.B"],
            "--cache_text_encoder_outputs cannot be with --dataset_class",
        ),
        (["--fused_backward_pass", "--mixed_precision=fp16"], "--fused_backward_pass cannot have .* fp16"),
        (
            ["--fused_optimizer_groups=4", "--gradient_accumulation_steps=2"],
            "--fused_optimizer_groups frees .* 2 to add",
        ),
        (["--fused_optimizer_groups=4", "--mixed_precision=fp16"], "--fused_optimizer_groups cannot have .* fp16"),
        (["--fused_optimizer_groups=4", "--fused_backward_pass"], "each alone. Leave one of them out"),
        (["--ema_decay=0.9"], "--ema_decay 0.9 keeps an average that nothing uses. Add --save_ema"),
        (["--ema_decay=0", "--save_ema"], "--save_ema has no average to save. Add --ema_decay"),
        (["--ema_decay=1", "--save_ema"], "--ema_decay must be at least 0 and below 1"),
        (["--fused_optimizer_groups=1"], "nothing is freed early. Give at least 2"),
        (["--fused_optimizer_groups=-1"], "--fused_optimizer_groups must be at least 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], message: str):
    with pytest.raises(OptionError, match=message):
        warnings_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--v2", "--clip_skip=2"], "--clip_skip with --v2"),
        (["--token_warmup_min=3"], "--token_warmup_min has no effect without --token_warmup_step"),
        (["--skip_cache_check", "--cache_latents"], "--skip_cache_check has no effect"),
        (["--cache_dir=cache", "--cache_latents"], "--cache_dir has no effect"),
        (["--cache_text_encoder_outputs"], "--cache_text_encoder_outputs requires --network_train_unet_only"),
        (["--text_encoder_batch_size=4"], "--text_encoder_batch_size has no effect"),
        (["--noise_offset_random_strength"], "--noise_offset_random_strength has no effect"),
        (["--ip_noise_gamma_random_strength"], "--ip_noise_gamma_random_strength has no effect"),
        (["--multires_noise_discount=0.5"], "--multires_noise_discount has no effect"),
        (["--max_train_epochs=2", "--max_train_steps=10"], "--max_train_steps has no effect"),
        (["--dynamo_backend=eager"], "--dynamo_backend has no effect"),
        (["--network_train_unet_only", "--text_encoder_lr=1e-4"], "--text_encoder_lr has no effect"),
        (["--network_train_text_encoder_only", "--unet_lr=1e-4"], "--unet_lr has no effect"),
        (
            ["--fused_optimizer_groups=4"],
            "--max_grad_norm 1 with --fused_optimizer_groups: clips each group's gradient",
        ),
        (["--huber_c=0.2"], "--huber_schedule, --huber_c and --huber_scale have no effect with --loss_type l2"),
        (["--save_n_epoch_ratio=2", "--save_every_n_epochs=1"], "--save_every_n_epochs has no effect"),
        (["--save_last_n_epochs=2"], "--save_last_n_epochs has no effect"),
        (["--save_last_n_steps=2"], "--save_last_n_steps has no effect"),
        (["--sample_prompts=p.txt"], "--sample_prompts has no effect"),
        (
            ["--sample_prompts=p.txt", "--sample_every_n_steps=1", "--sample_every_n_epochs=1"],
            "--sample_every_n_steps has no effect",
        ),
        (["--log_prefix=x"], "--log_prefix has no effect"),
        (["--log_config"], "--log_config has no effect"),
        (["--wandb_run_name=x"], "--wandb_run_name has no effect without --log_with wandb"),
        (
            ["--log_with=wandb", "--wandb_run_name=x", "--log_tracker_config=c.toml"],
            "--wandb_run_name has no effect: --log_tracker_config",
        ),
        (["--console_log_simple", "--console_log_file=x.log"], "--console_log_simple has no effect"),
    ],
)
def test_an_option_without_effect_is_warned_about_by_name(arguments: list[str], beginning: str):
    (warning,) = warnings_of(*arguments)
    assert warning.startswith(beginning)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--noise_offset=0.1", "--adaptive_noise_scale=0.01", "--noise_offset_random_strength"],
        ["--v_parameterization", "--scale_v_pred_loss_like_noise_pred"],
        ["--cache_latents_to_disk", "--cache_dir=cache", "--skip_cache_check"],
        ["--cache_text_encoder_outputs_to_disk", "--network_train_unet_only", "--cache_dir=c", "--skip_cache_check"],
        ["--cache_text_encoder_outputs", "--network_train_unet_only", "--text_encoder_batch_size=4"],
        ["--save_every_n_steps=10", "--save_last_n_steps=30"],
        ["--save_n_epoch_ratio=2", "--save_last_n_epochs=1"],
        ["--loss_type=huber", "--huber_c=0.2"],
        ["--sample_prompts=p.txt", "--sample_at_first"],
        ["--logging_dir=logs", "--log_prefix=x", "--log_config"],
        ["--log_with=wandb", "--wandb_api_key=k", "--wandb_run_name=x"],
        ["--torch_compile", "--dynamo_backend=eager"],
    ],
)
def test_options_that_belong_together_give_no_warning(arguments: list[str]):
    assert warnings_of(*arguments) == ()


def check_with(tmp_path, **changed: object) -> None:
    """Check the files of a run; those that it needs are there."""
    (tmp_path / "images").mkdir()
    (tmp_path / "model.safetensors").touch()
    needed = {"pretrained_model_name_or_path": tmp_path / "model.safetensors", "train_data_dir": tmp_path / "images"}
    argv = [f"--{name}={value}" for name, value in {**NEEDED, **needed, **changed}.items()]
    check_files(read_training(argv, "train_network").options)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("pretrained_model_name_or_path", "gone.safetensors", "file"),
        ("vae", "gone.pt", "file"),
        ("dataset_config", "gone.toml", "file"),
        ("network_weights", "gone", "file"),
        ("base_weights", "gone", "file"),
        ("train_data_dir", "gone", "folder"),
    ],
)
def test_a_file_or_folder_that_is_not_there_is_named(tmp_path, name: str, value: str, kind: str):
    with pytest.raises(OptionError, match=rf"^--{name}: there is no {kind} {value}. Check the path\.$"):
        check_with(tmp_path, **{name: value})


def test_a_model_that_may_be_on_the_hub_is_not_judged(tmp_path):
    check_with(tmp_path, pretrained_model_name_or_path="owner/stable-diffusion-v1-5")
