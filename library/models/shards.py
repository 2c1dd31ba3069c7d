"""Weights that a diffusers folder keeps in one file or in several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource, open_tensors


class Shards:
    """The tensors of several files under an index, as if they were in one."""

    def __init__(self, index: Path, *, is_mapped: bool = True) -> None:
        """Open every file of the index.

        Raises:
            CheckpointError: the index or one of its files cannot be read, or lacks a tensor.
        """
        self.path = index
        try:
            places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{index}: is no index of weights ({error}). Fetch the folder again.") from error
        files = {name: open_tensors(index.parent / name, is_mapped=is_mapped) for name in sorted(set(places.values()))}
        self._files = {tensor: files[name] for tensor, name in places.items()}
        missing = [tensor for tensor, file in self._files.items() if tensor not in file.shapes]
        if missing:
            raise CheckpointError(f"{index}: {missing[0]} is not in {places[missing[0]]}. Fetch the folder again.")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: file.shapes[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """Return the tensor in the file's dtype."""
        return self._files[name].read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self._files[name].rows(name, start, stop)


def open_part(folder: Path, names: tuple[str, ...], part: str, *, is_mapped: bool = True) -> TensorSource:
    """Return the weights of one part of a diffusers folder, be they in one file or in several.

    Args:
        folder: of the part, "transformer" or "text_encoder_3".
        names: of single files, the preferred one first.
        part: for messages.
        is_mapped: whether files are mapped into memory.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    for name in names:
        if (folder / name).is_file():
            return open_tensors(folder / name, is_mapped=is_mapped)
        stem, ending = name.split(".")[0], name.split(".")[1:-1]
        index = folder / ".".join([f"{stem}.safetensors.index", *ending, "json"])
        if index.is_file():
            return Shards(index, is_mapped=is_mapped)
    raise CheckpointError(f"{folder}: holds no {part} weights (looked for {', '.join(names)}).")
