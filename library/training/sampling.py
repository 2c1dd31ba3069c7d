"""Preview pictures during training: when they are due, how they are drawn, under which names they are saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.progress import progress
from library.training.painting import Drawing, Painter
from library.training.prompts import SIDE, SIDE_STEP, SamplePrompt, read_prompts
from library.training.saving import saved_file
from library.training.schedulers import SAMPLERS, check_sampler

if TYPE_CHECKING:
    from library.models.family import ModelFamily, Parts
    from library.options.sampling import SamplingOptions
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)


def check(options: SamplingOptions, side: int = SIDE, multiple: int = SIDE_STEP) -> list[SamplePrompt]:
    """Return the prompts to be drawn, none when no previews are asked for; to be called before anything slow.

    Args:
        options: the sampling group.
        side: pixels, of pictures whose prompts name no size.
        multiple: pixels; sides are made smaller to be multiples of it.

    Raises: DataError for a prompt file that cannot be read, OptionError for an unknown sampler in it.
    """
    if not options.sample_prompts:
        return []
    if not (options.sample_at_first or options.sample_every_n_epochs or options.sample_every_n_steps):
        return []
    prompts = [
        replace(prompt, width=prompt.width // multiple * multiple, height=prompt.height // multiple * multiple)
        for prompt in read_prompts(Path(options.sample_prompts), side)
    ]
    for number, prompt in enumerate(prompts, start=1):
        if prompt.sample_sampler:
            check_sampler(prompt.sample_sampler, f"{options.sample_prompts}: prompt {number}")
    return prompts


@dataclass(frozen=True)
class Sample:
    """A preview picture that was drawn and saved."""

    path: Path
    index: int  # of its prompt
    prompt: SamplePrompt
    step: int
    epoch: int | None  # None: drawn because of the step


class Sampler:
    """Draws the preview pictures of one process."""

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        options: SamplingOptions,
        folder: Path,
        name: str | None,
        painter: Painter,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Keep what is needed to draw.

        Args:
            prompts: of all processes.
            options: the sampling group: when, and with which sampler.
            folder: the output folder; pictures go into its folder "sample".
            name: --output_name, the beginning of the pictures' names.
            painter: turns a prompt into a picture.
            share: this process's index and the number of processes; prompts are dealt out in turn.
        """
        index, count = share
        self.prompts = [(i, prompt) for i, prompt in enumerate(prompts) if i % count == index]
        self.every_n_epochs = options.sample_every_n_epochs
        self.every_n_steps = options.sample_every_n_steps
        self.at_first = options.sample_at_first
        self.sampler_name = options.sample_sampler
        self.folder = folder / "sample"
        self.name = name
        self.painter = painter
        self.made: list[Sample] = []  # by this process, oldest first

    @classmethod
    def from_options(
        cls,
        prompts: Sequence[SamplePrompt],
        options: SamplingOptions,
        saving: SavingOptions,
        family: ModelFamily,
        parts: Parts,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        drawing: Drawing | None = None,
    ) -> Sampler | None:
        """Return the sampler that the options ask for, None if there is nothing to draw.

        Args:
            prompts: from `check`.
            options: when and with which sampler.
            saving: output_dir and output_name.
            family: encodes prompts, predicts, knows its latent space.
            parts: the models as trained, not wrapped by accelerate.
            device: where to draw; models that stand elsewhere are moved there and back.
            share: this process's index and the number of processes.
            drawing: precision, prediction type and the like.
        """
        if not prompts:
            return None
        drawing = drawing or Drawing()
        if drawing.prediction_type == "flow" and any(prompt.sample_sampler for prompt in prompts):
            log.warning("samplers that prompts name (--ss) have no effect: a flow is always drawn with Euler's method")
        if drawing.zero_terminal_snr:
            for name in sorted({check_sampler(prompt.sample_sampler or options.sample_sampler) for prompt in prompts}):
                if not SAMPLERS[name].knows_zero_snr:
                    log.warning(
                        "sampler %s cannot start from pure noise (--zero_terminal_snr); try ddim or euler", name
                    )
        painter = Painter(family, parts, device, drawing)
        return cls(prompts, options, Path(saving.output_dir or "."), saving.output_name, painter, share)

    def is_due_at_start(self) -> bool:
        """Return whether pictures are wanted before the first step."""
        return self.at_first

    def is_due(self, epoch: int | None, step: int) -> bool:
        """Return whether pictures are due after optimizer step `step` (1-based); epochs beat steps.

        Args:
            epoch: the epoch (1-based) that ends with this step; None within an epoch.
            step: optimizer steps done.
        """
        if self.every_n_epochs is not None:
            return epoch is not None and epoch % self.every_n_epochs == 0
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def sample(self, epoch: int | None, step: int) -> list[Path]:
        """Draw and save this process's pictures; return their files, in the order of the prompts.

        Training continues as if nothing had been drawn: the states of all random generators, the modes and the places
        of all modules are as before.
        """
        by_epoch = epoch is not None and (self.every_n_epochs is not None or step == 0)
        stamp = f"e{epoch:06d}" if by_epoch else f"{step:06d}"
        made = []
        with self.painter.ready():
            for index, prompt in progress(self.prompts, label="sample", unit="image"):
                image = self.painter.paint(prompt, prompt.sample_sampler or self.sampler_name)
                path = self.folder / f"{file_stem(self.name, stamp, index, prompt.seed)}.png"
                _save(image, path, prompt)
                made.append(Sample(path, index, prompt, step, epoch if by_epoch else None))
        self.made += made
        return [sample.path for sample in made]


def file_stem(name: str | None, stamp: str, index: int, seed: int | None) -> str:
    """Return name_e000002_00_20261122041500_42: run, epoch or step, prompt, local time, seed."""
    parts = [name, stamp, f"{index:02d}", time.strftime("%Y%m%d%H%M%S"), None if seed is None else str(seed)]
    return "_".join(part for part in parts if part)


def _save(image: Image.Image, path: Path, prompt: SamplePrompt) -> None:
    """Write a PNG that carries its prompt, as viewers of generated pictures read it."""
    info = PngInfo()
    settings = f"Steps: {prompt.sample_steps}, CFG scale: {prompt.scale:g}, Size: {prompt.width}x{prompt.height}"
    seed = "" if prompt.seed is None else f", Seed: {prompt.seed}"
    info.add_itxt("parameters", f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\n{settings}{seed}")
    with saved_file(path) as partial:
        image.save(partial, pnginfo=info)
