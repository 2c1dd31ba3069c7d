"""Files that are written whole or not at all, under names that file systems take."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".part"  # in the names of temporary files
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
