"""Cache entries: small safetensors files, whole or not there, with what they were made from in their headers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from library import whole_file as files
from library.errors import DataError
from library.whole_file import MARK, whole_file

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 1 << 16  # a header is under 1 kB; more is not ours
ABANDONED_S = 3600.0
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)

Tensors = dict[str, dict[str, Any]]  # a header's entries: dtype, shape, data_offsets


class DamagedEntryError(Exception):
    """The file is not a whole cache entry."""


def unusable(path: Path, error: Exception) -> DataError:
    """Return what to raise for an entry that cannot be read when it is needed."""
    return DataError(f"{path}: the cache entry cannot be used ({error}). Start again without --skip_cache_check.")


def content_digest(data: bytes) -> str:
    """Return what identifies a file's content: 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype: F32, F16 or BF16."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def parse_header(file: FileIO) -> tuple[Tensors, dict[str, str], int]:
    """Return the tensors' places, the metadata, and where the data starts. Raises: DamagedEntryError."""
    head = file.read(4096)  # longer than most of our headers: one call instead of two
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > MAX_HEADER_BYTES:
        raise DamagedEntryError("not a safetensors file")
    while len(head) < 8 + length:
        more = file.read(8 + length - len(head))
        if not more:
            raise DamagedEntryError("cut short")
        head += more
    try:
        tensors: Tensors = json.loads(head[8 : 8 + length])
        metadata = tensors.pop("__metadata__")
        is_known = all(entry["dtype"] and entry["shape"] is not None for entry in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedEntryError("not an entry of a cache") from error
    if not is_known or not isinstance(metadata, dict):
        raise DamagedEntryError("not an entry of a cache")
    return tensors, metadata, 8 + length


def require_whole(path: Path, tensors: Tensors, start: int) -> None:
    """Find a file that lacks bytes, or has too many. Raises: DamagedEntryError."""
    try:
        end = start + max(entry["data_offsets"][1] for entry in tensors.values())
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError("not an entry of a cache") from error
    if end != path.stat().st_size:
        raise DamagedEntryError("cut short")


def read_bytes(file: FileIO, start: int, entry: dict[str, Any]) -> bytearray:
    """Return a tensor's bytes; nothing else is read. Raises: DamagedEntryError."""
    begin, end = entry["data_offsets"]
    data = bytearray(end - begin)
    file.seek(start + begin)
    if file.readinto(data) != len(data):
        raise DamagedEntryError("cut short")
    return data


def read_tensor(file: FileIO, start: int, entry: dict[str, Any]) -> Tensor:
    """Return a tensor of one of DTYPES. Raises: DamagedEntryError."""
    data = read_bytes(file, start, entry)
    return torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write_entry(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write an entry whole or not at all: under a temporary name in the same folder, then renamed.

    Raises: DataError if the folder cannot be written.
    """
    data = safetensors.torch.save(dict(tensors), dict(metadata))
    try:
        with whole_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise DataError(
            f"{path}: the cache entry cannot be written ({error.strerror or error}). "
            "Make room there, or name another folder for the cache with --cache_dir."
        ) from error


def remove_abandoned(folder: Path) -> None:
    """Remove what runs that were killed left half written in a folder, an hour ago or more."""
    for left in folder.glob(f".*{MARK}{SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                left.unlink()


def check_writable(entries: Iterable[Path], cache: str) -> None:
    """Find out, before any model is loaded, whether entries that are missing can be written.

    Args:
        entries: files of the cache, there or not.
        cache: what users call it.

    Raises: DataError; a folder that cannot be written to is no error while it has all the entries.
    """
    seen: set[Path] = set()
    for entry in entries:
        if entry.parent in seen or entry.exists():
            continue
        seen.add(entry.parent)
        try:
            files.check_writable(entry.parent)
        except OSError as error:
            raise DataError(
                f"{entry.parent}: the {cache} cannot be written there ({error.strerror or error}). "
                "Name another folder for it with --cache_dir."
            ) from None
