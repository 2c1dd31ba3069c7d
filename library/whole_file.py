"""Files and folders that are written whole or not at all, under names that file systems take."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".part"  # in the names of temporary files and folders
GONE = ".gone"  # ends the name of a folder that is being removed
LONGEST_NAME = 230  # bytes; file systems take 255, a temporary name is up to 18 longer


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside path, to be written; it takes path's place only when all went well.

    The suffix is path's own, so that writers that look at it choose the same format. Whatever goes wrong, Ctrl-C
    included, the temporary file is removed and a file that was at path before is untouched.

    Raises: OSError as the writer does.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}{MARK}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors puts a file of its own there, which others cannot read
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside path, to be filled; it takes path's place only when all went well.

    All its files are on the disk by then. A folder that was at path stays until the new one is whole: whenever this is
    cut off, a whole one is at path or, for the moment between two renames, at `stand_in(path)`, from where the next
    writer takes it back.

    Raises: OSError as the writer does, or where a file is at path.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{MARK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file has this name", str(path))
        if not path.exists() and stand_in(path).is_dir():
            stand_in(path).rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        _put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename partial to path, and remove the folder that was there."""
    old = stand_in(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def stand_in(path: Path) -> Path:
    """Return where the previous folder of this name waits while a new one takes its place."""
    return path.with_name(f".{path.name}.old")


def remove_folder(path: Path) -> None:
    """Remove a folder, which is at no moment half a folder under its name. Raises: OSError."""
    gone = path.with_name(f".{path.name}{GONE}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Find out whether files can be written to folder, which may have to be made first; nothing is left there.

    Raises: OSError.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def flush_to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk: else a power cut after the rename could leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fitting_name(name: str, ending: str = "") -> str:
    """Return name + ending, a name too long for a file being cut and told apart by a digest of all of it."""
    data = name.encode("utf-8", "surrogateescape")
    room = LONGEST_NAME - len(ending.encode("utf-8", "surrogateescape"))
    if len(data) <= room:
        return name + ending
    digest = hashlib.blake2b(data, digest_size=6).hexdigest()
    return f"{data[: room - len(digest) - 1].decode('utf-8', 'ignore')}~{digest}{ending}"
