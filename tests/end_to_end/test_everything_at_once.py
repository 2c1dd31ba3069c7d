"""The core options of sd-scripts side by side in one command, and in the file that --output_config writes of it."""

import pytest
from end_to_end.training_runs import Family, Trained, differing, draw_pictures, events_of, metadata_of, tensors_of

EVERYTHING = """
    --resolution 64 --train_batch_size 2 --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128
    --bucket_reso_steps 64 --bucket_no_upscale --flip_aug --shuffle_caption --caption_extension .txt --keep_tokens 1
    --enable_wildcard --caption_prefix best --caption_suffix ever --caption_dropout_rate 0.1
    --caption_tag_dropout_rate 0.1 --token_warmup_step 0.5 --weighted_captions --max_token_length 150 --clip_skip 2
    --masked_loss --prior_loss_weight 0.5 --cache_latents --cache_latents_to_disk --vae_batch_size 2 --no_half_vae
    --noise_offset 0.05 --adaptive_noise_scale 0.01 --multires_noise_iterations 4 --multires_noise_discount 0.3
    --ip_noise_gamma 0.05 --min_timestep 10 --max_timestep 990 --loss_type smooth_l1 --huber_schedule exponential
    --huber_c 0.2 --min_snr_gamma 5 --debiased_estimation_loss --network_module networks.lora --network_dim 2
    --network_alpha 1 --network_dropout 0.1 --network_args conv_dim=2 conv_alpha=1 rank_dropout=0.1
    --unet_lr 1e-3 --text_encoder_lr 5e-4 --learning_rate 1e-3 --scale_weight_norms 1 --optimizer_type AdamW
    --optimizer_args weight_decay=0.01 betas=0.9,0.99 --max_grad_norm 1 --lr_scheduler cosine_with_restarts
    --lr_warmup_steps 0.25 --lr_scheduler_num_cycles 2 --max_train_epochs 2 --gradient_accumulation_steps 2
    --gradient_checkpointing --mixed_precision bf16 --seed 3 --sdpa --max_data_loader_n_workers 1
    --persistent_data_loader_workers --output_name all --save_precision fp16 --save_model_as safetensors
    --save_every_n_epochs 1 --save_last_n_epochs 1 --save_state --sample_at_first --sample_every_n_epochs 2
    --sample_sampler euler_a --validation_split 0.25 --validation_seed 1 --validate_every_n_epochs 2
    --metadata_author me --training_comment all
"""


@pytest.fixture(scope="module")
def arguments(family: Family, tmp_path_factory) -> list[str]:
    """The arguments, without those for a folder of one run."""
    folder = tmp_path_factory.mktemp("everything")
    pictures = draw_pictures(folder / "drawn", count=4)
    for group, source in (("train", pictures.photos), ("reg", pictures.regularisation)):
        (folder / group).mkdir()
        (folder / group / "2_fairy").symlink_to(source)
    (folder / "prompts.txt").write_text("a (green:1.3) fairy --w 64 --h 64 --s 2 --d 5\n", encoding="utf-8")
    places = ["--train_data_dir", folder / "train", "--reg_data_dir", folder / "reg", "--alpha_mask"]
    places += ["--missing_mask", "train_all", "--conditioning_data_dir", pictures.photo_masks]
    places += ["--sample_prompts", folder / "prompts.txt", "--pretrained_model_name_or_path", family.checkpoint()]
    return [str(place) for place in places] + [word for word in EVERYTHING.split() if word not in family.refused]


@pytest.fixture(scope="module")
def run(family: Family, arguments: list[str], tmp_path_factory) -> Trained:
    """The run from the command line."""
    folder = tmp_path_factory.mktemp("command-line")
    own = ["--output_dir", str(folder / "out"), "--logging_dir", str(folder / "logs")]
    messages = folder / "messages.log"
    assert family.run(*arguments, *own, "--console_log_file", messages) == 0
    return Trained(folder, (*arguments, *own))


def test_a_command_with_all_of_them_trains(run: Trained) -> None:
    assert [path.name for path in sorted((run.folder / "out").glob("all*"))] == [
        "all-000001-state", "all-000001.safetensors", "all-state", "all.safetensors",
    ]  # fmt: skip
    assert metadata_of(run.folder / "out" / "all.safetensors")["ss_epoch"] == "2"
    scalars = events_of(run.folder / "logs").Tags()["scalars"]
    assert {"loss/current", "lr/unet", "max_norm/keys_scaled", "loss/validation/epoch_average"} <= set(scalars)
    assert len(list((run.folder / "out" / "sample").iterdir())) == 2


def test_none_of_them_is_warned_about_but_what_the_family_has_not(run: Trained, family) -> None:
    messages = (run.folder / "messages.log").read_text(encoding="utf-8").splitlines()
    warnings = [line.partition(" WARNING ")[2] for line in messages if " WARNING " in line]
    about = [warning.split()[0] for warning in warnings if "conv_dim" not in warning]  # SD3 has hardly a convolution
    assert about == list(family.idle)


@pytest.mark.slow
def test_the_file_that_output_config_writes_trains_the_same_network(run: Trained, family, arguments, tmp_path) -> None:
    settings = tmp_path / "settings.toml"
    with pytest.raises(SystemExit) as stopped:
        family.run(*arguments, "--config_file", settings, "--output_config")
    assert stopped.value.code == 0
    places = ("--output_dir", tmp_path / "out", "--logging_dir", tmp_path / "logs")
    assert family.run("--config_file", settings, *places) == 0
    again, first = (tensors_of(folder / "out" / "all.safetensors") for folder in (tmp_path, run.folder))
    assert not differing(again, first)
