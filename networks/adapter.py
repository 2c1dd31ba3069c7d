"""What takes part in the forward of one module of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from library.models.family import LoraTarget


def is_skipped(uniform: float, probability: float | None) -> bool:
    """Return whether the module sits this step out, from one draw in [0, 1)."""
    return probability is not None and uniform < probability


class Adapter(nn.Module):
    """A layer that changes its target's output.

    The target's own weights and names stay untouched: while attached, only its `forward` is this layer's.
    """

    def __init__(self, target: LoraTarget, multiplier: float, module_dropout: float | None) -> None:
        """Make a layer that is not attached yet.

        Args:
            target: the module to adapt.
            multiplier: strength of the whole change; at 0 the target computes as if there were none.
            module_dropout: probability of sitting out a batch, in training mode only; None or 0: never.
        """
        super().__init__()
        self.target = target
        self.multiplier = multiplier
        self.module_dropout = module_dropout
        self._base_forward: Any = None  # the target's forward while attached
        self._outer: Any = None  # what stood in the target's __dict__ before, such as another network's layer

    @property
    def is_attached(self) -> bool:
        """Whether the target computes with this layer."""
        return self._base_forward is not None

    def attach(self) -> None:
        """Make the target compute with this layer."""
        assert not self.is_attached, f"{self.target.name} is attached already"
        module = self.target.module
        self._outer = module.__dict__.get("forward")
        self._base_forward = module.forward
        module.forward = self.forward

    def detach(self) -> None:
        """Give the target its former forward back."""
        module = self.target.module
        assert self.is_attached, f"{self.target.name} is not attached"
        assert module.__dict__["forward"] == self.forward, f"{self.target.name}: another layer was attached since"
        if self._outer is None:
            del module.forward
        else:
            module.forward = self._outer
        self._base_forward = self._outer = None

    def sits_out(self) -> bool:
        """Return whether this forward is the target's own; draws from torch's generator where that decides."""
        if self.multiplier == 0:
            return True
        # Drawn on the CPU: the answer steers Python, and a draw on the device would have to be waited for.
        return self.training and bool(self.module_dropout) and is_skipped(float(torch.rand(1)), self.module_dropout)
