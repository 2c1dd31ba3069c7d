"""What a saved file says about its making: the ss_* and modelspec.* keys that other tools read."""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.options.masks import MaskOptions
    from library.options.metadata import MetadataOptions

log = logging.getLogger(__name__)

# the key in the file -> where the value stands in Options: group.field
FROM_OPTIONS: Mapping[str, str] = {
    "ss_output_name": "saving.output_name",
    "ss_training_comment": "saving.training_comment",
    "ss_lowram": "model.lowram",
    "ss_learning_rate": "optimizer.learning_rate",
    "ss_text_encoder_lr": "network.text_encoder_lr",
    "ss_unet_lr": "network.unet_lr",
    "ss_lr_warmup_steps": "schedule.lr_warmup_steps",
    "ss_lr_scheduler": "schedule.lr_scheduler",
    "ss_max_grad_norm": "optimizer.max_grad_norm",
    "ss_gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "ss_gradient_checkpointing": "training.gradient_checkpointing",
    "ss_mixed_precision": "training.mixed_precision",
    "ss_full_fp16": "training.full_fp16",
    "ss_fp8_base": "training.fp8_base",
    "ss_fp8_base_unet": "training.fp8_base_unet",
    "ss_cache_latents": "caching.cache_latents",
    "ss_max_token_length": "model.max_token_length",
    "ss_clip_skip": "model.clip_skip",
    "ss_caption_dropout_rate": "captions.caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs": "captions.caption_dropout_every_n_epochs",
    "ss_caption_tag_dropout_rate": "captions.caption_tag_dropout_rate",
    "ss_face_crop_aug_range": "dataset.face_crop_aug_range",
    "ss_prior_loss_weight": "dataset.prior_loss_weight",
    "ss_resize_interpolation": "dataset.resize_interpolation",
    "ss_network_module": "network.network_module",
    "ss_network_dropout": "network.network_dropout",
    "ss_scale_weight_norms": "network.scale_weight_norms",
    "ss_noise_offset": "noise.noise_offset",
    "ss_noise_offset_random_strength": "noise.noise_offset_random_strength",
    "ss_adaptive_noise_scale": "noise.adaptive_noise_scale",
    "ss_multires_noise_iterations": "noise.multires_noise_iterations",
    "ss_multires_noise_discount": "noise.multires_noise_discount",
    "ss_ip_noise_gamma": "noise.ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength": "noise.ip_noise_gamma_random_strength",
    "ss_zero_terminal_snr": "noise.zero_terminal_snr",
    "ss_min_snr_gamma": "loss.min_snr_gamma",
    "ss_debiased_estimation": "loss.debiased_estimation_loss",
    "ss_loss_type": "loss.loss_type",
    "ss_huber_schedule": "loss.huber_schedule",
    "ss_huber_scale": "loss.huber_scale",
    "ss_huber_c": "loss.huber_c",
    "ss_v2": "model.v2",
    "ss_validation_seed": "validation.validation_seed",
    "ss_validation_split": "validation.validation_split",
    "ss_max_validation_steps": "validation.max_validation_steps",
    "ss_validate_every_n_epochs": "validation.validate_every_n_epochs",
    "ss_validate_every_n_steps": "validation.validate_every_n_steps",
}
# only in runs without a dataset config: with one, these hold per dataset and stand in ss_datasets
FROM_OPTIONS_WITHOUT_CONFIG: Mapping[str, str] = {
    "ss_batch_size_per_device": "dataset.train_batch_size",
    "ss_color_aug": "dataset.color_aug",
    "ss_flip_aug": "dataset.flip_aug",
    "ss_random_crop": "dataset.random_crop",
    "ss_shuffle_caption": "captions.shuffle_caption",
    "ss_bucket_no_upscale": "dataset.bucket_no_upscale",
    "ss_keep_tokens": "captions.keep_tokens",
}
# only in files of a model that is trained on a flow; sd-scripts forgets the shift
FROM_OPTIONS_OF_FLOW: Mapping[str, str] = {
    "ss_apply_lg_attn_mask": "sd3.apply_lg_attn_mask",
    "ss_apply_t5_attn_mask": "sd3.apply_t5_attn_mask",
    "ss_weighting_scheme": "flow.weighting_scheme",
    "ss_logit_mean": "flow.logit_mean",
    "ss_logit_std": "flow.logit_std",
    "ss_mode_scale": "flow.mode_scale",
    "ss_training_shift": "flow.training_shift",
}
KEPT_WITH_NO_METADATA = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
ARCHITECTURES: Mapping[str, str] = {  # ss_base_model_version -> modelspec.architecture
    "sd_v1": "stable-diffusion-v1",
    "sd_v1_v": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "medium": "stable-diffusion-3-medium",
    "5-medium": "stable-diffusion-3-5-medium",
    "5-large": "stable-diffusion-3-5-large",
}
LARGE = ("sdxl_base_v1-0", "medium", "5-medium", "5-large")
DEFAULT_SIDES: Mapping[str, int] = {"sd_v2_v": 768, **dict.fromkeys(LARGE, 1024)}  # others: 512


