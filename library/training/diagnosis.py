"""Why a loss is not a finite number, where the base model is to blame; looked into only once that has happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from library.models.family import Parts


def broken_tensor(parts: Parts) -> str | None:
    """Return which weight of the frozen models holds infinite numbers or NaN, None if all are sound.

    Reads every weight, so that it is no check for the start of a run: a model of several gigabytes takes seconds.
    """
    for name, module in _named(parts):
        for place, weight in module.named_parameters():
            if weight.is_floating_point() and not weight.float().isfinite().all():
                return f"{place} of the {name}"
    return None


def explained(message: str, parts: Parts, checkpoint: str, precision: str) -> str:
    """Return the message of a loss that is not finite, or in its place what is wrong with the base model.

    Args:
        message: names the step and the images.
        parts: the models of the run.
        checkpoint: where they come from.
        precision: --mixed_precision.
    """
    broken = broken_tensor(parts)
    if broken is None:
        return message
    step = message.partition(":")[0]
    remedy = "Fetch the file again, or choose another one."
    if precision == "fp16":
        remedy = f"{remedy[:-1]}; if it is sound, its numbers are too large for fp16: use --mixed_precision bf16."
    return (
        f"{step}: the loss is not a finite number, because the base model is damaged: {broken} in {checkpoint} holds "
        f"numbers that are infinite or none at all (NaN). {remedy} Nothing was saved."
    )


def _named(parts: Parts) -> Iterable[tuple[str, nn.Module]]:
    """Yield the models with what users call them."""
    yield "denoiser", parts.denoiser
    for number, encoder in enumerate(parts.text_encoders, start=1):
        yield f"text encoder {number}" if len(parts.text_encoders) > 1 else "text encoder", encoder
    if parts.vae is not None:
        yield "VAE", parts.vae
