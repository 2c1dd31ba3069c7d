"""Whether what a run writes fits on the disk, told when it starts and not when the first file is to be saved."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from library.training.loop import Run

log = logging.getLogger(__name__)

STATE_SIZE = 3  # times the trained weights: themselves, and Adam's two moments of each


def warn_if_short(run: Run, dtype: torch.dtype | None) -> None:
    """Log a warning if the output folder's disk has less room than the files and states of the run will take.

    Args:
        run: not begun.
        dtype: of the weights in saved files; None: as trained.
    """
    weights = run.trainee.weights().values()
    file_bytes = sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in weights)
    state_bytes = STATE_SIZE * sum(weight.nbytes for weight in weights)
    state_bytes += 0 if run.average is None else sum(4 * weight.numel() for weight in weights)
    num_files = _most(run, run.saver.keep_epochs, run.saver.keep_steps) + 1
    num_states = _most(run, run.states.keep_epochs, run.states.keep_steps) if run.states.is_periodic else 0
    num_states += run.states.is_at_end
    num_files *= 1 + len(run.saver.companions)
    needed = num_files * file_bytes + num_states * state_bytes
    try:
        free = shutil.disk_usage(run.saver.folder).free
    except OSError:
        return
    if free < needed:
        files = f"{num_files} file{'s' * (num_files > 1)}"
        states = f" and {num_states} state{'s' * (num_states > 1)}" if num_states else ""
        log.warning(
            "--output_dir %s: %s MB are free there, and this run writes about %s MB (%s%s). "
            "Make room, or save less often.",
            *(run.saver.folder, f"{free / 1e6:,.0f}", f"{needed / 1e6:,.0f}", files, states),
        )


def _most(run: Run, keep_epochs: int | None, keep_steps: int | None) -> int:
    """Return how many of the periodic saves are there at once at the most, one more than are kept."""
    saver = run.saver
    steps = sum(saver.is_step_due(step) for step in range(run.steps_done + 1, run.max_train_steps))
    if keep_steps is not None and saver.every_n_steps is not None:
        steps = min(steps, keep_steps // saver.every_n_steps + 2)
    first_epoch = run.steps_done // run.plan.steps_per_epoch + 1
    epochs = sum(saver.is_epoch_due(epoch) for epoch in range(first_epoch, run.num_epochs + 1))
    return steps + (epochs if keep_epochs is None else min(epochs, keep_epochs + 1))
