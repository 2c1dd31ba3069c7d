"""What the tests of networks share: reference numbers, and small models as targets."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from library.models.family import LoraTarget

DATA = Path(__file__).resolve().parents[1] / "data" / "networks"


@pytest.fixture(scope="session")
def reference() -> Mapping[str, Tensor]:
    """Arrays that the reference implementation computed, by name."""
    with np.load(DATA / "lora_forward.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="session")
def read_json() -> Callable[[str], Any]:
    """Read a packed json file of the test data."""
    return lambda name: json.loads(gzip.decompress((DATA / name).read_bytes()))


def as_target(module: nn.Module, name: str = "lora_unet_x", kind: str = "attention", block: int | None = None):
    """Return a target for a module; its group follows from the name, as in files."""
    group = "unet" if name.startswith("lora_unet") else "text_encoder"
    return LoraTarget(name, module, group, kind, block)


@pytest.fixture
def target():
    """Make a LoraTarget."""
    return as_target


class SmallModel(nn.Module):
    """Two text layers and a U-Net's worth of 25 blocks, each with a Linear, a 1x1 and a 3x3 convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.text = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(24))
        self.points = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(24))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(24))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, h, w) for the same shape."""
        for layer in (*self.text, *self.linears):
            x = x + 0.1 * layer(x.movedim(1, -1)).movedim(-1, 1)
        for layer in (*self.points, *self.convs):
            x = x + 0.1 * layer(x)
        return x

    def targets(self) -> tuple[LoraTarget, ...]:
        """Return all of it as targets, named as in an SD 1.x file."""
        found = [as_target(m, f"lora_te_text_model_encoder_layers_{i}_mlp_fc1") for i, m in enumerate(self.text)]
        for i in range(24):
            stem = f"lora_unet_down_blocks_{i}"
            found.append(as_target(self.linears[i], f"{stem}_attentions_0_to_q", block=i + 1))
            found.append(as_target(self.points[i], f"{stem}_attentions_0_proj_in", block=i + 1))
            found.append(as_target(self.convs[i], f"{stem}_resnets_0_conv1", "resnet", i + 1))
        return tuple(found)


@pytest.fixture
def small() -> SmallModel:
    """A seeded SmallModel."""
    torch.manual_seed(0)
    return SmallModel().requires_grad_(False)


def randomise(network: nn.Module, std: float = 0.1) -> None:
    """Give every weight a value, as if trained."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)


@pytest.fixture
def trained():
    """Give a network's weights values."""
    return randomise


@pytest.fixture
def gradients(small: SmallModel) -> Callable[..., list[Tensor]]:
    """Return a network's gradients on the small model, from the same draws with its blocks checkpointed or not."""

    def of(network: nn.Module, *, is_checkpointed: bool) -> list[Tensor]:
        x = torch.ones(2, 8, 4, 4)
        network.zero_grad()
        torch.manual_seed(3)
        with network.attached():
            output = torch.utils.checkpoint.checkpoint(small, x, use_reentrant=False) if is_checkpointed else small(x)
            output.square().sum().backward()
        found = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
        assert found
        return found

    return of
