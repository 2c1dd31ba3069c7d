"""The pass over a folder tree: which pictures need a mask, and making those masks, several at a time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from library.dataset import files, images, pairing
from library.dataset.geometry import Pixels
from library.errors import DataError, OptionError
from library.mask_making.finishing import Finish, combined, finish
from library.mask_making.pictures import Drawn, Picture, Source
from library.progress import progress
from library.whole_file import MARK, whole_file

MOST_THREADS = 8
EMPTY, FULL = 0.001, 0.999  # mean weights that hardly anybody wants
ABANDONED_S = 3600  # a temporary file this old belongs to no run that goes on
FAINT = 128  # a mask that is nowhere this white

State = Literal["made", "kept", "failed"]
Fault = Literal["", "empty", "full", "faint"]


@dataclass(frozen=True)
class Job:
    """One picture and its mask."""

    picture: Path
    name: str  # of the picture, relative to its folder, with forward slashes
    mask: Path  # to be written
    old: Path  # the mask that may be there already, with which the new one is combined


@dataclass(frozen=True)
class Outcome:
    """What became of one picture."""

    job: Job
    state: State
    fault: Fault = ""
    doubt: str = ""  # of the source
    error: str = ""  # why it failed


def find_jobs(image_dir: Path, mask_dir: Path, old_dir: Path | None) -> tuple[list[Job], list[DataError]]:
    """Return the pictures in a folder and all folders within it, and an error for each two whose masks are the same.

    Masks lie as the pictures do, with the ending .png. Folders that are hidden, or hold masks, are left out.

    Args:
        image_dir: folder of pictures.
        mask_dir: folder for the masks.
        old_dir: folder of masks to combine with; None: mask_dir.

    Raises: OptionError if a folder cannot be used.
    """
    if not image_dir.is_dir():
        what = "is a file. Name its folder" if image_dir.exists() else "there is no such folder"
        raise OptionError(f"{image_dir}: {what}. Relative names start at {Path.cwd()}.")
    if mask_dir.exists() and not mask_dir.is_dir():
        raise OptionError(f"{mask_dir}: is a file. Name a folder for the masks.")
    if mask_dir.resolve() == image_dir.resolve():
        raise OptionError(f"{mask_dir}: is the folder of the pictures. Name another one for the masks.")
    if old_dir is not None and not old_dir.is_dir():
        raise OptionError(f"--combine_with {old_dir}: there is no such folder. Relative names start at {Path.cwd()}.")
    skipped = {mask_dir.resolve()} | ({old_dir.resolve()} if old_dir else set())
    by_mask: dict[Path, list[Job]] = {}
    for picture in _pictures(image_dir, skipped):
        relative = picture.relative_to(image_dir)
        mask = mask_dir / relative.parent / f"{relative.stem}.png"
        old = mask if old_dir is None else old_dir / relative.parent / f"{relative.stem}.png"
        by_mask.setdefault(mask, []).append(Job(picture, relative.as_posix(), mask, old))
    errors = [
        DataError(
            f"{jobs[0].picture}: has the name of {' and '.join(job.picture.name for job in jobs[1:])}, and all of them "
            f"would have the mask {mask.name}. Give each another name."
        )
        for mask, jobs in by_mask.items()
        if len(jobs) > 1
    ]
    return [jobs[0] for jobs in by_mask.values() if len(jobs) == 1], errors


def _pictures(folder: Path, skipped: set[Path]) -> Iterator[Path]:
    """Yield the pictures in a folder and those within, sorted; links are followed, each folder is entered once."""
    entered = set(skipped)
    for place, folders, _ in os.walk(folder, followlinks=True):
        here = Path(place)
        if here.resolve() in entered:
            folders.clear()
            continue
        entered.add(here.resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from files.list_images(here)


def is_there(job: Job) -> bool:
    """Return whether a whole mask of the picture's size, or a rescaled copy of it, is at its place."""
    if not job.mask.is_file():
        return False
    try:
        return pairing.has_same_aspect(files.read_header(job.mask).size, files.read_header(job.picture).size)
    except DataError:
        return False


def keeps(jobs: Sequence[Job], *, combine: str, overwrite: bool) -> bool:
    """Return whether masks that are there are kept: not if they are to be changed in their own place."""
    return not overwrite and (combine == "replace" or any(job.old != job.mask for job in jobs))


