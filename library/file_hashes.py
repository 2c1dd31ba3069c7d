"""The hashes by which web UIs know a LoRA file whatever its title says: sshs_model_hash and sshs_legacy_hash."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

LEGACY_START, LEGACY_BYTES = 0x100000, 0x10000  # sshs_legacy_hash and ss_sd_model_hash look at 64 KiB at 1 MiB


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata with sshs_model_hash and sshs_legacy_hash of the file that tensors will make.

    Args:
        tensors: exactly as they will be written, dtype included.
        metadata: of the file.
    """
    model_hash, legacy_hash = hashes(tensors, metadata)
    return {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return (sshs_model_hash, sshs_legacy_hash), by which web UIs know a LoRA whatever its title says.

    Both are of the safetensors file with the ss_ keys alone in its header: the first a sha256 of all tensor bytes, the
    second the first 8 digits of that of 64 KiB at 1 MiB, header included. Nothing is serialised for it: the bytes go to
    the hash tensor by tensor.
    """
    order = _file_order(tensors)
    header = _header(tensors, order, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, part = hashlib.sha256(), hashlib.sha256()
    position = 0
    for content, is_data in _contents(header, tensors, order):
        start = max(LEGACY_START - position, 0)
        part.update(content[start : max(LEGACY_START + LEGACY_BYTES - position, start)])
        if is_data:
            whole.update(content)
        position += len(content)
    return whole.hexdigest(), part.hexdigest()[:8]


def _contents(
    header: bytes, tensors: Mapping[str, Tensor], order: Iterable[tuple[str, str]]
) -> Iterator[tuple[memoryview, bool]]:
    """Yield the pieces of a safetensors file, and whether they are tensor data."""
    yield memoryview(header), False
    for name, _ in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        content: Any = flat.view(torch.uint8).numpy()
        yield memoryview(content), True


def _file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return (name, dtype as safetensors calls it) in the order of the file, which safetensors decides."""
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    blob = safetensors.torch.save(empty)
    (length,) = struct.unpack("<Q", blob[:8])
    return [(name, entry["dtype"]) for name, entry in json.loads(blob[8 : 8 + length]).items()]


def _header(tensors: Mapping[str, Tensor], order: Iterable[tuple[str, str]], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of the safetensors file: the header's length, the header, blanks up to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entries[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
