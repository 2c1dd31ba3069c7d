"""What options of different groups demand of each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from library.errors import OptionError
from library.options.declare import declared
from library.options.flow import FlowOptions
from library.options.groups import Options
from library.options.hub import hub_place
from library.options.reference import TEXT_ON_DEMAND, TRAINS_BESIDE_TEXT_CACHE, WHOLE_MODEL_SCRIPTS, default_in
from library.options.sharing import check_deepspeed, idle_deepspeed_options

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt")


def check_options(options: Options, script: str = "train_network") -> list[str]:
    """Return warnings about options that will have no effect, by name.

    Args:
        options: of the run.
        script: which is to carry them out, without ".py".

    Raises: OptionError for what is missing or contradicts.
    """
    _check_required(options, script)
    _check_text_cache(options, script)
    _check_loss(options)
    check_deepspeed(options)
    _check_fused(options)
    _check_rates(options, script)
    _check_padding(options)
    _check_resume(options)
    _check_average(options)
    return [
        *_idle_data_options(options),
        *idle_flow_options(options.flow),
        *_idle_with_class(options),
        *_idle_training_options(options),
        *_idle_text_rates(options),
        *_idle_t5_training(options),
        *idle_deepspeed_options(options),
        *_idle_saving_options(options),
        *_idle_hub_options(options),
        *_idle_logging_options(options, script),
    ]


def check_files(options: Options) -> None:
    """Refuse names of files and folders that are not there, before anything slow is done.

    A base model or VAE that does not look like a file may be the id of a model on the hub, so that it is not judged.

    Raises: OptionError.
    """
    dataset, network, model = options.dataset, options.network, options.model
    files: list[tuple[str, str | None]] = [
        ("dataset_config", dataset.dataset_config),
        ("sample_prompts", options.sampling.sample_prompts),
        ("network_weights", network.network_weights),
    ]
    files += [(name, getattr(options.sd3, name)) for name in ("clip_l", "clip_g", "t5xxl")]
    files += [("base_weights", place) for place in network.base_weights or ()]
    models = (("pretrained_model_name_or_path", model.pretrained_model_name_or_path), ("vae", model.vae))
    files += [(name, place) for name, place in models if place and Path(place).suffix in MODEL_SUFFIXES]
    for name, place in files:
        if place is not None and not Path(place).exists():
            raise OptionError(f"--{name}: there is no file {place}. Check the path.")
    for name, place in (("train_data_dir", dataset.train_data_dir), ("reg_data_dir", dataset.reg_data_dir)):
        if place is not None and not Path(place).is_dir():
            raise OptionError(f"--{name}: there is no folder {place}. Check the path.")


def _check_required(options: Options, script: str) -> None:
    dataset = options.dataset
    sources = (dataset.dataset_config, dataset.dataset_class, dataset.train_data_dir, dataset.in_json)
    if all(source is None for source in sources):
        raise OptionError("There is no dataset. Add --dataset_config=FILE or --train_data_dir=FOLDER.")
    if options.caching.cache_latents and dataset.dataset_class is not None:
        raise OptionError("--cache_latents cannot be with --dataset_class, which may make other images each time.")
    if (dataset.dataset_config is None or dataset.dataset_class is not None) and dataset.resolution is None:
        raise OptionError("--resolution is missing. Add the training size, like --resolution=512.")
    if dataset.debug_dataset:
        return
    needed = (
        ("pretrained_model_name_or_path", options.model.pretrained_model_name_or_path, "FILE, the base model"),
        ("network_module", options.network.network_module, "networks.lora"),
        ("output_dir", options.saving.output_dir, "FOLDER for what is saved"),
    )
    for name, value, example in needed:
        if value is None and not (name == "network_module" and script in WHOLE_MODEL_SCRIPTS):
            raise OptionError(f"--{name} is missing. Add --{name}={example}.")


def _check_text_cache(options: Options, script: str) -> None:
    if not options.caching.cache_text_encoder_outputs:
        return
    if options.dataset.dataset_class is not None:
        raise OptionError(
            "--cache_text_encoder_outputs cannot be with --dataset_class, which may make other captions each time."
        )
    if script in TRAINS_BESIDE_TEXT_CACHE:
        if trains_t5(options.network.network_args):
            raise OptionError(
                "--cache_text_encoder_outputs encodes the captions with T5-XXL before training, so that train_t5xxl of "
                "--network_args has nothing to train. Leave one of them out."
            )
    elif script in TEXT_ON_DEMAND:
        if _is_text_trained(options):
            raise OptionError(
                "--cache_text_encoder_outputs encodes the captions before training, so that --train_text_encoder has "
                "nothing to train. Leave one of them out."
            )
    elif script in WHOLE_MODEL_SCRIPTS:
        if _is_text_trained(options):
            raise OptionError(
                "--cache_text_encoder_outputs encodes the captions before training, so that the text encoder cannot be "
                "trained for --stop_text_encoder_training steps first. Leave one of them out."
            )
    elif not options.network.network_train_unet_only:
        raise OptionError(
            "--cache_text_encoder_outputs encodes the captions before training, so that the text encoders cannot be "
            "trained. Leave out one of --cache_text_encoder_outputs and --network_train_text_encoder_only."
        )


def _check_loss(options: Options) -> None:
    noise, loss, is_velocity = options.noise, options.loss, options.model.v_parameterization
    if noise.adaptive_noise_scale and not noise.noise_offset:
        raise OptionError("--adaptive_noise_scale changes --noise_offset, which is not given. Add it.")
    if loss.scale_v_pred_loss_like_noise_pred and not is_velocity:
        raise OptionError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization, which is not given. Add it.")
    if loss.v_pred_like_loss and is_velocity:
        raise OptionError("--v_pred_like_loss is not for --v_parameterization. Leave one of them out.")


def _check_resume(options: Options) -> None:
    if not options.hub.resume_from_huggingface:
        return
    if options.saving.resume is None:
        raise OptionError("--resume_from_huggingface does not say where. Add --resume=OWNER/NAME/FOLDER of the state.")
    hub_place(options.saving.resume)


def _is_text_trained(options: Options) -> bool:
    """Return whether a script that trains whole models trains a text encoder, at least for some steps."""
    rates, stop = options.optimizer.text_encoder_rates, options.training.stop_text_encoder_training
    default = options.optimizer.learning_rate
    return any((default if rate is None else rate) > 0 for rate in rates) and (stop is None or stop > 0)


def _check_padding(options: Options) -> None:
    model = options.model
    if not model.no_token_padding:
        return
    if model.max_token_length is not None:
        raise OptionError(
            f"--no_token_padding cannot be with --max_token_length {model.max_token_length}, which pads captions to "
            "pieces of 75 tokens. Leave one of them out."
        )
    if options.caching.cache_text_encoder_outputs:
        raise OptionError(
            "--no_token_padding pads each batch of captions to its longest, and --cache_text_encoder_outputs encodes "
            "each caption apart from its batch. Leave one of them out."
        )


def _check_average(options: Options) -> None:
    decay, is_saved = options.training.ema_decay, options.saving.save_ema
    if decay is not None and not is_saved:
        raise OptionError(f"--ema_decay {decay:g} keeps an average that nothing uses. Add --save_ema, which saves it.")
    if is_saved and decay is None:
        raise OptionError("--save_ema has no average to save. Add --ema_decay, like --ema_decay=0.999.")


def _check_rates(options: Options, script: str) -> None:
    if script in WHOLE_MODEL_SCRIPTS:
        unet = max(options.optimizer.block_rates or (options.optimizer.learning_rate,))
        if not (unet > 0 or _is_text_trained(options) or options.dataset.debug_dataset):
            other = "--train_text_encoder with a rate" if script in TEXT_ON_DEMAND else "--learning_rate_te"
            raise OptionError(
                f"Nothing is trained: every learning rate that counts is 0. Set --learning_rate, or {other}."
            )
        return
    network, default = options.network, options.optimizer.learning_rate
    text_encoder = max(network.text_encoder_lr) if network.text_encoder_lr else default
    unet = default if network.unet_lr is None else network.unet_lr
    is_text_trained = text_encoder > 0 and not network.network_train_unet_only
    is_unet_trained = unet > 0 and not network.network_train_text_encoder_only
    if not (is_text_trained or is_unet_trained or options.dataset.debug_dataset):
        raise OptionError(
            "Nothing is trained: every learning rate that counts is 0. Set --learning_rate, or --unet_lr or "
            "--text_encoder_lr."
        )


def _check_fused(options: Options) -> None:
    flag = "--fused_backward_pass" if options.optimizer.fused_backward_pass else "--fused_optimizer_groups"
    if not (options.optimizer.fused_backward_pass or options.optimizer.fused_optimizer_groups):
        return
    if options.training.gradient_accumulation_steps > 1:
        raise OptionError(
            f"{flag} frees gradients within each backward pass, which leaves nothing for --gradient_accumulation_steps "
            f"{options.training.gradient_accumulation_steps} to add up. Leave one of them out."
        )
    if options.training.mixed_precision == "fp16":
        raise OptionError(
            f"{flag} cannot have --mixed_precision fp16, where a step whose gradients overflow is left out as a whole. "
            "Use bf16."
        )


def _idle_data_options(options: Options) -> Iterator[str]:
    captions, caching, noise = options.captions, options.caching, options.noise
    if options.model.v2 and options.model.clip_skip is not None:
        yield "--clip_skip with --v2: Stable Diffusion 2.x is made for its last layer but one already"
    if captions.token_warmup_min != 1 and not captions.token_warmup_step:
        yield "--token_warmup_min has no effect without --token_warmup_step"
    if not (caching.cache_latents_to_disk or caching.cache_text_encoder_outputs_to_disk):
        for name in ("skip_cache_check", "cache_dir"):
            if getattr(caching, name):
                yield (
                    f"--{name} has no effect without --cache_latents_to_disk or --cache_text_encoder_outputs_to_disk"
                )
    if caching.text_encoder_batch_size and not caching.cache_text_encoder_outputs:
        yield "--text_encoder_batch_size has no effect without --cache_text_encoder_outputs"
    if noise.noise_offset_random_strength and not noise.noise_offset:
        yield "--noise_offset_random_strength has no effect without --noise_offset"
    if noise.ip_noise_gamma_random_strength and not noise.ip_noise_gamma:
        yield "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma"
    if noise.multires_noise_discount != 0.3 and not noise.multires_noise_iterations:
        yield "--multires_noise_discount has no effect without --multires_noise_iterations"


def idle_flow_options(flow: FlowOptions) -> Iterator[str]:
    """Yield a warning for each number that belongs to another --weighting_scheme than the chosen one."""
    belongs_to = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
    for each in declared(FlowOptions):
        scheme = belongs_to.get(each.name, flow.weighting_scheme)
        if scheme != flow.weighting_scheme and getattr(flow, each.name) != each.default:
            yield f"--{each.name} has no effect without --weighting_scheme {scheme}"


def _idle_t5_training(options: Options) -> Iterator[str]:
    if options.network.network_train_unet_only and trains_t5(options.network.network_args):
        yield "--network_args train_t5xxl has no effect: --network_train_unet_only leaves the text encoders as they are"


def trains_t5(network_args: Iterable[str] | None) -> bool:
    """Return whether train_t5xxl of --network_args is on, in any spelling of true."""
    given = (text.partition("=") for text in network_args or ())
    return any(name.strip() == "train_t5xxl" and value.strip().lower() in ("true", "1") for name, _, value in given)


def _idle_with_class(options: Options) -> Iterator[str]:
    dataset = options.dataset
    given = {
        "dataset_config": dataset.dataset_config,
        "train_data_dir": dataset.train_data_dir,
        "reg_data_dir": dataset.reg_data_dir,
        "in_json": dataset.in_json,
        "conditioning_data_dir": options.masks.conditioning_data_dir,
        "alpha_mask": options.masks.alpha_mask,
        "mask_captions": options.masks.mask_captions,
        "validation_split": options.validation.validation_split,
    }
    for name, value in given.items():
        if value and dataset.dataset_class is not None:
            yield f"--{name} has no effect: --dataset_class makes the images"


def _idle_training_options(options: Options) -> Iterator[str]:
    training, network, loss = options.training, options.network, options.loss
    if training.max_train_epochs is not None and training.max_train_steps != 1600:
        yield "--max_train_steps has no effect: --max_train_epochs decides"
    if training.dynamo_backend not in ("inductor", "no") and not training.torch_compile:
        yield "--dynamo_backend has no effect without --torch_compile"
    if options.optimizer.fused_backward_pass and options.optimizer.max_grad_norm:
        norm = options.optimizer.max_grad_norm
        yield f"--max_grad_norm {norm:g} with --fused_backward_pass: clips each weight's gradient alone; 0 is off"
    if options.optimizer.fused_optimizer_groups and options.optimizer.max_grad_norm:
        norm = options.optimizer.max_grad_norm
        yield f"--max_grad_norm {norm:g} with --fused_optimizer_groups: clips each group's gradient alone; 0 is off"
    if network.network_train_unet_only and network.text_encoder_lr is not None:
        yield "--text_encoder_lr has no effect: --network_train_unet_only leaves the text encoder as it is"
    if network.network_train_text_encoder_only and network.unet_lr is not None:
        yield "--unet_lr has no effect: --network_train_text_encoder_only leaves the U-Net as it is"
    if loss.loss_type in ("l1", "l2") and (loss.huber_c, loss.huber_scale, loss.huber_schedule) != (0.1, 1.0, "snr"):
        yield f"--huber_schedule, --huber_c and --huber_scale have no effect with --loss_type {loss.loss_type}"


def _idle_text_rates(options: Options) -> Iterator[str]:
    chosen, training = options.optimizer, options.training
    if not _is_text_trained(options) and chosen.learning_rate_te:
        stop = training.stop_text_encoder_training
        yield f"--learning_rate_te has no effect: --stop_text_encoder_training {stop} leaves the text encoder as it is"
    for name in ("learning_rate_te1", "learning_rate_te2"):
        if getattr(chosen, name) and not training.train_text_encoder:
            yield f"--{name} has no effect without --train_text_encoder"


def _idle_saving_options(options: Options) -> Iterator[str]:
    saving, sampling = options.saving, options.sampling
    if saving.use_safetensors and saving.save_model_as == "ckpt":
        yield "--use_safetensors has no effect: --save_model_as ckpt decides"
    if saving.save_n_epoch_ratio and saving.save_every_n_epochs:
        yield "--save_every_n_epochs has no effect: --save_n_epoch_ratio decides"
    if saving.save_last_n_epochs and not saving.save_every_n_epochs and not saving.save_n_epoch_ratio:
        yield "--save_last_n_epochs has no effect without --save_every_n_epochs"
    if saving.save_last_n_steps and not saving.save_every_n_steps:
        yield "--save_last_n_steps has no effect without --save_every_n_steps"
    if sampling.sample_every_n_epochs and sampling.sample_every_n_steps:
        yield "--sample_every_n_steps has no effect: --sample_every_n_epochs decides"
    is_sampling = sampling.sample_at_first or sampling.sample_every_n_epochs or sampling.sample_every_n_steps
    if sampling.sample_prompts is not None and not is_sampling:
        times = "--sample_at_first, --sample_every_n_steps or --sample_every_n_epochs"
        yield f"--sample_prompts has no effect without {times}"


def _idle_hub_options(options: Options) -> Iterator[str]:
    hub, saving = options.hub, options.saving
    if hub.huggingface_repo_id is None:
        idle = ["huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility"]
        idle += ["save_state_to_huggingface", "async_upload"]
        idle += [] if hub.resume_from_huggingface else ["huggingface_token"]
        for name in idle:
            if getattr(hub, name):
                yield f"--{name} has no effect without --huggingface_repo_id"
    elif hub.save_state_to_huggingface and not (saving.save_state or saving.save_state_on_train_end):
        yield "--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end"


def _idle_logging_options(options: Options, script: str) -> Iterator[str]:
    logging = options.logging
    has_wandb = logging.log_with in ("wandb", "all")
    if logging.log_with is None and not logging.logging_dir:
        for name in ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"):
            if getattr(logging, name) not in (None, "", False, default_in(script, name)):
                yield f"--{name} has no effect without --logging_dir or --log_with"
    for name in ("wandb_run_name", "wandb_api_key"):
        if getattr(logging, name) and not has_wandb:
            yield f"--{name} has no effect without --log_with wandb"
    if logging.log_tracker_config and logging.wandb_run_name and has_wandb:
        yield "--wandb_run_name has no effect: --log_tracker_config replaces it"
    if logging.console_log_simple and logging.console_log_file:
        yield "--console_log_simple has no effect: messages go to --console_log_file"
