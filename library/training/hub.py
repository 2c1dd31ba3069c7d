"""Uploads to a repository on Hugging Face's hub, and states that are downloaded from there.

An upload that fails is one line in the log. It never ends a training, which has the file on its disk anyway.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from library.errors import CheckpointError
from library.options.hub import hub_place
from library.training import state
from library.training.saving import EPOCH_NAME, FINAL_NAME, STEP_NAME

if TYPE_CHECKING:
    from library.options.hub import HubOptions
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # how long the hub may take to say whether a repository is there
WAITING = ".upload"  # the ending of folders with files that wait for their upload


@dataclass(frozen=True)
class Upload:
    """A saved file or folder on its way to the hub."""

    saved: Path
    held: Path  # what is read: saved itself, or its double, which stays when saved is replaced or rotated away


class Uploads:
    """Sends what a run saves to its repository, in order; at once, or beside training."""

    def __init__(self, options: HubOptions, folder: Path) -> None:
        """Keep what is needed to upload; nothing is asked of the hub yet.

        Args:
            options: the hub group, with a repository.
            folder: --output_dir, in which files wait for their upload.
        """
        self.repo_id = options.huggingface_repo_id or ""
        self.repo_type = options.huggingface_repo_type or "model"
        self.folder_in_repo = options.huggingface_path_in_repo or ""
        self.visibility = options.huggingface_repo_visibility
        self.num_added, self.num_sent, self.num_failed = 0, 0, 0
        self._token = options.huggingface_token
        self._api = HfApi(token=self._token)
        self._folder = folder
        self._is_found = False
        self._is_offline = False
        self._queue: queue.SimpleQueue[Upload | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        if options.async_upload:
            # a daemon, so that a second Ctrl-C ends the program whatever the hub does
            self._worker = threading.Thread(target=self._work, name="uploads", daemon=True)

    @property
    def address(self) -> str:
        """Where the files go, for people."""
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self._api.endpoint}/{prefix}{self.repo_id}"

    def start(self) -> None:
        """Find the repository or make it, and say so; a hub that does not answer is a warning."""
        try:
            self._find_repository()
        except OfflineModeIsEnabled:
            self._is_offline = True
            log.warning(
                "--huggingface_repo_id: nothing is uploaded, because HF_HUB_OFFLINE is set; files are saved here"
            )
        except Exception as error:
            log.warning(
                "--huggingface_repo_id %s: %s. Training goes on, and each upload tries again",
                self.repo_id,
                reason(error, self._token),
            )
        if self._worker is not None:
            self._worker.start()

    def add(self, saved: Path) -> None:
        """Upload a file or the files of a folder, or put it into the queue."""
        if self._is_offline:
            return
        self.num_added += 1
        if self._worker is None:
            self._send(Upload(saved, saved))
            return
        try:
            self._queue.put(Upload(saved, hold(saved, self._folder)))
        except OSError as error:
            self._tell_failure(saved, error)

    def finish(self) -> None:
        """Wait for uploads that are still to come, then say how many arrived.

        Raises: KeyboardInterrupt when the user does not want to wait; the rest is left out.
        """
        if self._worker is not None:
            self._queue.put(None)
            self._wait(self._worker)
        if self.num_added:
            log.info("uploads: %d of %d arrived at %s", self.num_sent, self.num_added, self.address)

    def _wait(self, worker: threading.Thread) -> None:
        told = None
        try:
            while worker.is_alive():
                left = self.num_added - self.num_sent - self.num_failed
                if left and left != told:
                    log.info("waiting for %d upload(s) (Ctrl-C leaves them out)", left)
                told = left
                worker.join(0.5)  # not for ever: on Windows nothing interrupts a join
        except KeyboardInterrupt:
            log.warning("uploads: left out %d", self.num_added - self.num_sent - self.num_failed)
            raise

    def _work(self) -> None:
        while (upload := self._queue.get()) is not None:
            self._send(upload)
            shutil.rmtree(upload.held.parent, ignore_errors=True)

    def _send(self, upload: Upload) -> None:
        started = time.monotonic()
        name = "/".join(part for part in (self.folder_in_repo, upload.saved.name) if part)
        try:
            if not self._is_found:
                self._find_repository()
            with without_bars():
                self._api.create_commit(
                    self.repo_id,
                    operations=[
                        CommitOperationAdd("/".join((name, *file.relative_to(upload.held).parts)), file)
                        for file in files_of(upload.held)
                    ],
                    commit_message=f"Upload {upload.saved.name}",
                    repo_type=self.repo_type,
                )
        except Exception as error:  # whatever it is: a broken upload must not cost the training
            self._tell_failure(upload.saved, error)
            return
        self.num_sent += 1
        log.info("uploaded %s to %s (%.1f s)", name, self.address, time.monotonic() - started)

    def _tell_failure(self, saved: Path, error: Exception) -> None:
        self.num_failed += 1
        log.warning("%s was not uploaded to %s: %s", saved.name, self.repo_id, reason(error, self._token))

    def _find_repository(self) -> None:
        """Make sure that the repository is there, and say what is."""
        is_new = False
        try:
            info = self._api.repo_info(self.repo_id, repo_type=self.repo_type, timeout=ANSWER_S)
        except RepositoryNotFoundError:
            is_new = True
            self._api.create_repo(
                self.repo_id,
                repo_type=self.repo_type,
                private=self.visibility != "public",
                exist_ok=True,
                space_sdk="static" if self.repo_type == "space" else None,  # the hub makes no space without one
            )
        self._is_found = True
        if is_new:
            visibility = self.visibility or "private"
            log.info("uploads: made %s (%s)", self.address, visibility)
            return
        visibility = "private" if getattr(info, "private", None) else "public"
        log.info("uploads: go to %s, which is there (%s)%s", self.address, visibility, self._present())
        if visibility != (self.visibility or visibility):
            log.warning(
                "--huggingface_repo_visibility %s has no effect: %s is there, and %s",
                *(self.visibility, self.repo_id, visibility),
            )

    def _present(self) -> str:
        """Return what is to be said of the folder in the repository."""
        if not self.folder_in_repo:
            return ""
        try:
            entries = list(self._api.list_repo_tree(self.repo_id, self.folder_in_repo, repo_type=self.repo_type))
        except EntryNotFoundError:
            return f", into the new folder {self.folder_in_repo}"
        return f", into {self.folder_in_repo}, which has {len(entries)} entries; those of the same names are replaced"


def start(options: HubOptions, saving: SavingOptions) -> Uploads | None:
    """Return what uploads the files of a run, None where nothing is to be; tells whether the repository is there."""
    if options.huggingface_repo_id is None:
        return None
    folder = Path(saving.output_dir or ".")
    remove_abandoned(folder, saving.output_name)
    uploads = Uploads(options, folder)
    uploads.start()
    return uploads


def download_state(text: str, token: str | None) -> Path:
    """Return the folder of a state that was downloaded, from --resume with --resume_from_huggingface.

    Raises: CheckpointError when it cannot be had, OptionError when text names no place.
    """
    place = hub_place(text)
    try:
        with nullcontext() if sys.stderr.isatty() else without_bars():
            snapshot = snapshot_download(
                place.repo_id,
                repo_type=place.repo_type,
                revision=place.revision,
                token=token,
                allow_patterns=[f"{escape(place.folder)}/{name}" for name in state.FILES],
            )
    except Exception as error:  # of whichever library carries the requests
        raise CheckpointError(
            f"--resume {text}: cannot be downloaded: {reason(error, token)}. Check the name, the network, and "
            "--huggingface_token."
        ) from None  # the original could show the token
    folder = Path(snapshot) / place.folder
    if not (folder / state.MANIFEST).is_file():
        raise CheckpointError(
            f"--resume {text}: {place.repo_id} has no {place.folder}/{state.MANIFEST}. Give a folder that "
            "--save_state_to_huggingface uploaded."
        )
    log.info("the state %s is here: %s", text, folder)
    return folder


def reason(error: Exception, token: str | None) -> str:
    """Return in one line what a request to the hub failed of; a token in it is blotted out."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".") if lines else ""
    server = getattr(error, "server_message", None)
    text = f"{text} ({server})" if server and server not in text else text
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    for secret in {token, get_token()} - {None, ""}:
        for form in (str(secret), repr(secret)[1:-1]):
            text = text.replace(form, "***")
    return " ".join(text.split())


def files_of(saved: Path) -> list[Path]:
    """Return the files of an upload: the one, or those in the folder and in its folders."""
    return sorted(file for file in saved.rglob("*") if file.is_file()) if saved.is_dir() else [saved]


def hold(saved: Path, folder: Path) -> Path:
    """Return a double of a file or folder, of the same name in a new folder; by links, which take no room.

    Raises: OSError.
    """
    waiting = Path(tempfile.mkdtemp(prefix=f".{saved.name}.", suffix=WAITING, dir=folder))
    try:
        double = waiting / saved.name
        for file in files_of(saved):
            target = double / file.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without links
                shutil.copyfile(file, target)
    except OSError:
        shutil.rmtree(waiting, ignore_errors=True)
        raise
    return double


def remove_abandoned(folder: Path, name: str | None) -> None:
    """Remove what a killed run of this name left waiting for its upload."""
    names = "|".join(re.escape(each) for each in ([name] if name else [EPOCH_NAME, STEP_NAME, FINAL_NAME]))
    left = re.compile(rf"\.({names})(-\d+|-step\d+)?(-state|\.\w+)?\.[^.]+{re.escape(WAITING)}")
    for waiting in folder.glob(f".*{WAITING}"):
        if left.fullmatch(waiting.name):
            shutil.rmtree(waiting, ignore_errors=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep huggingface_hub's bars from writing into that of the training."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
