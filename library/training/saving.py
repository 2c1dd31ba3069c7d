"""Which files a run leaves: when, under which names, written whole or not at all."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from library.errors import OptionError, UserError
from library.whole_file import check_writable, flush_to_disk, whole_file

if TYPE_CHECKING:
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)

EPOCH_NAME, STEP_NAME, FINAL_NAME = "epoch", "at", "last"  # where --output_name is not given

SAVE_DTYPES: Mapping[str | None, torch.dtype | None] = {
    None: None,  # as trained
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

Write = Callable[[Path, dict[str, str]], None]


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """Return the dtype of saved tensors; None: as they are in memory."""
    if save_precision not in SAVE_DTYPES:
        choices = ", ".join(name for name in SAVE_DTYPES if name)
        raise OptionError(f"--save_precision must be one of {choices}, got {save_precision}.")
    return SAVE_DTYPES[save_precision]


def check_output(options: SavingOptions) -> Path:
    """Return the output folder, made and found writable; to be called before anything slow.

    Raises: OptionError when no folder or an unusable name is given, UserError when the folder cannot be written to.
    """
    if not options.output_dir:
        raise OptionError("--output_dir is missing: say in which folder the result is to be saved.")
    name = options.output_name
    if name is not None and (not name.strip() or Path(name).name != name or "\\" in name or name == ".."):
        raise OptionError(f"--output_name must be a plain file name, got '{name}'. Put folders in --output_dir.")
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written to: {error.strerror or error}.") from error
    return folder


def check_folder(option: str, place: str) -> None:
    """Raise UserError if the folder of an option, made when missing, cannot be written to."""
    try:
        check_writable(Path(place))
    except OSError as error:
        raise UserError(f"{option} {place} cannot be written to: {error.strerror or error}.") from None


@contextmanager
def saved_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes path's place when it is written and on the disk.

    Raises: UserError when the disk is full or the folder cannot be written to; then path is as it was.
    """
    try:
        with whole_file(path) as partial:
            yield partial
            flush_to_disk(partial)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _is_write_failure(error):
            raise
        raise UserError(_cannot_save(path, error)) from error


# how safetensors and torch (whose zip writer has no error of its own) tell of a full disk
WRITE_FAILURES = ("I/O error", "IoError", "No space left", "os error", "iostream error", "inline_container")


def _is_write_failure(error: Exception) -> bool:
    """Return whether a writer's own error wraps one of the operating system: a full disk, a file too large."""
    return any(sign in str(error) for sign in WRITE_FAILURES)


def _cannot_save(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    try:
        free = f" {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there."
    except OSError:
        free = ""
    return f"{path} cannot be saved: {reason}.{free} Make room or choose another --output_dir; no half file is left."


@dataclass(frozen=True)
class Companion:
    """A further file beside each that is saved, of the same format: written, told of and removed with it."""

    mark: str  # behind the name and before the ending: name_ema.safetensors
    write: Write


class Saver:
    """Writes the network at the times, under the names and with the rotation that the options ask for."""

    def __init__(
        self,
        options: SavingOptions,
        write: Write,
        metadata: Callable[[int, int], dict[str, str]],
        num_epochs: int,
        is_main_process: bool = True,
        publish: Callable[[Path], None] | None = None,
        companions: Sequence[Companion] = (),
    ) -> None:
        """Keep what is needed to save.

        Args:
            options: the saving group; output_dir was checked by check_output.
            write: writes the network to a path with metadata (Trainee.save); the path's suffix says the format.
            metadata: gives the metadata of a file saved at (step, epoch).
            num_epochs: epochs of the whole run; sets the interval for --save_n_epoch_ratio.
            is_main_process: the others write nothing.
            publish: is told of each file that was saved; None: nobody is.
            companions: what else is written beside each file.
        """
        self.folder = check_output(options)
        self.name = options.output_name
        self.suffix = f".{options.save_model_as or 'safetensors'}"
        self.every_n_epochs = epoch_interval(options.save_every_n_epochs, options.save_n_epoch_ratio, num_epochs)
        self.every_n_steps = options.save_every_n_steps
        self.keep_epochs = options.save_last_n_epochs
        self.keep_steps = options.save_last_n_steps
        self.num_epochs = num_epochs
        self.saved: list[Path] = []  # what this run has written and not rotated away, oldest first
        self._write = write
        self._metadata = metadata
        self._is_main_process = is_main_process
        self._publish = publish
        self.companions = companions

    def is_epoch_due(self, epoch: int) -> bool:
        """Return whether the end of epoch (1-based) asks for a file; the last epoch's is the final one."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0 and epoch < self.num_epochs

    def is_step_due(self, step: int) -> bool:
        """Return whether the optimizer step (1-based) asks for a file."""
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def epoch_path(self, epoch: int) -> Path:
        """Return the file of an epoch: name-000002.safetensors."""
        return self.folder / f"{self.name or EPOCH_NAME}-{epoch:06d}{self.suffix}"

    def step_path(self, step: int) -> Path:
        """Return the file of a step: name-step00000100.safetensors."""
        return self.folder / f"{self.name or STEP_NAME}-step{step:08d}{self.suffix}"

    def final_path(self) -> Path:
        """Return the file of the whole run: name.safetensors."""
        return self.folder / f"{self.name or FINAL_NAME}{self.suffix}"

    def save_epoch(self, epoch: int, step: int) -> Path:
        """Save the end of an epoch, then remove the one that is no longer wanted; return the file."""
        path = self._save(self.epoch_path(epoch), step, epoch)
        if self.keep_epochs is not None and self.every_n_epochs is not None:
            old_epoch = epoch - self.every_n_epochs * self.keep_epochs
            if old_epoch > 0:
                self._remove(self.epoch_path(old_epoch), new=path)
        return path

    def save_step(self, step: int, epoch: int) -> Path:
        """Save a step of epoch (1-based), then remove the one that is no longer wanted; return the file."""
        path = self._save(self.step_path(step), step, epoch - 1)  # as sd-scripts: ss_epoch counts finished epochs here
        if self.keep_steps is not None and self.every_n_steps is not None:
            old_step = step_to_remove(step, self.every_n_steps, self.keep_steps)
            if old_step > 0:
                self._remove(self.step_path(old_step), new=path)
        return path

    def save_final(self, step: int, epoch: int) -> Path:
        """Save the result of the whole run; return the file."""
        return self._save(self.final_path(), step, epoch)

    def save_interrupted(self, step: int, epoch: int) -> Path:
        """Save a run that was stopped, named after its last step; return the file."""
        return self._save(self.step_path(step), step, epoch - 1)

    def _save(self, path: Path, step: int, epoch: int) -> Path:
        if self._is_main_process:
            self._write_one(path, self._write, step, epoch)
            for each in self.companions:
                self._write_one(self.beside(path, each.mark), each.write, step, epoch)
        return path

    def _write_one(self, path: Path, write: Write, step: int, epoch: int) -> None:
        with saved_file(path) as partial:
            write(partial, self._metadata(step, epoch))
        self.saved = [other for other in self.saved if other != path] + [path]
        log.info("saved %s (%.1f MB, step %d)", path, path.stat().st_size / 1e6, step)
        if self._publish is not None:
            self._publish(path)

    def beside(self, path: Path, mark: str) -> Path:
        """Return the companion of a file: name-000002_ema.safetensors for name-000002.safetensors."""
        return path.with_name(f"{path.name.removesuffix(self.suffix)}{mark}{self.suffix}")

    def _remove(self, path: Path, new: Path) -> None:
        """Remove a file of this naming and its companions, older than new and no longer to be kept."""
        if not self._is_main_process or path == new:
            return
        for each in (path, *(self.beside(path, companion.mark) for companion in self.companions)):
            self._remove_one(each)

    def _remove_one(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            path.unlink()
        except OSError as error:
            log.warning("%s is no longer needed but cannot be removed: %s", path, error.strerror)
            return
        self.saved = [other for other in self.saved if other != path]
        log.info("removed %s (only the last ones are kept)", path)


def epoch_interval(every_n_epochs: int | None, ratio: int | None, num_epochs: int) -> int | None:
    """Return after how many epochs a file is due; ratio (files a run) is the stronger of the two; None: never."""
    if ratio is not None and ratio > 0:
        return max(1, num_epochs // ratio)
    return every_n_epochs


def step_to_remove(step: int, every: int, keep: int) -> int:
    """Return the step whose file is out of date at step: the last multiple of every that is keep + 1 or more before.

    keep counts steps, not files; every 10, keep 30: step 50 removes step 10. Negative results name no file.
    """
    oldest = step - keep - 1
    return oldest - oldest % every
