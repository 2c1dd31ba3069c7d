"""Files that are written whole or not at all: everything that the project writes goes through here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".part"  # in the names of temporary files


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


def flush_to_disk(path: Path) -> None:
    """Wait until the file's content is on the disk: else a power cut after the rename could leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
