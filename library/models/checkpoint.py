"""Model files in and out: tensors one by one, onto modules without a second copy, and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import CheckpointError
from library.whole_file import whole_file

log = logging.getLogger(__name__)

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
COUNTS = ("epoch", "global_step")  # beside the tensors of a .ckpt
SHOWN_KEYS = 3
SAMPLED_ROWS = 8  # of each tensor's first axis, for a fingerprint
REMAP_BYTES = 2**28
STORED_DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(Protocol):
    """Named tensors of a file, read one at a time."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Return the tensor in the file's dtype, on the CPU."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return a part of the tensor along its first axis; nothing else is read."""


class SafetensorsFile:
    """A mapped safetensors file: a tensor's bytes are read when they are first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._map()
        self._mapped_bytes = 0
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape())
            for name in self._file.keys()  # noqa: SIM118 it is no dict
        }

    def _map(self) -> Any:
        try:
            return safe_open(str(self.path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: not a readable safetensors file ({error}). "
                "It may be an unfinished download: fetch it again."
            ) from error

    def read(self, name: str) -> Tensor:
        """Return the tensor, backed by the file's pages."""
        tensor = self._file.get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        if self._mapped_bytes > REMAP_BYTES:  # lets go of the pages of tensors that were cast and dropped
            self._file, self._mapped_bytes = self._map(), 0
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop, in memory of their own.

        They are read, as each look into a mapped file may fetch megabytes around a row from the disk.
        """
        return self._unmapped.rows(name, start, stop)

    @cached_property
    def _unmapped(self) -> UnmappedFile:
        return UnmappedFile(self.path, self.shapes)


class UnmappedFile:
    """A safetensors file of which each tensor is read when it is asked for, without mapping the file."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Read the header, unless its shapes are given and so known to be right. Raises: CheckpointError."""
        self.path = path
        self.shapes = SafetensorsFile(path).shapes if shapes is None else shapes
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            self._header: Mapping[str, Any] = json.loads(file.read(header_bytes))
        self._start = 8 + header_bytes

    def read(self, name: str) -> Tensor:
        """Return the tensor, in memory of its own."""
        return self.rows(name, 0, self.shapes[name][0] if self.shapes[name] else 1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        first, last = self._header[name]["data_offsets"]
        shape = self.shapes[name]
        row_bytes = (last - first) // max(1, shape[0] if shape else 1)
        content = bytearray((stop - start) * row_bytes)
        with self.path.open("rb") as file:
            file.seek(self._start + first + start * row_bytes)
            file.readinto(content)
        dtype = STORED_DTYPES[self._header[name]["dtype"]]
        if not content:
            return torch.empty((stop - start, *shape[1:]), dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).reshape((stop - start, *shape[1:]) if shape else ())


class PickledFile:
    """A torch checkpoint (.ckpt, .pt, .bin); only tensors and plain containers are unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _unpickle(path)
        told = content if isinstance(content, dict) else {}
        self.counts = {name: told[name] for name in COUNTS if isinstance(told.get(name), int)}  # how far it was trained
        while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named tensors.")
        self._tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self._tensors[name][start:stop]


def _unpickle(path: Path) -> Any:
    """Return what torch saved at path; mapped from the file where its format allows that."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by torch before 1.6: cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors (or is damaged), and those could run code. "
            "Convert it to .safetensors with a tool you trust, or fetch the .safetensors version."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}). It may be an unfinished download: fetch it again."
        ) from error


def open_tensors(path: Path, *, is_mapped: bool = True) -> TensorSource:
    """Return the file's tensors, by its suffix.

    Args:
        path: of a model file.
        is_mapped: whether a safetensors file is mapped into memory; otherwise tensors are read one by one.

    Raises:
        CheckpointError: no such file, an unknown suffix, or not readable.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. Check the path.")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path) if is_mapped else UnmappedFile(path)
    if path.suffix in PICKLED:
        return PickledFile(path)
    known = ", ".join((".safetensors", *PICKLED))
    raise CheckpointError(f"{path}: '{path.suffix}' is not a known kind of model file. Known: {known}.")


class Prefixed:
    """The tensors of a file under one prefix, which is left out of their names."""

    def __init__(self, file: TensorSource, prefix: str) -> None:
        self._file, self._prefix = file, prefix
        self.path = file.path
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)
        }

    def read(self, name: str) -> Tensor:
        """Return the tensor."""
        return self._file.read(self._prefix + name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop."""
        return self._file.rows(self._prefix + name, start, stop)