@dataclass(frozen=True)
class MaskFacts:
    """What the files say about the masks of the training data."""

    is_masked: bool = False  # of any image
    has_alpha: bool = False  # of any image the mask is its transparency
    num_images: int = 0  # that have a mask, with repeats, as in num_train_images
    mean_weight: float | None = None  # of the masked images; None where it is not known


@dataclass(frozen=True)
class DatasetFacts:
    """What the files say about the training data."""

    num_train_images: int  # with repeats
    num_reg_images: int
    num_validation_images: int
    num_batches_per_epoch: int  # of one process
    total_batch_size: int  # of all processes; as sd-scripts: without gradient accumulation
    is_from_config: bool  # a dataset config was given
    # one entry a dataset, plain JSON values, with the keys of ss_datasets; each subset's with those of its "subsets".
    # tag_frequency: {folder: {tag: count}}; bucket_info: {"buckets": {i: {"resolution", "count"}}, "mean_img_ar_error"}
    datasets: tuple[Mapping[str, Any], ...]
    masks: MaskFacts = MaskFacts()


@dataclass(frozen=True)
class RunFacts:
    """What the files say about the run beyond its options."""

    session_id: int
    started_at: float  # s since 1970
    seed: int
    num_epochs: int
    max_train_steps: int
    optimizer: str  # "torch.optim.adamw.AdamW(weight_decay=0.1)"
    base_model_version: str  # "sd_v1"; with v-prediction "sd_v1_v"
    network_dim: int | str | None
    network_alpha: float | str | None
    network_args: Mapping[str, Any] | None = None  # as given by --network_args
    model_name: str = ""  # --pretrained_model_name_or_path
    vae_name: str | None = None  # --vae
    extra: Mapping[str, Any] = field(default_factory=dict)  # further ss_ keys, like those of `of_flow`


def training_metadata(options: Any, dataset: DatasetFacts, run: RunFacts) -> dict[str, str]:
    """Return every ss_* key that does not change during the run; at_save adds the rest.

    Args:
        options: the whole Options: this is the one reader that wants a bit of each group.
        dataset: with a dataset config, its datasets are described one by one; without, by plain keys.
        run: the run itself.
    """
    values: dict[str, Any] = {key: attrgetter(place)(options) for key, place in FROM_OPTIONS.items()}
    rates = options.network.text_encoder_lr
    values |= {
        "ss_text_encoder_lr": None if rates is None else list(rates),
        "ss_session_id": run.session_id,
        "ss_training_started_at": run.started_at,
        "ss_sd_scripts_commit_hash": commit_hash(),
        "ss_seed": run.seed,
        "ss_num_epochs": run.num_epochs,
        "ss_max_train_steps": run.max_train_steps,
        "ss_optimizer": run.optimizer,
        "ss_base_model_version": run.base_model_version,
        "ss_network_dim": run.network_dim,
        "ss_network_alpha": run.network_alpha,
        "ss_sd_model_name": model_name(run.model_name),
        "ss_num_train_images": dataset.num_train_images,
        "ss_num_reg_images": dataset.num_reg_images,
        "ss_num_validation_images": dataset.num_validation_images,
        "ss_num_batches_per_epoch": dataset.num_batches_per_epoch,
    }
    values |= _of_masks(options.masks, dataset.masks)
    if run.vae_name:
        values["ss_vae_name"] = model_name(run.vae_name)
    if run.network_args:
        values["ss_network_args"] = json.dumps(
            {"dropout": options.network.network_dropout, **run.network_args}  # as sd-scripts: dropout is always there
        )
    values |= _with_config(dataset) if dataset.is_from_config else _without_config(options, dataset)
    values |= run.extra
    return {key: str(value) for key, value in values.items()}


