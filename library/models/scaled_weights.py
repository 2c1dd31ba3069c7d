"""Files whose float8 weights have a factor of their own beside them, read as the weights they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource

FACTORS = ("scale_weight", "weight_scale")  # ComfyUI's first and second name for it
COMPANIONS = (*FACTORS, "scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # nothing of a model's own


class Unscaled:
    """A file's weights times their factors, which are left out of the names, as is all that goes with them."""

    def __init__(self, file: TensorSource) -> None:
        self.path: Path = file.path
        self._file = file
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for name, shape in file.shapes.items() if name.rpartition(".")[2] not in COMPANIONS
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor: float32 if it has a factor, as in the file if it has none.

        Raises:
            CheckpointError: a weight has more than one factor.
        """
        return self._times_factor(name, self._file.read(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop, likewise."""
        return self._times_factor(name, self._file.rows(name, start, stop))

    def _times_factor(self, name: str, tensor: Tensor) -> Tensor:
        layer, _, kind = name.rpartition(".")
        factor = next((f"{layer}.{each}" for each in FACTORS if f"{layer}.{each}" in self._file.shapes), None)
        if kind != "weight" or factor is None:
            return tensor
        if math.prod(self._file.shapes[factor]) != 1:
            raise CheckpointError(
                f"{self.path}: {factor} is {list(self._file.shapes[factor])}, expected one number. "
                "This kind of quantised file cannot be trained on; fetch the float16, bfloat16 or plain float8 version."
            )
        return tensor.float() * self._file.read(factor).float().reshape(())
