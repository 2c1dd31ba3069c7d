"""Which LoRA weights learn at which rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from networks.layers import LoraLayer
from networks.settings import Settings


@dataclass(frozen=True)
class ParameterGroup:
    """Weights with one learning rate."""

    description: str  # "textencoder", "unet plus", "unet_block4"; the name of the rate in logs
    parameters: tuple[nn.Parameter, ...]
    lr: float | None

    @property
    def is_trained(self) -> bool:
        """Whether the optimizer gets the group: a rate of 0 or none at all leaves it as it is."""
        return bool(self.lr)


def parameter_groups(
    layers: Sequence[LoraLayer], settings: Settings, text_encoder_lr: float | None, unet_lr: float | None
) -> list[ParameterGroup]:
    """Return every weight's group: text encoders, then the U-Net, whole or one per block in order of appearance.

    Args:
        layers: of the network.
        settings: for the block weights and LoRA+.
        text_encoder_lr: rate of the text encoders; None: not trained.
        unet_lr: rate of the U-Net, before block weights.
    """
    text_encoder = [layer for layer in layers if layer.target.group != "unet"]
    unet = [layer for layer in layers if layer.target.group == "unet"]
    groups = _split(text_encoder, "textencoder", text_encoder_lr, settings.lora_plus.text_encoder)
    if settings.lr_weights is None:
        return groups + _split(unet, "unet", unet_lr, settings.lora_plus.unet)
    by_block: dict[int | None, list[LoraLayer]] = {}
    for layer in unet:
        by_block.setdefault(layer.target.block, []).append(layer)
    for block, members in by_block.items():
        lr = None if unet_lr is None else unet_lr * settings.lr_weight(members[0].target)
        groups += _split(members, f"unet_block{0 if block is None else block}", lr, settings.lora_plus.unet)
    return groups


def _split(layers: Sequence[LoraLayer], name: str, lr: float | None, ratio: float | None) -> list[ParameterGroup]:
    if not ratio:
        return _non_empty(name, (p for layer in layers for p in layer.trained_parameters), lr)
    down = (p for layer in layers for p in layer.lora_down.parameters())
    up = (p for layer in layers for p in layer.lora_up.parameters())
    return _non_empty(name, down, lr) + _non_empty(f"{name} plus", up, None if lr is None else lr * ratio)


def _non_empty(name: str, parameters: Iterable[nn.Parameter], lr: float | None) -> list[ParameterGroup]:
    members = tuple(parameters)
    return [ParameterGroup(name, members, lr)] if members else []
