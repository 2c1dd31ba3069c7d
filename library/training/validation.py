"""The loss on images that are held back from training: the same draws each time, so that its values can be compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library import losses, noise
from library.progress import progress
from library.training import draws
from library.training.metrics import NUM_FIGURES, MaskFigures
from library.training.painting import random_states_kept

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.batch import Batch
    from library.options.noise import NoiseOptions
    from library.training.step import Losses, Step

log = logging.getLogger(__name__)

NUM_TIMESTEPS = 4  # at which each batch is looked at
MOST_NAMES = 5  # of images, in a message


@dataclass(frozen=True)
class Validator:
    """Measures the loss of the images held back; training goes on as if it had not."""

    accelerator: Accelerator
    step: Step  # as trained, not wrapped: the processes may have different numbers of batches
    latents_of: Callable[[Batch], Tensor]
    batches: Iterable[Batch]  # of this process, the same each time
    numbers: Sequence[int]  # of these batches, among those of all processes
    timesteps: Sequence[int]
    seed: int
    every_n_epochs: int = 1
    every_n_steps: int | None = None

    def is_step_due(self, step: int) -> bool:
        """Return whether the loss is due because of the number of optimizer steps done."""
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def is_epoch_due(self, epoch: int | None) -> bool:
        """Return whether the loss is due because an epoch (1-based) ends; None within an epoch."""
        return epoch is not None and epoch % self.every_n_epochs == 0

    def is_due(self, epoch: int | None, step: int) -> bool:
        """Return whether the loss is due for one reason or the other."""
        return self.is_step_due(step) or self.is_epoch_due(epoch)

    def run(self) -> tuple[float, MaskFigures | None]:
        """Return the mean loss over the images of all processes and over the timesteps, and that of their parts.

        Waits for the device.

        Dropout and averaged weights are the caller's to switch.
        """
        measured: list[tuple[tuple[str, ...], Tensor]] = []  # a batch's names, its losses (B,) over the timesteps
        figures: list[Tensor] = []
        with random_states_kept(), torch.no_grad():
            numbered = zip(self.numbers, self.batches, strict=True)
            for number, batch in progress(numbered, label="validation", total=len(self.numbers), unit="batch"):
                found = self._losses(number, batch.to(self.accelerator.device))
                measured.append((batch.names, torch.stack([each.per_image for each in found]).float().sum(dim=0)))
                figures += [each.figures.reshape(-1) for each in found if each.figures is not None]
        total = torch.zeros(2 + NUM_FIGURES, device=self.accelerator.device)  # sum of losses, their number, figures
        for _, per_image in measured:
            total[:2] += torch.stack([per_image.sum(), total.new_full((), len(per_image) * len(self.timesteps))])
        for each in figures:
            total[2:] += each
        if not total[0].isfinite():
            warn_of_broken(measured)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
        summed, count, *sums = total.tolist()
        return float(summed / count), MaskFigures.of_sums(sums)

    def _losses(self, number: int, batch: Batch) -> list[Losses]:
        """Return the losses of a batch at each timestep; pictures and text are encoded once for all of them."""
        torch.manual_seed(draws.seed_of("validation", self.seed, number))
        latents = self.latents_of(batch)
        with self.accelerator.autocast():
            text = self.step.encode_text(batch)
            clean = self.step.family.latent_space.normalise(latents)
            measured = []
            for timestep in self.timesteps:
                torch.manual_seed(draws.seed_of("validation", self.seed, number, timestep))
                timesteps = torch.full((len(clean),), timestep, device=clean.device)
                noised = self.step.objective.noise(clean, timesteps=timesteps)
                measured.append(self.step.losses_of(batch, noised, text))
        return measured


def warn_of_broken(measured: Sequence[tuple[tuple[str, ...], Tensor]]) -> None:
    """Name the images whose loss is not a finite number: training goes on, but the mean tells nothing."""
    broken = [name for names, per_image in measured for name, loss in zip(names, per_image.tolist(), strict=True)
              if not math.isfinite(loss)]  # fmt: skip
    more = f" and {len(broken) - MOST_NAMES} more" if len(broken) > MOST_NAMES else ""
    log.warning("validation: the loss is not a finite number for %s%s", ", ".join(broken[:MOST_NAMES]), more)


def timesteps_of(options: NoiseOptions) -> tuple[int, ...]:
    """Return the timesteps at which losses are measured, evenly spaced within those trained: 200, 400, 600, 800."""
    low, high = noise.timestep_range(options.min_timestep, options.max_timestep, losses.NUM_TIMESTEPS)
    return tuple(low + (high - low) * i // (NUM_TIMESTEPS + 1) for i in range(1, NUM_TIMESTEPS + 1))
