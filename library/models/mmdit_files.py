"""The MMDiT's tensors as diffusers' folders hold them, read and written as in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.models.checkpoint import TensorSource
from library.models.layout.mmdit import DiffusersNames, depth_of


class FromDiffusers:
    """A file in diffusers' layout whose tensors go by their original names and are cut as those are."""

    def __init__(self, file: TensorSource) -> None:
        self.path: Path = file.path
        self._file = file
        self._names = DiffusersNames(depth_of(file.shapes, "transformer_blocks."))
        shapes: dict[str, tuple[int, ...]] = {}
        for original in self._names.originals():
            parts = self.parts(original)
            found = [file.shapes[part] for part in parts if part in file.shapes]
            if found and found[0]:
                shapes[original] = (found[0][0] * len(parts), *found[0][1:])
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def parts(self, name: str) -> tuple[str, ...]:
        """Return diffusers' names of what makes up the tensor of this original name."""
        return self._names.of(name).names

    def read(self, name: str) -> Tensor:
        """Return the tensor of this original name."""
        stored = self._names.of(name)
        tensors = [self._file.read(part) for part in stored.names]
        if stored.is_swapped:
            return _swapped(tensors[0])
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self.read(name)[start:stop]


def diffusers_tensors(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that diffusers' SD3Transformer2DModel has, of those under original names (without prefix)."""
    names = DiffusersNames(depth_of({name: tuple(tensor.shape) for name, tensor in original.items()}))
    written: dict[str, Tensor] = {}
    for name, tensor in original.items():
        stored = names.of(name)
        pieces = (_swapped(tensor),) if stored.is_swapped else tensor.chunk(len(stored.names))
        written.update(zip(stored.names, pieces, strict=True))
    return written


def _swapped(modulation: Tensor) -> Tensor:
    """Return a modulation's weight or bias with its two halves, shift and scale, the other way round."""
    first, second = modulation.chunk(2)
    return torch.cat([second, first])
