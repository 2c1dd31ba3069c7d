"""When a run's state is saved, under which names, and which older ones go."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.training import state
from library.training.saving import Saver, step_to_remove
from library.whole_file import MARK

if TYPE_CHECKING:
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)

GONE = ".gone"  # the ending of a state that is being removed

Write = Callable[[Path, int, int], None]  # to a folder, after a step, in an epoch


class StateSaver:
    """Writes states beside the saved files, with the rotation that the options ask for."""

    def __init__(
        self,
        options: SavingOptions,
        saver: Saver,
        write: Write,
        is_main_process: bool,
        publish: Callable[[Path], None] | None = None,
    ) -> None:
        """Keep what is needed to save.

        Args:
            options: the saving group.
            saver: names the files, and with them the states.
            write: writes the state of the run, as it is, to a folder.
            is_main_process: the others write nothing.
            publish: is told of each state that was saved; None: nobody is.
        """
        self.is_periodic = options.save_state and is_main_process
        self.is_at_end = (options.save_state or options.save_state_on_train_end) and is_main_process
        self.keep_epochs = options.save_last_n_epochs_state or options.save_last_n_epochs
        self.keep_steps = options.save_last_n_steps_state or options.save_last_n_steps
        self._saver = saver
        self._write = write
        self._publish = publish
        if self.is_at_end:
            remove_abandoned(saver)

    def save_epoch(self, step: int, epoch: int) -> None:
        """Save the state at the end of an epoch, then remove the one that is no longer wanted."""
        if not self.is_periodic:
            return
        self._save(self._saver.epoch_path(epoch), step, epoch)
        if self.keep_epochs is not None and self._saver.every_n_epochs is not None:
            self._remove(self._saver.epoch_path(epoch - self._saver.every_n_epochs * self.keep_epochs))

    def save_step(self, step: int, epoch: int) -> None:
        """Save the state after a step, then remove the one that is no longer wanted."""
        if not self.is_periodic:
            return
        self._save(self._saver.step_path(step), step, epoch)
        if self.keep_steps is not None and self._saver.every_n_steps is not None:
            self._remove(self._saver.step_path(step_to_remove(step, self._saver.every_n_steps, self.keep_steps)))

    def save_final(self, step: int, epoch: int) -> None:
        """Save the state of the finished run."""
        if self.is_at_end:
            self._save(self._saver.final_path(), step, epoch)

    def save_interrupted(self, step: int, epoch: int) -> None:
        """Save the state of a run that was stopped."""
        if self.is_at_end:
            self._save(self._saver.step_path(step), step, epoch)

    def _save(self, file: Path, step: int, epoch: int) -> None:
        folder = state_folder(file)
        self._write(folder, step, epoch)
        log.info("saved the state of step %d: %s", step, folder)
        if self._publish is not None:
            self._publish(folder)

    def _remove(self, file: Path) -> None:
        folder = state_folder(file)
        if (folder / state.MANIFEST).is_file():
            gone = folder.with_name(f".{folder.name}{GONE}")  # a kill must not leave half a state under its name
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            log.info("removed %s (only the last ones are kept)", folder)


def remove_abandoned(saver: Saver) -> None:
    """Remove what a killed run of this name left half written or half removed; other runs share the folder."""
    names = (
        re.escape(saver.final_path().stem),
        re.escape(saver.step_path(0).stem.removesuffix("0" * 8)) + r"\d{8,}",
        re.escape(saver.epoch_path(0).stem.removesuffix("0" * 6)) + r"\d{6,}",
    )
    abandoned = re.compile(rf"\.({'|'.join(names)})-state({re.escape(GONE)}|\.\d+{re.escape(MARK)})")
    for left in saver.folder.iterdir():
        if abandoned.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


def state_folder(file: Path) -> Path:
    """Return the folder of the state that is saved with a file: name-step00000100-state."""
    return file.with_name(f"{file.stem}-state")
