"""The state of a run on disk: what it takes to go on exactly where it stopped.

Noise, order, captions and dropout are functions of the seed and the place in the run, so that no generator has to be
kept: a state is the trained weights, the optimizer, the schedule, the gradient scaler, the curve, and the place.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import CheckpointError, UserError
from library.training import ema
from library.training.ema import Snapshot
from library.whole_file import MARK, flush_to_disk

FORMAT = 1
MANIFEST, WEIGHTS, OPTIMIZER = "train_state.json", "network.safetensors", "optimizer.pt"
AVERAGE = "average.safetensors"  # with --ema_decay
FILES = (WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST)


@dataclass(frozen=True)
class Manifest:
    """What a state says of its run; written last, so that a folder with it is whole."""

    step: int  # optimizer steps done
    epoch: int  # 1-based: that of the last step
    seed: int
    options: Mapping[str, Any]  # what decides what is computed, by name
    dataset: str  # fingerprint of what is drawn from
    num_images: int


@dataclass(frozen=True)
class Resumed:
    """A state that was found and can be continued, its large files unread."""

    folder: Path
    manifest: Manifest
    history: list[Any]
    validations: list[Any]


@dataclass(frozen=True)
class Contents:
    """The live parts of a run's state."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    scaler: Mapping[str, Any] | None  # None without fp16
    history: list[Any]  # of losses, plain values
    validations: list[Any]  # losses on held-back images, plain values
    average: Snapshot | None = None  # of the weights; None without --ema_decay


def write(folder: Path, manifest: Manifest, contents: Contents) -> None:
    """Write a state whole or not at all; an older one of this name is there until the new one is.

    Raises: UserError when the disk is full or the folder cannot be written to.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{MARK}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in contents.weights.items()}, partial / WEIGHTS
        )
        if contents.average is not None:
            ema.write(contents.average, partial / AVERAGE)
        live = {"optimizer": contents.optimizer, "scheduler": contents.scheduler, "scaler": contents.scaler}
        torch.save(live, partial / OPTIMIZER)
        told = {
            "format": FORMAT,
            "current_epoch": manifest.epoch,
            "current_step": manifest.step,
            "seed": manifest.seed,
            "dataset": manifest.dataset,
            "num_images": manifest.num_images,
            "options": manifest.options,
            "history": contents.history,
            "validations": contents.validations,
        }
        (partial / MANIFEST).write_text(json.dumps(told), encoding="utf-8")
        for written in (partial / name for name in FILES):
            if written.exists():
                flush_to_disk(written)
        _put_in_place(partial, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: the state cannot be saved ({error}). Earlier ones are untouched.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename partial to folder; whenever this is cut off, a whole state is at folder or at its stand-in."""
    old = stand_in(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def stand_in(folder: Path) -> Path:
    """Return where the previous state of this name waits while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def find(place: str) -> Path:
    """Return the folder of a whole state: the one named, or the previous one if a kill left only that.

    Raises: CheckpointError.
    """
    folder = Path(place)
    for candidate in (folder, stand_in(folder)):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not folder.exists():
        raise CheckpointError(f"--resume {place}: there is no such folder. Give the folder that --save_state wrote.")
    raise CheckpointError(
        f"--resume {place}: has no {MANIFEST}, so it is no whole state. Give a folder that --save_state wrote."
    )


def open_state(place: str) -> Resumed:
    """Return what a state says of its run, from --resume; quick, to be called before anything slow.

    Raises: CheckpointError for a state that is not there, damaged or of another program.
    """
    folder = find(place)
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if told.get("format") != FORMAT:
            raise CheckpointError(
                f"--resume {folder}: is a state of another program or version, which cannot be continued exactly. "
                "Give its weights to --network_weights instead."
            )
        manifest = Manifest(
            step=told["current_step"],
            epoch=told["current_epoch"],
            seed=told["seed"],
            options=told["options"],
            dataset=told["dataset"],
            num_images=told["num_images"],
        )
        return Resumed(folder, manifest, told["history"], told.get("validations", []))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"--resume {folder}: {MANIFEST} cannot be read ({error}).") from error


def read(resumed: Resumed) -> Contents:
    """Return the live parts of a state, on the CPU.

    Raises: CheckpointError.
    """
    folder = resumed.folder
    try:
        live = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        weights = load_file(folder / WEIGHTS)
        return Contents(
            weights=weights,
            optimizer=live["optimizer"],
            scheduler=live["scheduler"],
            scaler=live["scaler"],
            history=resumed.history,
            validations=resumed.validations,
            average=ema.read(folder / AVERAGE),
        )
    except (EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"--resume {folder}: {OPTIMIZER} is damaged. Give an earlier state.") from error
    except (OSError, RuntimeError, KeyError, SafetensorError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"--resume {folder}: the state cannot be read ({reason}). Give an earlier one."
        ) from error
