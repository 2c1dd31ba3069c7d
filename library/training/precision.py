"""Number formats: what the frozen weights, the trained weights and the VAE are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import OptionError

if TYPE_CHECKING:
    from library.models.family import Parts
    from library.options import Options

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The formats of one run."""

    frozen: torch.dtype  # base weights: the autocast format, or float32
    trained: torch.dtype  # float32, or the autocast format with --full_fp16 / --full_bf16
    vae: torch.dtype
    mixed: str  # "no", "fp16", "bf16": accelerate's name of the autocast format
    is_denoiser_float8: bool = False  # frozen weights are stored in a byte each, and cast to `frozen` to compute
    is_text_float8: bool = False

    @property
    def autocast(self) -> torch.dtype | None:
        """What most of the arithmetic is done in; None: float32 throughout."""
        return None if self.mixed == "no" else DTYPES[self.mixed]

    @staticmethod
    def from_options(options: Options) -> Precision:
        """Return the formats that the options ask for, see `of`."""
        training = options.training
        return Precision.of(
            training.mixed_precision,
            full_fp16=training.full_fp16,
            full_bf16=training.full_bf16,
            no_half_vae=options.model.no_half_vae,
            fp8_base=training.fp8_base,
            fp8_base_unet=training.fp8_base_unet,
        )

    @staticmethod
    def of(
        mixed: str,
        *,
        full_fp16: bool,
        full_bf16: bool,
        no_half_vae: bool,
        fp8_base: bool = False,
        fp8_base_unet: bool = False,
    ) -> Precision:
        """Return the formats that the options ask for.

        Raises: OptionError for fp16 without a GPU.
        """
        if mixed == "fp16" and not torch.cuda.is_available() and not torch.backends.mps.is_available():
            raise OptionError("--mixed_precision fp16 needs a GPU and none was found. Use bf16 or no.")
        frozen = DTYPES[mixed]
        return Precision(
            frozen=frozen,
            trained=frozen if full_fp16 or full_bf16 else torch.float32,
            vae=torch.float32 if no_half_vae else frozen,
            mixed=mixed,
            is_denoiser_float8=fp8_base or fp8_base_unet,
            is_text_float8=fp8_base and not fp8_base_unet,  # as sd-scripts: given both, the narrower one counts
        )

    def float8_parts(self, parts: Parts) -> tuple[nn.Module, ...]:
        """Return the models whose frozen weights are stored in float8."""
        denoiser = (parts.denoiser,) if self.is_denoiser_float8 else ()
        return denoiser + (parts.text_encoders if self.is_text_float8 else ())


def let_scaler_take_half_gradients(scaler: Any) -> None:
    """Make a gradient scaler accept fp16 gradients, which torch refuses: --full_fp16 has no others."""
    unscale = scaler._unscale_grads_

    def unscale_half(optimizer: Any, inverse_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return unscale(optimizer, inverse_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_half
