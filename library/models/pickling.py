"""A torch checkpoint (.ckpt, .bin) written tensor by tensor: memory for one of them is enough.

torch.save wants all tensors at once, in the dtype of the file; for a whole model that is a second copy of it. The file
is what torch.save makes: a zip archive, uncompressed, of a pickle that names each tensor and of the tensors' bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.models.streaming import content_of
from library.progress import progress

ROOT = "archive"  # in the zip
ALIGNMENT = 64  # of tensors in the file, as torch.save has them, so that they can be mapped
PADDING, PADDING_HEADER, FILE_HEADER = b"FB", 4, 30  # of the zip format; torch.save names its padding so too
LARGE = 2**31 - 1  # bytes of a tensor that needs the newer zip format
PROTOCOL = 2  # of the pickle, as torch.save writes it
STORAGES = {  # torch's class of the bytes of each dtype
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


@dataclass(frozen=True)
class _Bytes:
    """A tensor's bytes in the archive."""

    key: str
    kind: Any  # torch's class of such bytes
    count: int  # of elements


@dataclass(frozen=True)
class _Stored:
    """A tensor that the pickle only names."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes tensors as torch.save does: by what makes them again of bytes that lie elsewhere in the archive."""

    def persistent_id(self, obj: Any) -> Any:
        """Return how torch.load finds a tensor's bytes; None: all else is pickled as it is."""
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Bytes) else None

    def reducer_override(self, obj: Any) -> Any:
        """Return how a tensor is made of its bytes."""
        if not isinstance(obj, _Stored):
            return NotImplemented
        count = math.prod(obj.shape)
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        place: tuple[Any, ...] = (0, obj.shape, strides, False, OrderedDict())  # no gradient, no hooks
        if obj.dtype in STORAGES:
            content = _Bytes(obj.key, getattr(torch, STORAGES[obj.dtype]), count)
            return torch._utils._rebuild_tensor_v2, (content, *place)
        content = _Bytes(obj.key, torch.UntypedStorage, count * obj.dtype.itemsize)
        return torch._utils._rebuild_tensor_v3, (content, *place, obj.dtype)


def fill(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    make: Callable[[str], Tensor],
    counts: Mapping[str, int] | None,
    label: str,
) -> None:
    """Write a torch checkpoint straight to path, which is half a file where this fails.

    Args:
        path: of the file.
        layout: dtype and shape of each tensor.
        make: returns a tensor of that dtype and shape by name.
        counts: beside the tensors, which are under "state_dict" then; None: the file is nothing but tensors.
        label: of the progress bar.

    Raises: OSError.
    """
    keys = {name: str(index) for index, name in enumerate(layout)}
    tensors = {name: _Stored(keys[name], dtype, tuple(shape)) for name, (dtype, shape) in layout.items()}
    pickled = io.BytesIO()
    _Pickler(pickled, PROTOCOL).dump(tensors if counts is None else {"state_dict": tensors, **counts})
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, content: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"{ROOT}/{name}")
            is_large = len(content) > LARGE
            start = file.tell() + FILE_HEADER + len(entry.filename) + PADDING_HEADER + 20 * is_large
            room = -start % ALIGNMENT
            entry.extra = PADDING + room.to_bytes(2, "little") + bytes(room)
            with archive.open(entry, "w", force_zip64=is_large) as target:
                target.write(content)

        add("data.pkl", pickled.getvalue())
        add("byteorder", b"little")
        for name in progress(list(layout), label=label, unit="tensor"):
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (layout[name][0], tuple(layout[name][1])), name
            add(f"data/{keys[name]}", content_of(tensor))
        add("version", b"3\n")
