"""Options that only Stable Diffusion 3 and 3.5 have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option, settle
from library.options.values import Bounds

RATE = Bounds(min=0, max=1)
DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
DTYPES = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}  # every spelling -> the one that the rest of the project sees


@dataclass(frozen=True, kw_only=True)
class Sd3Options:
    """The text encoders and the positions of Stable Diffusion 3 and 3.5."""

    clip_l: str | None = option(
        None, "CLIP-L text encoder to use instead of the base model's: a .safetensors file.", is_path=True
    )
    clip_g: str | None = option(
        None, "CLIP-G text encoder to use instead of the base model's: a .safetensors file.", is_path=True
    )
    t5xxl: str | None = option(
        None, "T5-XXL text encoder to use instead of the base model's: a .safetensors file.", is_path=True
    )
    save_clip: bool = option(
        False, "At the end save the CLIP text encoders too, with what they were taught, beside the network's file."
    )
    save_t5xxl: bool = option(
        False, "At the end save the T5-XXL text encoder too, with what it was taught, beside the network's file."
    )
    t5xxl_device: str | None = option(
        None, "Where T5-XXL computes: cpu, cuda or cuda:N. Unset: where everything else does."
    )
    t5xxl_dtype: str | None = option(
        None, "Number format of T5-XXL. Unset: that of --mixed_precision.", choices=tuple(DTYPES)
    )
    t5xxl_max_token_length: int = option(
        256, "Tokens of a caption that T5-XXL reads; shorter captions are padded.", bounds=Bounds(min=1, max=512)
    )
    apply_lg_attn_mask: bool = option(False, "Hide the padding of captions within CLIP-L and CLIP-G.")
    apply_t5_attn_mask: bool = option(False, "Hide the padding of captions within T5-XXL.")
    clip_l_dropout_rate: float = option(0.0, "Probability that an image is shown without CLIP-L's text.", bounds=RATE)
    clip_g_dropout_rate: float = option(0.0, "Probability that an image is shown without CLIP-G's text.", bounds=RATE)
    t5_dropout_rate: float = option(0.0, "Probability that an image is shown without T5-XXL's text.", bounds=RATE)
    pos_emb_random_crop_rate: float = option(
        0.0,
        "Probability that a step takes a random window of the model's table of positions instead of its middle.",
        bounds=RATE,
    )
    enable_scaled_pos_embed: bool = option(
        False, "Stretch positions to each resolution of the data set, so that every picture spans the same range."
    )

    def __post_init__(self) -> None:
        """Check the values; a number format gets its short name."""
        check_values(self)
        if self.t5xxl_dtype is not None:
            settle(self, "t5xxl_dtype", DTYPES[self.t5xxl_dtype])
        if self.t5xxl_device is not None and not DEVICE.fullmatch(self.t5xxl_device):
            raise OptionError(f"--t5xxl_device must be cpu, cuda or cuda:N, got {self.t5xxl_device}.")
