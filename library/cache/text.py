"""One cache entry for each text: what the text encoders make of it, and which encoders that was.

The name of an entry is a digest of its text, so that pictures with one caption share it, and an edited caption has no
entry yet. The header says what else it depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from library.cache.entries import (
    DTYPES,
    SUFFIX,
    DamagedEntryError,
    dtype_name,
    parse_header,
    read_tensor,
    require_whole,
    unusable,
    write_entry,
)

FORMAT = 1  # raised when the same fingerprint would mean other contents

Key = tuple[str, ...]  # texts that are encoded together: a caption, or a preview's negative prompt and prompt
Outputs = Mapping[str, Tensor]  # what the family keeps of a text, by name


@dataclass(frozen=True)
class TextFingerprint:
    """All that an entry depends on."""

    text: str  # digest of the key
    encoder: str  # identity of the text encoders' weights, and of how they are called
    dtype: str
    format: int = FORMAT


class State(Enum):
    """What is to be done about an entry."""

    FRESH = "used as it is"
    STALE = "is encoded again"
    MISSING = "is made"
    DAMAGED = "cannot be read and is made again"


def digest(key: Key) -> str:
    """Return what identifies a key: 32 hexadecimal digits."""
    text = json.dumps(key).encode()  # texts joined otherwise could be those of another key
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def fingerprint_of(key: Key, encoder: str, dtype: torch.dtype) -> TextFingerprint:
    """Return the fingerprint of a key's entry."""
    return TextFingerprint(digest(key), encoder, dtype_name(dtype))


def entry_folder(folder: Path, family: str) -> Path:
    """Return where the entries stand below a folder: the family's texts in one of their own."""
    return folder / f"text_{family}"


def entry_path(folder: Path, key: Key) -> Path:
    """Return the file of a key's entry."""
    return folder / f"{digest(key)}{SUFFIX}"


def judge(path: Path, wanted: TextFingerprint) -> State:
    """Return the state of the entry at path; of its tensors nothing is read."""
    try:
        with path.open("rb", buffering=0) as file:
            tensors, metadata, start = parse_header(file)
        require_whole(path, tensors, start)
        found = json.loads(metadata["fingerprint"])
    except FileNotFoundError:
        return State.MISSING
    except (DamagedEntryError, OSError, ValueError, KeyError):
        return State.DAMAGED
    return State.FRESH if found == asdict(wanted) else State.STALE


def write(path: Path, outputs: Outputs, fingerprint: TextFingerprint) -> None:
    """Write an entry whole or not at all; rows of zeros at the ends, which stand for padding, are left out.

    Raises: DataError if the folder cannot be written.
    """
    num_rows = {name: len(tensor) for name, tensor in outputs.items() if tensor.dim() > 1}
    kept = {name: _without_padding(tensor) for name, tensor in outputs.items()}
    metadata = {"fingerprint": json.dumps(asdict(fingerprint)), "num_rows": json.dumps(num_rows)}
    write_entry(path, kept, metadata)


def read(path: Path) -> dict[str, Tensor]:
    """Return what the text encoders made of a text, by name, padding included.

    Raises: DataError if the file is missing or damaged.
    """
    try:
        with path.open("rb", buffering=0) as file:
            tensors, metadata, start = parse_header(file)
            if not all(entry["dtype"] in DTYPES for entry in tensors.values()):
                raise DamagedEntryError("not an entry of the text cache")
            num_rows = json.loads(metadata["num_rows"])
            outputs = {name: read_tensor(file, start, entry) for name, entry in tensors.items()}
    except (DamagedEntryError, OSError, ValueError, KeyError) as error:
        raise unusable(path, error) from error
    return {name: _padded(tensor, num_rows.get(name, 0)) for name, tensor in outputs.items()}


def _without_padding(tensor: Tensor) -> Tensor:
    """Return a tensor (N, ...) without the rows at its end that are 0 throughout; at least one row is left."""
    if tensor.dim() < 2:
        return tensor.contiguous()
    is_used = tensor.reshape(len(tensor), -1).ne(0).any(dim=1)
    num_used = max(1, int(is_used.nonzero().max()) + 1) if bool(is_used.any()) else 1
    return tensor[:num_used].contiguous()


def _padded(tensor: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - len(tensor) if tensor.dim() > 1 else 0
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor
