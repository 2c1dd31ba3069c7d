"""Whole models written to files: what is read of the source once, and how the trained weights go back into it."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from library.models import pickling, streaming
from library.models.checkpoint import PickledFile, TensorSource

log = logging.getLogger(__name__)

Pieces = Mapping[str, tuple[Tensor, ...]]  # by its name in a file, what a tensor is joined of along its first axis

SAFETENSORS, CKPT = "safetensors", "ckpt"  # one file, in the original layout
DIFFUSERS, DIFFUSERS_SAFETENSORS = "diffusers", "diffusers_safetensors"  # a folder; its parts are .bin or .safetensors
FORMS = (CKPT, SAFETENSORS, DIFFUSERS, DIFFUSERS_SAFETENSORS)
FOLDERS = (DIFFUSERS, DIFFUSERS_SAFETENSORS)
WORTH_TELLING = 2**30  # bytes in main memory


@dataclass(frozen=True)
class Kept:
    """What a model's source holds besides the weights that are written anew; read once, before the training."""

    tensors: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))  # of a single file, by name
    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # of a .ckpt: epoch, global_step
    files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))  # of a folder: all but weights


def kept_of_file(file: TensorSource, written: Container[str], renamed: Mapping[str, str] | None = None) -> Kept:
    """Return what a single file holds besides the tensors that are written anew, in memory of its own.

    Args:
        file: may be changed, moved or deleted afterwards.
        written: names of the tensors that the models give.
        renamed: names that the others get in what is written, where they differ.
    """
    names = [name for name in file.shapes if name not in written]
    tensors = {(renamed or {}).get(name, name): file.read(name).clone() for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > WORTH_TELLING:
        log.info(
            "%s: %d tensors that are not trained stay in memory until the end, %s MB, to be saved with the model",
            *(file.path.name, len(tensors), f"{size / 1e6:,.0f}"),
        )
    return Kept(tensors, file.counts if isinstance(file, PickledFile) else {})


def joined(pieces: tuple[Tensor, ...], dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of a file on the CPU; dtype None: as it is."""
    tensors = [piece.detach().to(dtype=dtype or piece.dtype).cpu() for piece in pieces]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def layout_of(weights: Pieces, dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtype and shape that each tensor has in a file; dtype None: as it is."""
    return {
        name: (dtype or own[0].dtype, (sum(piece.shape[0] for piece in own), *own[0].shape[1:]))
        if own[0].dim()
        else (dtype or own[0].dtype, ())
        for name, own in weights.items()
    }


def write_file(
    path: Path,
    weights: Pieces,
    kept: Kept,
    *,
    form: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    place: tuple[int, int],
) -> None:
    """Write a single file, one tensor after the other; half a file is left where this fails.

    Args:
        path: of the file.
        weights: what the models give.
        kept: its tensors that the models do not give are written as they were.
        form: SAFETENSORS or CKPT.
        dtype: of the weights in the file; None: as in memory.
        metadata: of the header of safetensors; a .ckpt has none.
        place: (steps, epochs) of this training, which those of the source are added to in a .ckpt.

    Raises: OSError.
    """
    others = {name: tensor for name, tensor in kept.tensors.items() if name not in weights}
    layout = layout_of(weights, dtype) | {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()}

    def make(name: str) -> Tensor:
        return others[name] if name in others else joined(weights[name], dtype)

    if form == SAFETENSORS:
        streaming.fill(path, layout, make, metadata, "save")
        return
    assert form == CKPT, form
    steps, epochs = place
    counts = {
        "epoch": epochs + kept.counts.get("epoch", 0),
        "global_step": steps + kept.counts.get("global_step", 0),
    }
    pickling.fill(path, layout, make, counts, "save")
