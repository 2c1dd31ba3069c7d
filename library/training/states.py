"""When a run's state is saved, under which names, and which older ones go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from library.training import state
from library.training.saving import Saver, step_to_remove
from library.whole_file import remove_folder

if TYPE_CHECKING:
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)

STATE = "-state"  # ends the name of a state's folder

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
        *,
        is_shared_out: bool = False,
    ) -> None:
        """Keep what is needed to save.

        Args:
            options: the saving group.
            saver: names the files, and with them the states.
            write: writes the state of the run, as it is, to a folder.
            is_main_process: the others write nothing.
            publish: is told of each state that was saved; None: nobody is.
            is_shared_out: whether all processes are needed to put the state together.
        """
        is_needed = is_main_process or is_shared_out
        self.is_periodic = options.save_state and is_needed
        self.is_at_end = (options.save_state or options.save_state_on_train_end) and is_needed
        self.keep_epochs = options.save_last_n_epochs_state or options.save_last_n_epochs
        self.keep_steps = options.save_last_n_steps_state or options.save_last_n_steps
        self._saver = saver
        self._write = write
        self._publish = publish
        self._is_main_process = is_main_process
        if self.is_at_end and is_main_process:
            saver.remove_abandoned(STATE)

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
        folder = state_folder(file, self._saver.suffix)
        self._write(folder, step, epoch)
        if not self._is_main_process:
            return
        log.info("saved the state of step %d: %s", step, folder)
        if self._publish is not None:
            self._publish(folder)

    def _remove(self, file: Path) -> None:
        folder = state_folder(file, self._saver.suffix)
        if self._is_main_process and (folder / state.MANIFEST).is_file():
            remove_folder(folder)
            log.info("removed %s (only the last ones are kept)", folder)


def state_folder(file: Path, suffix: str) -> Path:
    """Return the folder of the state that is saved with a file of this suffix: name-step00000100-state."""
    return file.with_name(f"{file.name.removesuffix(suffix)}{STATE}")
