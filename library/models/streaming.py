"""A safetensors file written tensor by tensor: memory for one of them is enough."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.progress import progress
from library.whole_file import flush_to_disk, whole_file

NAMES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    label: str,
) -> None:
    """Write a safetensors file, all or nothing.

    Args:
        path: takes its name once all is written.
        layout: dtype and shape of each tensor.
        make: returns a tensor of that dtype and shape by name.
        metadata: for the header.
        label: of the progress bar.

    Raises: CheckpointError where it cannot be written.
    """
    try:
        with whole_file(path) as partial:
            fill(partial, layout, make, metadata, label)
            flush_to_disk(partial)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error


def fill(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    label: str,
) -> None:
    """Write a safetensors file as `write` does, straight to path, which is half a file where this fails.

    Raises: OSError.
    """
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))  # aligned, as safetensors does it
    with path.open("wb") as file:
        file.write(_header(layout, order, metadata))
        for name in progress(order, label=label, unit="tensor"):
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (layout[name][0], tuple(layout[name][1])), name
            file.write(content_of(tensor))


def content_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _header(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], order: Sequence[str], metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
