"""LoRA files as diffusers writes them, `unet.….lora_A.weight`, under the names that LoRA files have elsewhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.models.layout import lora_names

METADATA = "lora_adapter_metadata"  # in the header: the settings of each part, as JSON
NESTED = "text_model."  # a level that transformers has left out since version 5.6, and LoRA files have
ENDINGS = {
    "lora_A.weight": ".lora_down.weight",
    "lora_B.weight": ".lora_up.weight",
    "lora.down.weight": ".lora_down.weight",  # before diffusers used PEFT
    "lora.up.weight": ".lora_up.weight",
    "lora_linear_layer.down.weight": ".lora_down.weight",
    "lora_linear_layer.up.weight": ".lora_up.weight",
    "alpha": ".alpha",
}
DOWN, ALPHA = ".lora_down.weight", ".alpha"
_NAME = re.compile(rf"(unet|text_encoder_2|text_encoder)\.(.+?)\.({'|'.join(map(re.escape, ENDINGS))})")
_OTHER_MATHS = "lora_magnitude_vector"


def converted(tensors: Mapping[str, Tensor], header: Mapping[str, str], origin: object) -> dict[str, Tensor]:
    """Return a file's tensors with diffusers' names, if it has any, replaced, and the alphas that its header tells.

    "text_encoder_2.encoder.layers.0.mlp.fc1.lora_A.weight" becomes
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight". The U-Net keeps diffusers' paths.

    Args:
        tensors: by name.
        header: the metadata of the file.
        origin: the file, for messages.

    Raises: CheckpointError where it says that the update is not up @ down alone.
    """
    found = {name: parts for name in tensors if (parts := _NAME.fullmatch(name))}
    if not found:
        return dict(tensors)
    if other := next((name for name in tensors if _OTHER_MATHS in name), None):
        raise CheckpointError(f"{origin}: {other} shows another method than plain LoRA, which cannot be read here.")
    prefixes = _prefixes([parts.groups() for parts in found.values()])
    try:
        settings: Mapping[str, Any] = json.loads(header.get(METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"{origin}: {METADATA} in its header is no JSON ({error}), so alphas are unknown."
        ) from None
    renamed = {name: tensor for name, tensor in tensors.items() if name not in found}
    for name, parts in found.items():
        part, path, ending = parts.groups()
        nested = path if part == "unet" or path.startswith(NESTED) else NESTED + path
        stem = prefixes[part] + nested.replace(".", "_")
        renamed[stem + ENDINGS[ending]] = tensors[name]
        if ENDINGS[ending] == DOWN and (alpha := _alpha(settings, part, path, tensors[name].shape[0])) is not None:
            renamed.setdefault(stem + ALPHA, torch.tensor(alpha))
    return renamed


def _prefixes(found: list[tuple[str, ...]]) -> dict[str, str]:
    """Return how the names of each part start; a model with two text encoders numbers them."""
    unet = [lora_names.UNET + path.replace(".", "_") for part, path, _ in found if part == "unet"]
    has_two = any(part == "text_encoder_2" for part, _, _ in found) or lora_names.family_of(unet) == lora_names.SDXL
    return {
        "unet": lora_names.UNET,
        "text_encoder": "lora_te1_" if has_two else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }


def _alpha(settings: Mapping[str, Any], part: str, path: str, rank: int) -> float | None:
    """Return a module's alpha as the header tells it, for a strength of alpha / rank; None where it does not."""
    alpha = settings.get(f"{part}.lora_alpha")
    for pattern, own in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = own
            break
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else 1.0)
