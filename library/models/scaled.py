"""Float8 files whose weights have to be multiplied by a number that stands beside each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource

WEIGHT = ".weight"
SCALES = (".scale_weight", ".weight_scale")  # the older name and the newer, in place of ".weight"
OF_BLOCKS = ".weight_scale_inv"  # one for each part of a weight
OTHERS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # nothing that weights depend on


class Scaled:
    """The tensors of a file with its scales multiplied in, which are no tensors of their own here."""

    path: Path

    def __init__(self, file: TensorSource, scales: Mapping[str, str]) -> None:
        self._file, self._scales = file, scales
        self.path = file.path
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for name, shape in file.shapes.items() if not name.endswith((*SCALES, *OTHERS))
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor, in float32 where it has a scale."""
        return self._multiplied(name, self._file.read(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop, in float32 where the tensor has a scale."""
        return self._multiplied(name, self._file.rows(name, start, stop))

    def _multiplied(self, name: str, tensor: Tensor) -> Tensor:
        scale = self._scales.get(name)
        return tensor if scale is None else tensor.to(torch.float32) * self._file.read(scale).to(torch.float32)


def unscaled(file: TensorSource) -> TensorSource:
    """Return the file as if it had no scales: itself where it has none.

    Raises:
        CheckpointError: a weight has more than one.
    """
    scales = {name.removesuffix(end) + WEIGHT: name for name in file.shapes for end in SCALES if name.endswith(end)}
    of_blocks = [name for name in file.shapes if name.endswith(OF_BLOCKS)]
    several = [name for name in scales.values() if file.shapes[name] not in ((), (1,))]
    if of_blocks or several:
        raise CheckpointError(
            f"{file.path}: {(of_blocks + several)[0]} holds several scales for one weight, which cannot be read. "
            "Give a file in float16, bfloat16, or float8 with one scale for each weight."
        )
    return Scaled(file, scales) if scales else file