def make_all(
    jobs: Sequence[Job], source: Source, how: Finish, *, combine: str, keep: bool, batch_size: int
) -> Iterator[Outcome]:
    """Yield what became of each picture, as soon as it is known.

    Several pictures are read and written at a time; a bar shows how far it is. Whatever ends the pass, Ctrl-C
    included, each mask is whole or not there.

    Args:
        jobs: what to make.
        source: draws the masks.
        how: what is done to them then.
        combine: with the old mask, see finishing.combined.
        keep: leave masks alone that are there.
        batch_size: pictures that the source gets at a time.

    Raises: UserError if no picture can have a mask.
    """
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    remove_left_over({job.mask.parent for job in jobs})

    def work(batch: Sequence[Job]) -> list[Outcome]:
        return make_batch(batch, source, how, combine=combine, keep=keep)

    batches = (jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size))
    with progress(label="masks", total=len(jobs), unit="picture") as bar, ThreadPoolExecutor(threads) as pool:
        waiting: set[Future[list[Outcome]]] = set()
        try:
            for batch in batches:
                waiting.add(pool.submit(work, batch))
                if len(waiting) >= 2 * threads:  # what is read waits in memory for the source
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for outcome in _results(done):
                        bar.update()
                        yield outcome
            for outcome in _results(wait(waiting).done):
                bar.update()
                yield outcome
        finally:
            for future in waiting:
                future.cancel()


def _results(done: set[Future[list[Outcome]]]) -> Iterator[Outcome]:
    for future in done:
        yield from future.result()


def make_batch(jobs: Sequence[Job], source: Source, how: Finish, *, combine: str, keep: bool) -> list[Outcome]:
    """Return what became of some pictures, whose masks the source draws together. Raises: UserError, as make_all."""
    outcomes: list[Outcome] = []
    pictures: list[Picture] = []
    wanted: list[Job] = []
    for job in jobs:
        if keep and is_there(job):
            outcomes.append(Outcome(job, "kept"))
            continue
        try:
            pictures.append(read_picture(job))
            wanted.append(job)
        except DataError as error:
            outcomes.append(Outcome(job, "failed", error=str(error)))
    for job, picture, drawn in zip(wanted, pictures, source(pictures) if pictures else (), strict=True):
        try:
            outcomes.append(_finish_one(job, picture, drawn, how, combine))
        except DataError as error:
            outcomes.append(Outcome(job, "failed", error=str(error)))
    return outcomes


def read_picture(job: Job) -> Picture:
    """Return a picture as seen. Raises: DataError."""
    decoded = images.read_image(job.picture, want_alpha=True)
    return Picture(job.picture, job.name, decoded.rgb, decoded.alpha)


def _finish_one(job: Job, picture: Picture, drawn: Drawn, how: Finish, combine: str) -> Outcome:
    size = picture.rgb.shape[:2]
    assert drawn.mask.shape == size, f"{job.name}: the mask has another size"
    old = None if combine == "replace" else read_old(job, (size[1], size[0]))
    mask = combined(finish(drawn.mask, how), old, combine)
    try:
        with whole_file(job.mask) as partial:
            Image.fromarray(mask).save(partial, format="PNG")
    except OSError as error:
        raise DataError(f"{job.mask}: cannot be written ({error.strerror or error}).") from None
    return Outcome(job, "made", fault=fault_of(mask), doubt=drawn.doubt)


def read_old(job: Job, size: tuple[int, int]) -> Pixels | None:
    """Return the mask that is there, made its picture's size (width, height); None if none is. Raises: DataError."""
    if not job.old.is_file():
        return None
    mask = images.read_mask(job.old)
    height, width = mask.shape
    if (width, height) == size:
        return mask
    if not pairing.has_same_aspect((width, height), size):
        raise DataError(
            f"{job.old}: is {width}x{height}, its picture {job.name} is {size[0]}x{size[1]}. Make both the same size."
        )
    return np.asarray(
        cv2.resize(mask, size, interpolation=cv2.INTER_AREA if size[0] < width else cv2.INTER_LINEAR), np.uint8
    )


def fault_of(mask: Pixels) -> Fault:
    """Return what is suspicious about a mask: hardly anything is learnt, or masked out, or it is grey at best."""
    mean = float(mask.mean()) / 255
    if mean < EMPTY:
        return "empty"
    if mean > FULL:
        return "full"
    return "faint" if int(np.max(mask)) < FAINT else ""


def remove_left_over(folders: set[Path]) -> None:
    """Remove the unfinished files of runs that were killed an hour ago or more; they are hidden and of no use."""
    for folder in folders:
        for left in folder.glob(f".*{MARK}.png"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    left.unlink()
