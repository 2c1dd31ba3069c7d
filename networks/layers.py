"""The low-rank update of one Linear or Conv2d."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.family import LoraTarget
from networks import merging
from networks.adapter import Adapter


@dataclass(frozen=True)
class Dropout:
    """Probabilities of leaving something out of a training step; None or 0: never."""

    neuron: float | None = None  # an element of the rank-space activation
    rank: float | None = None  # a rank, for a whole sample
    module: float | None = None  # the module, for a whole batch


def rank_scales(uniform: Tensor, probability: float) -> Tensor:
    """Return what each rank's activation is multiplied by: 0, or 1/(1-p) to keep the mean.

    Args:
        uniform: (B, R) draws from [0, 1).
        probability: of dropping a rank, in [0, 1).
    Returns: (B, R).
    """
    return (uniform > probability) / (1 - probability)


class LoraLayer(Adapter):
    """A target's output plus up(down(x)) * multiplier * alpha / rank.

    Tensors: lora_down.weight (R, in) or (R, in, k, k); lora_up.weight (out, R) or (out, R, 1, 1); alpha ().
    """

    alpha: Tensor

    def __init__(
        self,
        target: LoraTarget,
        rank: int,
        alpha: float | None,
        dropout: Dropout,
        multiplier: float = 1.0,
    ) -> None:
        """Make a layer that changes nothing yet, since lora_up starts at 0.

        Args:
            target: the module to adapt; a Linear, or a Conv2d without groups.
            rank: R, at least 1.
            alpha: strength in units of 1/R; None or 0: as if it were R.
            dropout: used in training mode only.
            multiplier: strength of the whole update.
        """
        super().__init__(target, multiplier, dropout.module)
        self.rank = rank
        self.dropout = dropout
        self.lora_down, self.lora_up = _low_rank_pair(target.module, rank)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.scale = (alpha or rank) / rank
        self.register_buffer("alpha", torch.tensor(float(alpha or rank)))
        self.register_load_state_dict_post_hook(_refresh_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the target's output for x with the update added, in the target's output type.

        Args:
            x: (B, ..., in) for a Linear, (B, in, H, W) for a Conv2d.
        """
        if self.sits_out():
            return self._base_forward(x)
        autocast = _autocast_dtype(x.device.type)
        if autocast is not None and x.dtype == torch.float32:
            x = x.to(autocast)  # once for both branches; autocast would do it in each
        base = self._base_forward(x)
        update = self._update(x if autocast is not None else x.to(self.lora_down.weight.dtype))
        return torch.add(base, update, alpha=self.multiplier * self.scale).to(base.dtype)

    @property
    def trained_parameters(self) -> tuple[nn.Parameter, ...]:
        """The weights that learn: both factors."""
        return tuple(self.parameters())

    def delta_norm(self) -> Tensor:
        """Return the Frobenius norm of the update without its scale, float32, on the weights' device."""
        return merging.delta_norm(self.lora_down.weight, self.lora_up.weight)

    def shrink_(self, ratio: Tensor, root: Tensor) -> None:
        """Multiply the update by ratio (), in place; both factors shrink alike, by its square root."""
        self.lora_down.weight.mul_(root.to(self.lora_down.weight.dtype))
        self.lora_up.weight.mul_(root.to(self.lora_up.weight.dtype))

    def _update(self, x: Tensor) -> Tensor:
        hidden = self.lora_down(x)
        if self.training:
            hidden = self._drop(hidden)
        return self.lora_up(hidden)

    def _drop(self, hidden: Tensor) -> Tensor:
        if self.dropout.neuron:
            hidden = F.dropout(hidden, self.dropout.neuron)
        if self.dropout.rank:
            uniform = torch.rand(hidden.shape[0], self.rank, device=hidden.device)
            hidden = hidden * self._spread(rank_scales(uniform, self.dropout.rank), hidden)
        return hidden

    def _spread(self, scales: Tensor, hidden: Tensor) -> Tensor:
        """Return scales (B, R) shaped to multiply hidden, whose ranks are its last axis, or the second of an image."""
        batch = scales.shape[0]
        if isinstance(self.lora_down, nn.Conv2d):
            return scales.view(batch, self.rank, 1, 1).to(hidden.dtype)
        return scales.view(batch, *(1,) * (hidden.dim() - 2), self.rank).to(hidden.dtype)


# Makes the layer of a target from: target, rank, alpha, dropout, multiplier.
LayerMaker = Callable[[LoraTarget, int, "float | None", Dropout, float], LoraLayer]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    # Asking about a device that knows no autocast, such as meta, is an error.
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _low_rank_pair(module: nn.Module, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias=False)
    assert isinstance(module, nn.Conv2d), type(module)
    assert module.groups == 1, "the update of a grouped convolution has another shape"
    down = nn.Conv2d(
        module.in_channels,
        rank,
        module.kernel_size,  # type: ignore[arg-type]  # typed as a tuple of any length
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        bias=False,
    )
    return down, nn.Conv2d(rank, module.out_channels, 1, bias=False)


def _refresh_scale(layer: LoraLayer, _incompatible_keys: object) -> None:
    # sd-scripts keeps the scale of construction, so that a file with another alpha acts with the wrong strength.
    layer.scale = float(layer.alpha) / layer.rank
