"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): `--network_module networks.dylora`.

Every forward in training draws how many ranks compute, and teaches the last of them only. So the first ranks learn to
do without the others: a file of rank 64 can be cut to any smaller rank afterwards, without training again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError
from library.models.family import LoraTarget
from networks.face import LoraFace
from networks.layers import Dropout, LayerMaker, LoraLayer
from networks.settings import KEYS, OF_SD3, Arguments, Settings, number

DEFAULT_UNIT = 1


class DyLoraLayer(LoraLayer):
    """A LoRA layer that computes with its first ranks while it learns, and with all of them otherwise."""

    def __init__(
        self,
        target: LoraTarget,
        rank: int,
        alpha: float | None,
        dropout: Dropout,
        multiplier: float = 1.0,
        *,
        unit: int = DEFAULT_UNIT,
    ) -> None:
        """Make a layer that changes nothing yet; see `LoraLayer`.

        Args:
            target: the module to adapt.
            rank: R.
            alpha: strength in units of 1/R.
            dropout: used in training mode only.
            multiplier: strength of the whole update.
            unit: how many ranks learn at a time; divides R.

        Raises: OptionError for a unit that does not divide R.
        """
        check_unit(unit, rank, f"the rank of {target.name}")
        super().__init__(target, rank, alpha, dropout, multiplier)
        self.unit = unit

    def _update(self, x: Tensor) -> Tensor:
        if not self.training:
            return super()._update(x)
        # Drawn on the CPU: the answer is a shape, and a draw on the device would have to be waited for.
        start = int(torch.randint(self.rank // self.unit, ())) * self.unit
        return self.update_of_first(x, start, start + self.unit)

    def update_of_first(self, x: Tensor, start: int, end: int) -> Tensor:
        """Return the update of the ranks before end, of which those from start on get gradients.

        It is sqrt(R / end) times as strong, so that few ranks and many have outputs of like size.

        Args:
            x: (B, ..., in) for a Linear, (B, in, H, W) for a Conv2d.
            start: of the ranks that learn.
            end: of the ranks that compute.
        """
        down, up = self.lora_down.weight, self.lora_up.weight
        down = torch.cat([down[:start].detach(), down[start:end]])
        up = torch.cat([up[:, :start].detach(), up[:, start:end]], dim=1)
        hidden = _apply(self.lora_down, x, down)
        if self.training and self.dropout.neuron:
            hidden = F.dropout(hidden, self.dropout.neuron)
        return _apply(self.lora_up, hidden * math.sqrt(self.rank / end), up)


def _apply(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def check_unit(unit: int, rank: int, what: str) -> None:
    """Find a unit that does not divide a rank. Raises: OptionError naming what has the rank."""
    if unit < 1:
        raise OptionError(f"--network_args: unit must be at least 1, got {unit}.")
    if rank % unit:
        raise OptionError(f"--network_args: unit={unit} does not divide {what}, which is {rank}. Take a divisor of it.")


def sliced_layers(arguments: Mapping[str, Any], settings: Settings | None) -> LayerMaker:
    """Return what makes a layer. Raises: OptionError for a unit that is no number or does not divide the ranks."""
    given = number(arguments, "unit", int) if arguments.get("unit") is not None else None
    unit = DEFAULT_UNIT if given is None else given
    if settings is not None:
        check_unit(unit, settings.size.rank, "--network_dim")
        check_unit(unit, settings.conv_size.rank if settings.conv_size else 0, "conv_dim")
    return partial(DyLoraLayer, unit=unit)


FACE = LoraFace(
    Arguments(
        "networks.dylora",
        ("unit", *(key for key in KEYS if key != "rank_dropout")),
        {"rank_dropout": "leaving out ranks is what it does in every step.", **OF_SD3},
    ),
    sliced_layers,
)

create_network = FACE.create_network
create_network_from_weights = FACE.create_network_from_weights
check_arguments = FACE.check_arguments
