"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): `--network_module networks.lora_fa`.

lora_down keeps the random values it starts with and lora_up alone learns. That halves the gradients and the optimizer's
states, and of a layer's input only the R values behind lora_down are kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from library.models.family import LoraTarget
from networks.face import LoraFace
from networks.layers import Dropout, LayerMaker, LoraLayer
from networks.settings import KEYS, LORA_PLUS_KEYS, OF_SD3, Arguments, Settings


class LoraFaLayer(LoraLayer):
    """A LoRA layer whose lora_down is frozen."""

    def __init__(
        self, target: LoraTarget, rank: int, alpha: float | None, dropout: Dropout, multiplier: float = 1.0
    ) -> None:
        """Make a layer that changes nothing yet; see `LoraLayer`."""
        super().__init__(target, rank, alpha, dropout, multiplier)
        down = self.lora_down.weight
        nn.init.normal_(down, std=math.sqrt(2 / (down.shape[1] + rank)))  # as sd-scripts: channels, whatever the kernel
        down.requires_grad_(False)

    @property
    def trained_parameters(self) -> tuple[nn.Parameter, ...]:
        """The weights that learn: lora_up's."""
        return tuple(self.lora_up.parameters())

    def shrink_(self, ratio: Tensor, root: Tensor) -> None:
        """Multiply the update by ratio (), in place; lora_up takes all of it."""
        self.lora_up.weight.mul_(ratio.to(self.lora_up.weight.dtype))


def frozen_down_layers(_arguments: Mapping[str, Any], _settings: Settings | None) -> LayerMaker:
    """Return what makes a layer."""
    return LoraFaLayer


REASON = "lora_down does not learn here, so there is nothing that lora_up could learn faster than."
FACE = LoraFace(
    Arguments(
        "networks.lora_fa",
        tuple(key for key in KEYS if key not in LORA_PLUS_KEYS),
        {**dict.fromkeys(LORA_PLUS_KEYS, REASON), **OF_SD3},
    ),
    frozen_down_layers,
)

create_network = FACE.create_network
create_network_from_weights = FACE.create_network_from_weights
check_arguments = FACE.check_arguments