def sampled_rows(file: TensorSource, name: str) -> Tensor:
    """Return up to 8 rows of a tensor, spread evenly, as one row: enough to tell weights apart without reading all."""
    shape = file.shapes[name]
    if not shape:
        return file.read(name).reshape(1)
    step = max(1, -(-shape[0] // SAMPLED_ROWS))
    rows = [file.rows(name, row, row + 1) for row in range(0, shape[0], step)]
    return torch.cat([row.reshape(-1) for row in rows]) if rows else torch.empty(0)


def fingerprint(file: TensorSource, names: Mapping[str, str] | None = None) -> str:
    """Return 32 hex digits that identify tensors: names, shapes, dtypes and a sample of each.

    Args:
        file: at most 8 rows of each tensor are read.
        names: the names that count, and for each that in the file; None: all as they are.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, stored in sorted((names or {name: name for name in file.shapes}).items()):
        sample = sampled_rows(file, stored)
        digest.update(f"{name} {list(file.shapes[stored])} {sample.dtype}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def has_prefix(file: TensorSource, prefix: str) -> bool:
    """Say whether any tensor's name starts with prefix."""
    return any(name.startswith(prefix) for name in file.shapes)


def build_on_meta(make: Callable[[], Any]) -> nn.Module:
    """Return the module that make builds, without memory for its weights (`load_onto` gives it some)."""
    with torch.device("meta"):
        return make()


def load_onto(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    source: str,
    part: str,
    *,
    in_float32: Container[str] = (),
) -> None:
    """Give a module built on the meta device its tensors, frozen and in eval mode.

    Args:
        module: knows the shapes.
        tensors: (name in the module, tensor) in any floating dtype; consumed one by one. A (out, in, 1, 1) tensor
            also fits an (out, in) parameter, and the reverse.
        dtype: of every floating tensor afterwards.
        source: the file or folder, for messages.
        part: "U-Net" and so on, for messages.
        in_float32: names in the module of tensors that are float32 instead.

    Raises:
        CheckpointError: a tensor's shape does not fit.
    """
    wanted = module.state_dict()

    def fit(name: str, tensor: Tensor) -> Tensor:
        shape = wanted[name].shape
        if tensor.shape != shape:
            if math.prod(tensor.shape) != math.prod(shape) or _squeezed(tensor.shape) != _squeezed(shape):
                raise CheckpointError(
                    f"{source}: {part} tensor {name} is {list(tensor.shape)}, expected {list(shape)}. "
                    "The file mixes different models or is damaged."
                )
            tensor = tensor.reshape(shape)
        kept_in = torch.float32 if name in in_float32 else dtype
        return tensor.to(kept_in) if tensor.is_floating_point() else tensor

    fitted = {name: fit(name, tensor) for name, tensor in tensors}
    assert fitted.keys() == wanted.keys(), sorted(wanted.keys() - fitted.keys())[:SHOWN_KEYS]
    module.load_state_dict(fitted, strict=True, assign=True)
    _fill_buffers(module)
    module.requires_grad_(False).eval()


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape without the 1x1 of a convolution that is a linear layer."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _fill_buffers(module: nn.Module) -> None:
    """Give the buffers that no file holds their values: transformers' position_ids count from 0."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            assert last == "position_ids", name
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
            module.get_submodule(owner).register_buffer(last, positions, persistent=False)


def require(file: TensorSource, names: Iterable[str], part: str) -> None:
    """Check that the file has all these tensors.

    Raises:
        CheckpointError: says how many are missing and names the first three.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in file.shapes]
    if missing:
        first = ", ".join(missing[:SHOWN_KEYS])
        raise CheckpointError(
            f"{file.path}: {len(missing)} of {len(wanted)} {part} tensors are missing (first: {first}). "
            "The file is incomplete or holds another kind of model."
        )


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to path through a temporary file beside it, so that path never holds half a file.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        with whole_file(path) as partial:
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, partial, metadata=dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error
