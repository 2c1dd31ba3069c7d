"""Number formats: what the frozen weights, the trained weights and the VAE are kept in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from library.errors import OptionError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The formats of one run."""

    frozen: torch.dtype  # base weights: the autocast format, or float32
    trained: torch.dtype  # float32, or the autocast format with --full_fp16 / --full_bf16
    vae: torch.dtype
    mixed: str  # "no", "fp16", "bf16": accelerate's name of the autocast format

    @staticmethod
    def of(mixed: str, *, full_fp16: bool, full_bf16: bool, no_half_vae: bool) -> Precision:
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
        )


def let_scaler_take_half_gradients(scaler: Any) -> None:
    """Make a gradient scaler accept fp16 gradients, which torch refuses: --full_fp16 has no others."""
    unscale = scaler._unscale_grads_

    def unscale_half(optimizer: Any, inverse_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return unscale(optimizer, inverse_scale, found_inf, True)

    scaler._unscale_grads_ = unscale_half
