"""LoRA files: tensors in, tensors out, and what their names say about the network."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import CheckpointError
from library.file_hashes import with_hashes
from library.models.family import LoraTarget
from library.models.layout import lora_names
from library.whole_file import whole_file
from networks import diffusers_names, merging

log = logging.getLogger(__name__)

NUM_NAMES_SHOWN = 5  # of a long list, in a message
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@dataclass(frozen=True)
class StoredModule:
    """What a file holds for one module."""

    down: Tensor  # (R, in) or (R, in, k, k)
    up: Tensor  # (out, R) or (out, R, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    @property
    def shape_text(self) -> str:
        """The shapes of the pair, for messages."""
        return f"{tuple(self.up.shape)} x {tuple(self.down.shape)}"

    def merged(self, weight: Tensor, multiplier: float) -> Tensor:
        """Return weight + multiplier * alpha / R * up @ down, float32, on the weight's device."""
        down, up = self.down.to(weight.device), self.up.to(weight.device)
        return merging.merged(weight, down, up, multiplier * self.alpha / self.rank)


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file, on the CPU, under the names that are known here, whichever tool wrote it.

    Those of diffusers are replaced, and SDXL's after diffusers' U-Net become those of the original layout.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than tensors.
    """
    tensors = read_as_named(path)
    return _in_known_names(diffusers_names.converted(tensors, header_of(Path(path)), path), path)


def header_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; nothing for other kinds of file.

    Raises: CheckpointError for a damaged file.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(str(path), "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}).") from None


def read_as_named(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file by the names that it has, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such LoRA file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: cannot be read: it is damaged, or holds Python objects besides tensors, and those could run "
            "code. Use the .safetensors version."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as a LoRA file ({type(error).__name__}: {reason}).") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: holds no tensors by name, so it is not a LoRA file.")
    return loaded


def renamed(tensors: Mapping[str, Tensor], targets: Iterable[LoraTarget]) -> dict[str, Tensor]:
    """Return a file's tensors with those that go by a target's alias under its name."""
    names = {target.alias: target.name for target in targets if target.alias is not None}
    split = (
        (stem, dot + rest, tensor) for name, tensor in tensors.items() for stem, dot, rest in [name.partition(".")]
    )
    return {names.get(stem, stem) + rest: tensor for stem, rest, tensor in split}


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a LoRA file under a temporary name, then rename it: there is never half a file.

    Args:
        path: ends in .safetensors, otherwise torch's own format is written, which holds no metadata.
        tensors: by name; alphas are cast like the others.
        dtype: to write in; None: as they are.
        metadata: for the header of a safetensors file, which also gets the tensors' hashes; None: no header.
    """
    path = Path(path)
    stored = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        if path.suffix == ".safetensors":
            save_file(stored, partial, None if metadata is None else with_hashes(stored, metadata))
        else:
            torch.save(stored, partial)


def _in_known_names(tensors: Mapping[str, Tensor], origin: object) -> dict[str, Tensor]:
    """Return a file's tensors, those of SDXL after diffusers' U-Net renamed after the original layout.

    Raises: CheckpointError where the file has a tensor under both names.
    """
    stems = {name.partition(".")[0] for name in tensors}
    if lora_names.family_of(stems) != lora_names.SDXL:
        return dict(tensors)
    renamed = {lora_names.in_original_layout(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = next(n for n in tensors if n != lora_names.in_original_layout(n) in tensors)
        raise CheckpointError(f"{origin}: {twice} is there a second time as {lora_names.in_original_layout(twice)}.")
    return renamed


def modules_in(tensors: Mapping[str, Tensor], origin: str) -> dict[str, StoredModule]:
    """Return what a file holds by module name.

    Args:
        tensors: as read.
        origin: the file, named in errors.

    Raises:
        CheckpointError: no module at all, half a module, or ranks that do not fit together.
    """
    names = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    if not names:
        example = next(iter(tensors), "no tensors")
        raise CheckpointError(
            f'{origin}: holds no "<module>{DOWN}", so networks.lora cannot read it (its first entry: {example}). '
            "Is it of another kind, or in another tool's naming?"
        )
    modules = {}
    for name in names:
        down, up = tensors[name + DOWN], tensors.get(name + UP)
        if up is None:
            raise CheckpointError(f"{origin}: {name}{UP} is missing.")
        if down.dim() not in {2, 4} or up.dim() not in {2, 4} or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{origin}: {name} has down {tuple(down.shape)} and up {tuple(up.shape)}, no LoRA pair."
            )
        alpha = tensors.get(name + ALPHA)
        modules[name] = StoredModule(down, up, float(down.shape[0] if alpha is None else alpha))
    return modules


def fitted(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """Return tensor in the given shape if they differ only in trailing 1s (Linear against 1x1), else None."""
    if tensor.shape == shape:
        return tensor
    short, long = sorted((tensor.shape, shape), key=len)
    if (len(short), len(long)) == (2, 4) and tuple(long) == (*short, 1, 1):
        return tensor.reshape(shape)
    return None


def warn_of_names(origin: str | os.PathLike[str], what: str, names: Sequence[str]) -> None:
    """Log one warning that counts names and shows the first of them; none for no names."""
    if names:
        more = f" and {len(names) - NUM_NAMES_SHOWN} more" if len(names) > NUM_NAMES_SHOWN else ""
        log.warning("%s: %d %s: %s%s", origin, len(names), what, ", ".join(names[:NUM_NAMES_SHOWN]), more)
