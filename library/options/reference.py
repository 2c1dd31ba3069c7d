"""Options of sd-scripts that are understood but not carried out: refused, ignored, or of another script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.options.values import Declared


@dataclass(frozen=True)
class Elsewhere:
    """An option that has no reader here, and why."""

    name: str
    element: type
    default: Any
    reason: str

    @property
    def declared(self) -> Declared:
        """The option as the parser sees it."""
        is_optional = self.default is None
        return Declared(self.name, self.element, self.default, self.reason, is_optional=is_optional)


# Given with another value than its default or 0, such an option is an error.
REFUSED = (
    Elsewhere(
        "zero3_init_flag",
        bool,
        False,
        "only trained weights are shared out; the other models are loaded whole by every process",
    ),
)  # fmt: skip

# Given with another value than its default, such an option is a warning.
IGNORED = (
    Elsewhere("mem_eff_attn", bool, False, "torch's scaled_dot_product_attention is used, which spares memory too"),
)

# What these ask for is always done, so nothing is said when they are given.
GRANTED = (
    Elsewhere("sdpa", bool, False, "torch's scaled_dot_product_attention is used unless --xformers is given"),
    Elsewhere("persistent_data_loader_workers", bool, False, "loader processes always stay alive between epochs"),
    Elsewhere(
        "skip_until_initial_step", bool, False, "a run that goes on does so at its place in the data, at no cost"
    ),
    Elsewhere("highvram", bool, False, "GPU memory is never given back between batches of the latent cache"),
)

# Scripts that train the model itself, with no network on top.
WHOLE_MODEL_SCRIPTS = frozenset({"train_db", "sdxl_train"})

# Of these, scripts that leave text encoders as they are unless --train_text_encoder is given.
TEXT_ON_DEMAND = frozenset({"sdxl_train"})

_FLOAT8_CANNOT_LEARN = dict.fromkeys(
    ("fp8_base", "fp8_base_unet"), "weights of one byte cannot learn, and the model's own do"
)
_SHARED_OUT_BY_FSDP = "whole models are shared out among processes by FSDP, which accelerate config sets up"
_NO_CLIP_SKIP_OF_SDXL = "SDXL always reads its text encoders at the last layer but one"
_WITHOUT_NETWORK = {
    **dict.fromkeys(
        (
            "network_module", "network_weights", "network_dim", "network_alpha", "network_dropout", "network_args",
            "dim_from_weights", "scale_weight_norms",
        ),
        "the model itself is trained, with no network on top",
    ),
    "unet_lr": "the U-Net learns at --learning_rate",
    **dict.fromkeys(
        (
            "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device",
            "offload_param_nvme_path", "zero3_save_16bit_model", "fp16_master_weights_and_gradients",
        ),
        "it is DeepSpeed's, which only networks are trained with",
    ),
}  # fmt: skip

# Options that a script understands but cannot carry out -> why. Those refused are errors, those ignored warnings.
REFUSED_BY_SCRIPT: Mapping[str, Mapping[str, str]] = {
    "sdxl_train_network": {"v2": "Stable Diffusion 2.x is trained with train_network.py"},
    "sd3_train_network": {"weighted_captions": "T5-XXL reads a caption as a whole, so that words have no weights"},
    "train_db": {**_FLOAT8_CANNOT_LEARN, "deepspeed": _SHARED_OUT_BY_FSDP},
    "sdxl_train": {
        "v2": "Stable Diffusion 2.x is trained with train_db.py",
        **_FLOAT8_CANNOT_LEARN,
        "deepspeed": _SHARED_OUT_BY_FSDP,
    },
}
IGNORED_BY_SCRIPT: Mapping[str, Mapping[str, str]] = {
    "sdxl_train_network": {"clip_skip": _NO_CLIP_SKIP_OF_SDXL},
    "sd3_train_network": {
        "v2": "it is for Stable Diffusion 2.x",
        "v_parameterization": "SD3 always learns the velocity of a flow",
        "clip_skip": "SD3 always reads its CLIP text encoders at the last layer but one",
        "max_token_length": "CLIP reads 75 tokens of a caption, and T5-XXL as many as --t5xxl_max_token_length says",
        **dict.fromkeys(
            (
                "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
                "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength",
            ),
            "SD3 learns the way from a picture to plain noise",
        ),
        "zero_terminal_snr": "the last timestep of SD3 is noise alone anyway",
        **dict.fromkeys(
            (
                "min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss",
            ),
            "the timesteps of SD3 are weighed by --weighting_scheme",
        ),
        "sample_sampler": "SD3's pictures are always drawn with Euler's method",
        "xformers": "SD3 always uses torch's scaled_dot_product_attention",
    },
    "train_db": {
        **_WITHOUT_NETWORK,
        "network_train_unet_only": "--stop_text_encoder_training 0 leaves the text encoder as it is",
        "network_train_text_encoder_only": "--learning_rate 0 with a --learning_rate_te leaves the U-Net as it is",
        "text_encoder_lr": "the text encoder learns at --learning_rate_te",
        **dict.fromkeys(
            ("base_weights", "base_weights_multiplier"),
            "networks are merged into a model beforehand, by networks/merge_lora.py",
        ),
    },
    "sdxl_train": {
        "clip_skip": _NO_CLIP_SKIP_OF_SDXL,
        **_WITHOUT_NETWORK,
        "network_train_unet_only": "the U-Net alone is trained unless --train_text_encoder is given",
        "network_train_text_encoder_only": "--learning_rate 0 with rates for text encoders leaves the U-Net as it is",
        "text_encoder_lr": "text encoders learn at --learning_rate_te1 and --learning_rate_te2",
        **dict.fromkeys(
            ("base_weights", "base_weights_multiplier"),
            "networks are merged into a model beforehand, by networks/sdxl_merge_lora.py",
        ),
    },
}  # fmt: skip
# Of those ignored, what files record all the same, as sd-scripts does. The others count as not given.
RECORDED = frozenset({"clip_skip"})

# Of those ignored, where 0 means something else than left out.
ZERO_COUNTS = frozenset({"unet_lr", "zero_stage"})

# Scripts of models with a text encoder that can be trained beside the cached outputs of the others: CLIP beside T5-XXL.
TRAINS_BESIDE_TEXT_CACHE = frozenset({"sd3_train_network"})

# What of an option's declaration is otherwise in a script.
_NETWORK_FILES = {"save_model_as": {"choices": ("ckpt", "pt", "safetensors")}}
_OF_WHOLE_MODELS: Mapping[str, Mapping[str, Any]] = {
    "log_tracker_name": {"default": "dreambooth", "help": "Name of the project in the tracker."},
    "save_model_as": {
        "choices": ("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        "default": None,
        "help": "What saved models are: a single file (ckpt, safetensors), or a folder as diffusers has it, of pickled "
        "(diffusers) or safetensors files (diffusers_safetensors). Unset: what the base model is.",
    },
}
OTHERWISE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "train_network": _NETWORK_FILES,
    "sdxl_train_network": _NETWORK_FILES,
    "sd3_train_network": _NETWORK_FILES,
    "train_db": _OF_WHOLE_MODELS,
    "sdxl_train": {
        **_OF_WHOLE_MODELS,
        "log_tracker_name": {"default": "finetuning", "help": "Name of the project in the tracker."},
    },
}


def as_in(script: str, each: Declared) -> Declared:
    """Return an option as a script has it."""
    return replace(each, **OTHERWISE.get(script, {}).get(each.name, {}))


def default_in(script: str, name: str) -> Any:
    """Return an option's default that only this script has; None where it has none of its own."""
    return OTHERWISE.get(script, {}).get(name, {}).get("default")