def of_flow(options: Any) -> dict[str, Any]:
    """Return the further ss_* keys of a model that is trained on a flow."""
    return {key: attrgetter(place)(options) for key, place in FROM_OPTIONS_OF_FLOW.items()}


def _of_masks(options: MaskOptions, facts: MaskFacts) -> dict[str, Any]:
    """Return what is said of masks: two keys always, the others where there is something to say."""
    values: dict[str, Any] = {"ss_masked_loss": facts.is_masked, "ss_alpha_mask": facts.has_alpha}
    if facts.is_masked:
        values["ss_num_masked_images"] = facts.num_images
    if facts.mean_weight is not None:
        values["ss_mean_mask_weight"] = round(facts.mean_weight, 4)
    for each in fields(options):
        key, value = f"ss_{each.name}", getattr(options, each.name)
        if key not in values and value not in (each.default, None):
            is_folder = each.name == "conditioning_data_dir"
            values[key] = Path(value).name if is_folder else json.dumps(value) if isinstance(value, tuple) else value
    return values


def _with_config(facts: DatasetFacts) -> dict[str, Any]:
    return {
        "ss_datasets": json.dumps([dict(entry) for entry in facts.datasets]),
        "ss_tag_frequency": json.dumps(_tag_frequency(facts)),
        "ss_dataset_dirs": json.dumps(_dirs(facts, are_reg=False)),
    }


def _without_config(options: Any, facts: DatasetFacts) -> dict[str, Any]:
    values = {key: attrgetter(place)(options) for key, place in FROM_OPTIONS_WITHOUT_CONFIG.items()}
    first = facts.datasets[0] if facts.datasets else {}
    resolution = first.get("resolution")
    return values | {
        "ss_total_batch_size": facts.total_batch_size,
        "ss_resolution": tuple(resolution) if resolution else None,
        "ss_enable_bucket": bool(first.get("enable_bucket")),
        "ss_min_bucket_reso": first.get("min_bucket_reso"),
        "ss_max_bucket_reso": first.get("max_bucket_reso"),
        "ss_dataset_dirs": json.dumps(_dirs(facts, are_reg=False)),
        "ss_reg_dataset_dirs": json.dumps(_dirs(facts, are_reg=True)),
        "ss_tag_frequency": json.dumps(_tag_frequency(facts)),
        "ss_bucket_info": json.dumps(first.get("bucket_info")),
    }


def _tag_frequency(facts: DatasetFacts) -> dict[str, dict[str, int]]:
    """Return the counts of all datasets; a folder that several of them use counts once, as in sd-scripts."""
    merged: dict[str, dict[str, int]] = {}
    for entry in facts.datasets:
        for folder, counts in (entry.get("tag_frequency") or {}).items():
            merged.setdefault(folder, dict(counts))
    return merged


