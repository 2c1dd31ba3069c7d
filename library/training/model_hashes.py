"""The base model's hashes for the metadata, computed while training already runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from library.file_hashes import LEGACY_BYTES, LEGACY_START
from library.whole_file import whole_file

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22  # hashlib lets other threads run while it hashes a chunk of this size
KEPT_ENTRIES = 200  # of the cache file


class BackgroundHash:
    """The two hashes of a model file, from a thread that never holds up training.

    A full sha256 of a 4 GB checkpoint takes 2 to 12 s: it is needed when the first file is saved, not before.
    """

    def __init__(self, place: str | None, short_key: str, full_key: str, cache_file: Path | None) -> None:
        """Start hashing.

        Args:
            place: a file; a folder has no hash but the word IsADirectory, what does not exist (a hub's id) has none.
            short_key: the metadata key of the hash over 64 KiB, 8 digits.
            full_key: the metadata key of the sha256 over the whole file.
            cache_file: where hashes are remembered between runs; None: nowhere.
        """
        self._keys = (short_key, full_key)
        self._values: dict[str, str] = {}
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        if place and Path(place).is_dir():
            self._values = dict.fromkeys(self._keys, "IsADirectory")
        elif place and Path(place).is_file():
            self._thread = threading.Thread(target=self._work, args=(Path(place), cache_file), daemon=True)
            self._thread.start()

    @staticmethod
    def of_model(place: str, cache_file: Path | None = None) -> BackgroundHash:
        """Return the running hash of the base model."""
        return BackgroundHash(place, "ss_sd_model_hash", "ss_new_sd_model_hash", cache_file)

    @staticmethod
    def of_vae(place: str | None, cache_file: Path | None = None) -> BackgroundHash:
        """Return the running hash of a separate VAE; it gives nothing where there is none."""
        return BackgroundHash(place, "ss_vae_hash", "ss_new_vae_hash", cache_file)

    @property
    def is_running(self) -> bool:
        """Whether the file is still being read."""
        return self._thread is not None and self._thread.is_alive()

    def metadata(self) -> dict[str, str]:
        """Return the hashes by their keys, waiting for them if need be; empty where there are none."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            log.warning("the base model's hash is left out of the metadata: %s", self._error)
            self._error = None
        return dict(self._values)

    def _work(self, path: Path, cache_file: Path | None) -> None:
        try:
            self._values = dict(zip(self._keys, remembered_hashes(path, cache_file), strict=True))
        except OSError as error:
            self._error = error


def default_cache_file() -> Path:
    """Return the file of remembered hashes in the user's cache folder."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "masked-diffusion-training" / "model_hashes.json"


def remembered_hashes(path: Path, cache_file: Path | None) -> tuple[str, str]:
    """Return (8 digits of the sha256 of 64 KiB at 1 MiB, sha256 of the whole file).

    A file of the same path, size and modification time as an earlier one is not read again. Raises: OSError.
    """
    status = path.stat()
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    known = _read(cache_file)
    entry = known.get(key)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(digest, str) for digest in entry):
        return entry[0], entry[1]
    result = file_hashes(path)
    _write(cache_file, {**_read(cache_file), key: list(result)})
    return result


def file_hashes(path: Path) -> tuple[str, str]:
    """Return (8 digits of the sha256 of 64 KiB at 1 MiB, sha256 of the whole file). Raises: OSError."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(LEGACY_START)
        short = hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:8]
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
    return short, whole.hexdigest()


def _read(cache_file: Path | None) -> dict[str, object]:
    """Return what the cache file holds; nothing where it is missing or damaged."""
    if cache_file is None:
        return {}
    try:
        content = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(cache_file: Path | None, entries: Mapping[str, object]) -> None:
    """Write the newest entries; a folder that cannot be written to costs only the next run's time."""
    if cache_file is None:
        return
    newest = dict(list(entries.items())[-KEPT_ENTRIES:])
    try:
        with whole_file(cache_file) as partial:
            partial.write_text(json.dumps(newest, indent=1), encoding="utf-8")
    except Exception as error:  # a cache may not break a run, whatever is wrong with it
        log.debug("%s cannot be written: %s", cache_file, error)
