"""The rotation of a module's outputs (orthogonal fine-tuning, Qiu et al. 2023, arXiv:2306.07280)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import CheckpointError, OptionError
from library.models.family import LoraTarget
from networks.adapter import Adapter
from networks.files import ALPHA

BLOCKS = ".oft_blocks"
SHORTEST = 1e-12  # keeps a limit of 0 from dividing by 0


def change_of(blocks: Tensor, limit: float) -> Tensor:
    """Return R - I in float32, (K, n, n), where R = (I + Q)(I - Q)^-1 is a rotation and Q = blocks - blocks^T.

    R - I = 2Q (I - Q)^-1, which is exactly 0 where blocks are. I - Q can always be inverted, as Q is skew-symmetric.

    Args:
        blocks: (K, n, n).
        limit: Q is shortened to this Frobenius norm, over all its blocks, where it is longer.
    """
    blocks = blocks.float()
    skew = blocks - blocks.mT
    skew = skew * (limit / torch.linalg.vector_norm(skew).clamp(min=max(limit, SHORTEST)))
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    # solve_ex, as solve waits for the device to learn whether a matrix was singular.
    return torch.linalg.solve_ex(identity - skew, 2 * skew, left=False).result


@dataclass(frozen=True)
class StoredRotation:
    """What a file holds for one module."""

    blocks: Tensor  # (K, n, n)
    alpha: float

    @property
    def shape_text(self) -> str:
        """The shape of the blocks, for messages."""
        return f"{tuple(self.blocks.shape)}"

    def merged(self, weight: Tensor, multiplier: float) -> Tensor:
        """Return the weight (out, ...) with its outputs rotated, float32; a bias is no part of the rotation."""
        change = change_of(self.blocks.to(weight.device), self.alpha * weight.shape[0]) * multiplier
        rows = weight.float().flatten(1).unflatten(0, change.shape[:2])  # (K, n, inputs)
        return (rows + change.mT @ rows).view(weight.shape)


def rotations_in(tensors: Mapping[str, Tensor], origin: str) -> dict[str, StoredRotation]:
    """Return what a file holds by module name. Raises: CheckpointError for no module at all, or one of wrong shape."""
    names = [name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)]
    if not names:
        example = next(iter(tensors), "no tensors")
        raise CheckpointError(
            f'{origin}: holds no "<module>{BLOCKS}", so networks.oft cannot read it (its first entry: {example}).'
        )
    for name in names:
        shape = tuple(tensors[name + BLOCKS].shape)
        if len(shape) != 3 or shape[1] != shape[2]:
            raise CheckpointError(f"{origin}: {name}{BLOCKS} is {shape}, no square blocks.")
        if name + ALPHA not in tensors:
            raise CheckpointError(f"{origin}: {name}{ALPHA} is missing, which limits the rotation.")
    return {name: StoredRotation(tensors[name + BLOCKS], float(tensors[name + ALPHA])) for name in names}


class RotationLayer(Adapter):
    """A target's output with every block of n channels rotated; its bias, which is added afterwards, is not.

    Tensors: oft_blocks (K, n, n) with K * n = out, and alpha (). With multiplier m the outputs are multiplied by
    I + m (R - I), which is a rotation for m = 0 and m = 1.
    """

    alpha: Tensor

    def __init__(
        self,
        target: LoraTarget,
        num_blocks: int,
        alpha: float,
        module_dropout: float | None = None,
        multiplier: float = 1.0,
    ) -> None:
        """Make a layer that changes nothing yet, since oft_blocks start at 0.

        Args:
            target: the module to adapt.
            num_blocks: K; divides the number of output channels.
            alpha: limit of Q's norm in units of the number of output channels.
            module_dropout: see `Adapter`.
            multiplier: strength.

        Raises: OptionError where K does not divide.
        """
        super().__init__(target, multiplier, module_dropout)
        self.num_outputs = int(target.module.weight.shape[0])  # type: ignore[index]
        if self.num_outputs % num_blocks:
            raise OptionError(
                f"--network_dim {num_blocks} does not divide the {self.num_outputs} outputs of {target.name}. "
                "For networks.oft it is a number of blocks: take a power of 2."
            )
        size = self.num_outputs // num_blocks
        self.oft_blocks = nn.Parameter(torch.zeros(num_blocks, size, size))
        self.limit = alpha * self.num_outputs
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_load_state_dict_post_hook(_refresh_limit)

    def forward(self, x: Tensor) -> Tensor:
        """Return the target's output for x, rotated, in its own type.

        Args:
            x: (B, ..., in) for a Linear, (B, in, H, W) for a Conv2d.
        """
        base: Tensor = self._base_forward(x)
        if self.sits_out():
            return base
        change = change_of(self.oft_blocks, self.limit) * self.multiplier
        bias = self.target.module.bias
        offset = None
        if isinstance(bias, Tensor):
            offset = -(bias.float().view(self.num_blocks, 1, -1) @ change).flatten().to(base.dtype)
        # The difference is added: rounded to half precision, R itself would lose most of a small rotation.
        return base + self._rotated(base, change.to(base.dtype), offset)

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.oft_blocks.shape[0]

    def _rotated(self, base: Tensor, change: Tensor, offset: Tensor | None) -> Tensor:
        if isinstance(self.target.module, nn.Conv2d):
            # A row of the kernel is an output channel: (K, n in, n out) becomes (K * n out, n in, 1, 1).
            kernel = change.mT.reshape(self.num_outputs, -1, 1, 1)
            return F.conv2d(base, kernel, offset, groups=self.num_blocks)
        blocks = base.reshape(-1, self.num_blocks, change.shape[1]).transpose(0, 1)  # (K, tokens, n)
        update = torch.bmm(blocks, change).transpose(0, 1).reshape(base.shape)
        return update if offset is None else update + offset


def _refresh_limit(layer: RotationLayer, _incompatible_keys: object) -> None:
    layer.limit = float(layer.alpha) * layer.num_outputs