def _dirs(facts: DatasetFacts, *, are_reg: bool) -> dict[str, dict[str, int]]:
    """Return {folder: repeats and number of images}; a repeated name gets " (2)", " (3)" and so on."""
    dirs: dict[str, dict[str, int]] = {}
    for subset in (subset for entry in facts.datasets for subset in entry.get("subsets", ())):
        name = subset.get("metadata_file") or subset.get("image_dir")
        if name is None or bool(subset.get("is_reg")) != are_reg:
            continue
        key, number = name, 2
        while key in dirs:
            key, number = f"{name} ({number})", number + 1
        dirs[key] = {"n_repeats": subset["num_repeats"], "img_count": subset["img_count"]}
    return dirs


def at_save(metadata: Mapping[str, str], step: int, epoch: int) -> dict[str, str]:
    """Return metadata with what changes from file to file: steps and epochs done, and the time."""
    changing = {"ss_training_finished_at": time.time(), "ss_steps": step, "ss_epoch": epoch}
    return {**metadata, **{key: str(value) for key, value in changing.items()}}


def minimum(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what --no_metadata leaves: what a reader needs to load the file, and its modelspec."""
    return {key: value for key, value in metadata.items() if key in KEPT_WITH_NO_METADATA or not key.startswith("ss_")}


def modelspec(
    options: MetadataOptions,
    base_model_version: str,
    output_name: str | None,
    resolution: tuple[int, int] | None = None,
    *,
    prediction_type: str = "epsilon",
    clip_skip: int | None = None,
    timestep_range: tuple[int, int] | None = None,
    is_lora: bool = True,
) -> dict[str, str]:
    """Return the modelspec.* keys (version 1.0.1); what is not known has no key.

    Args:
        options: the metadata group, --metadata_*.
        base_model_version: a key of ARCHITECTURES.
        output_name: the title, where --metadata_title is not given.
        resolution: width, height; None: what the base model was made for.
        prediction_type: "epsilon", "v_prediction" or "flow", which the standard does not know: epsilon, as sd-scripts.
        clip_skip: which layer of the text encoder is read, from the end.
        timestep_range: --min_timestep, --max_timestep where given.
        is_lora: a LoRA, or a whole checkpoint.
    """
    now = int(time.time())
    width, height = resolution or (DEFAULT_SIDES.get(base_model_version, 512),) * 2
    is_original_code = not is_lora or base_model_version.startswith("sdxl")
    values: dict[str, Any] = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES[base_model_version] + ("/lora" if is_lora else ""),
        "implementation": "https://github.com/Stability-AI/generative-models" if is_original_code else "diffusers",
        "title": options.metadata_title or output_name or f"{'LoRA' if is_lora else 'Checkpoint'}@{now}",
        "resolution": f"{width}x{height}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)),
        "author": options.metadata_author,
        "description": options.metadata_description,
        "license": options.metadata_license,
        "tags": options.metadata_tags,
        "merged_from": options.metadata_merged_from,
        "prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "timestep_range": f"{timestep_range[0]},{timestep_range[1]}" if timestep_range else None,
        "encoder_layer": clip_skip,
        "implementation_version": f"masked-diffusion-training/{commit_hash().strip('()')}",
        "usage_hint": options.metadata_usage_hint,
        "thumbnail": thumbnail(options.metadata_thumbnail),
        "trigger_phrase": options.metadata_trigger_phrase,
        "preprocessor": options.metadata_preprocessor,
        "is_negative_embedding": options.metadata_is_negative_embedding,
    }
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def thumbnail(place: str | None) -> str | None:
    """Return a picture as a data: URL: place itself if it is one, else the file there; None if it is missing."""
    if not place or place.startswith("data:"):
        return place or None
    path = Path(place)
    if not path.is_file():
        log.warning("--metadata_thumbnail %s: there is no such file, so no thumbnail is written", path)
        return None
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def model_name(place: str) -> str:
    """Return the file's or folder's own name, or the place itself where nothing is there (a hub's id)."""
    return Path(place).name if Path(place).exists() else place


def commit_hash() -> str:
    """Return the commit of this project's own checkout, "(unknown)" where there is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "(unknown)"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "(unknown)"
    return done.stdout.strip()
