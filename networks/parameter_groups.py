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
    layers: Sequence[LoraLayer],
    settings: Settings,
    text_encoder_lrs: Sequence[float | None],
    unet_lr: float | None,
) -> list[ParameterGroup]:
    """Return every weight's group: text encoders, then the U-Net, whole or one per block in order of appearance.

    Args:
        layers: of the network.
        settings: for the block weights and LoRA+.
        text_encoder_lrs: rate of each text encoder, the last of all further ones; None: not trained.
        unet_lr: rate of the U-Net, before block weights.
    """
    unet = [layer for layer in layers if layer.target.group == "unet"]
    groups = _of_text_encoders(layers, settings, text_encoder_lrs)
    if settings.lr_weights is None:
        return groups + _split(unet, "unet", unet_lr, settings.lora_plus.unet)
    by_block: dict[int | None, list[LoraLayer]] = {}
    for layer in unet:
        by_block.setdefault(layer.target.block, []).append(layer)
    for block, members in by_block.items():
        lr = None if unet_lr is None else unet_lr * settings.lr_weight(members[0].target)
        groups += _split(members, f"unet_block{0 if block is None else block}", lr, settings.lora_plus.unet)
    return groups


def _of_text_encoders(
    layers: Sequence[LoraLayer], settings: Settings, rates: Sequence[float | None]
) -> list[ParameterGroup]:
    """Return one group for all text encoders, or one each where their rates differ or the settings want it."""
    text = [layer for layer in layers if layer.target.group != "unet"]
    by_encoder: dict[int, list[LoraLayer]] = {}
    for layer in text:
        by_encoder.setdefault(layer.target.encoder, []).append(layer)
    rate_of = {encoder: rates[min(encoder, len(rates) - 1)] for encoder in by_encoder}
    ratio = settings.lora_plus.text_encoder
    if len(set(rate_of.values())) <= 1 and not settings.is_rate_by_encoder:
        return _split(text, "textencoder", next(iter(rate_of.values()), None), ratio)
    return [
        group
        for encoder, members in by_encoder.items()
        for group in _split(members, f"textencoder {encoder + 1}", rate_of[encoder], ratio)
    ]


def _split(layers: Sequence[LoraLayer], name: str, lr: float | None, ratio: float | None) -> list[ParameterGroup]:
    if not ratio:
        return _non_empty(name, (p for layer in layers for p in layer.trained_parameters), lr)
    down = (p for layer in layers for p in layer.lora_down.parameters())
    up = (p for layer in layers for p in layer.lora_up.parameters())
    return _non_empty(name, down, lr) + _non_empty(f"{name} plus", up, None if lr is None else lr * ratio)


def _non_empty(name: str, parameters: Iterable[nn.Parameter], lr: float | None) -> list[ParameterGroup]:
    members = tuple(parameters)
    return [ParameterGroup(name, members, lr)] if members else []
