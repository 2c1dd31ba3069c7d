"""The set of LoRA layers on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.models.family import LoraTarget
from library.models.layout.mmdit_lora import T5
from networks import files
from networks.adapter_network import AdapterNetwork
from networks.files import StoredModule
from networks.layers import LayerMaker, LoraLayer
from networks.parameter_groups import ParameterGroup, parameter_groups
from networks.settings import Settings
from networks.split_qkv import with_trained_strength


class LoraNetwork(AdapterNetwork):
    """A LoRA layer for every target that the settings give a rank."""

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        settings: Settings,
        multiplier: float = 1.0,
        stored: Mapping[str, StoredModule] | None = None,
        make_layer: LayerMaker = LoraLayer,
    ) -> None:
        """Make the layers; the model does not compute with them until `attach` or `apply_to`.

        Args:
            targets: what the model offers, in the order of the file.
            settings: ranks, alphas, dropout, learning-rate weights.
            multiplier: strength of every layer.
            stored: instead of the settings' ranks and alphas, those of a file; targets it lacks get no layer.
            make_layer: the kind of layer.
        """
        sizes = [
            (target, *(settings.size_of(target) if stored is None else _stored_size(stored.get(target.name))))
            for target in targets
        ]
        super().__init__(
            (make_layer(target, rank, alpha, settings.dropout, multiplier) for target, rank, alpha in sizes if rank),
            multiplier,
        )
        self.settings = settings

    @property
    def layers(self) -> tuple[LoraLayer, ...]:
        """Every layer, in the order of the file."""
        return tuple(layer for layer in self.children() if isinstance(layer, LoraLayer))

    @property
    def train_t5xxl(self) -> bool:
        """Whether SD3's third text encoder has layers; the name is sd-scripts'."""
        return any(layer.target.kind == T5 for layer in self.layers)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shrink the layers whose update is larger than the limit; return scalars on the weights' device.

        The norm is that of alpha / rank * up @ down.

        Args:
            max_norm_value: the largest Frobenius norm allowed.
            device: part of the face; the weights are worked on where they are.

        Returns: how many layers were shrunk, the mean norm and the largest norm, both after shrinking.
        """
        layers = self.layers
        norms = torch.stack([layer.delta_norm() * abs(layer.scale) for layer in layers])
        # Only what is above the limit is touched, and a norm of 0 must not be divided by.
        ratios = (max_norm_value / norms.clamp(min=max_norm_value)).clamp(max=1)
        for layer, ratio, root in zip(layers, ratios.unbind(), ratios.sqrt().unbind(), strict=True):
            layer.shrink_(ratio, root)
        limited = norms * ratios
        return (ratios < 1).sum(), limited.mean(), limited.max()

    def _parameter_groups(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None
    ) -> list[ParameterGroup]:
        return parameter_groups(self.layers, self.settings, text_encoder_lrs, unet_lr)

    def _to_load(self, tensors: Mapping[str, Tensor], origin: object) -> Mapping[str, Tensor]:
        return with_trained_strength(tensors, self.layers, origin)

    def _stored_in(self, tensors: Mapping[str, Tensor], origin: str) -> Mapping[str, StoredModule]:
        return files.modules_in(tensors, origin)


def _stored_size(stored: StoredModule | None) -> tuple[int, float]:
    return (0, 0.0) if stored is None else (stored.rank, stored.alpha)