# Keys that graphical front ends write into config files, though no script has such an option.
FRONT_END_KEYS = frozenset({"epoch", "noise_offset_type"})

_SDXL, _SD3, _DB, _WHOLE_SDXL = ("sdxl_train_network",), ("sd3_train_network",), ("train_db",), ("sdxl_train",)

# Options of the other scripts -> which scripts, and whether a value follows.
OTHER_SCRIPTS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "text_encoder_lr1": (_SDXL, True),
    "text_encoder_lr2": (_SDXL, True),
    "disable_mmap_load_safetensors": ((*_SDXL, *_SD3, *_WHOLE_SDXL), False),
    "weighting_scheme": (_SD3, True),
    "logit_mean": (_SD3, True),
    "logit_std": (_SD3, True),
    "mode_scale": (_SD3, True),
    "blocks_to_swap": (_SD3, True),
    "clip_l": (_SD3, True),
    "clip_g": (_SD3, True),
    "t5xxl": (_SD3, True),
    "save_clip": (_SD3, False),
    "save_t5xxl": (_SD3, False),
    "t5xxl_device": (_SD3, True),
    "t5xxl_dtype": (_SD3, True),
    "t5xxl_max_token_length": (_SD3, True),
    "apply_lg_attn_mask": (_SD3, False),
    "apply_t5_attn_mask": (_SD3, False),
    "clip_l_dropout_rate": (_SD3, True),
    "clip_g_dropout_rate": (_SD3, True),
    "t5_dropout_rate": (_SD3, True),
    "pos_emb_random_crop_rate": (_SD3, True),
    "enable_scaled_pos_embed": (_SD3, False),
    "training_shift": (_SD3, True),
    "mask_token_drop": (_SD3, True),
    "use_safetensors": ((*_DB, *_WHOLE_SDXL), False),
    "learning_rate_te": (_DB, True),
    "no_token_padding": (_DB, False),
    "stop_text_encoder_training": (_DB, True),
    "train_text_encoder": (_WHOLE_SDXL, False),
    "learning_rate_te1": (_WHOLE_SDXL, True),
    "learning_rate_te2": (_WHOLE_SDXL, True),
    "block_lr": (_WHOLE_SDXL, True),
}
