"""Preview pictures during training: when they are due, how they are drawn, under which names they are saved."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from library.batch import Batch
from library.errors import OptionError
from library.progress import progress
from library.training.prompts import SamplePrompt, read_prompts
from library.training.saving import whole_file
from library.training.schedulers import SAMPLERS, build_scheduler, check_sampler, takes_generator

if TYPE_CHECKING:
    from library.models.family import ModelFamily, Parts
    from library.options.sampling import SamplingOptions
    from library.options.saving import SavingOptions

log = logging.getLogger(__name__)


def check(options: SamplingOptions) -> list[SamplePrompt]:
    """Return the prompts to be drawn, none when no previews are asked for; to be called before anything slow.

    Raises: OptionError when previews are asked for without prompts or with an unknown sampler, DataError for a prompt
        file that cannot be read.
    """
    asked = [
        f"--{name}"
        for name in ("sample_at_first", "sample_every_n_epochs", "sample_every_n_steps")
        if (getattr(options, name) or 0) > 0
    ]
    if not asked:
        if options.sample_prompts:
            log.warning("--sample_prompts is given, but no --sample_every_n_epochs, _steps or --sample_at_first")
        return []
    if not options.sample_prompts:
        raise OptionError(f"{asked[0]} needs --sample_prompts FILE, the prompts of the preview pictures.")
    check_sampler(options.sample_sampler)
    prompts = read_prompts(Path(options.sample_prompts))
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
        self.every_n_epochs = _interval(options.sample_every_n_epochs)
        self.every_n_steps = _interval(options.sample_every_n_steps)
        self.at_first = options.sample_at_first
        self.sampler_name = options.sample_sampler
        self.folder = folder / "sample"
        self.name = name
        self.painter = painter
        self.made: list[Sample] = []  # by this process, oldest first

    @classmethod
    def from_options(
        cls,
        options: SamplingOptions,
        saving: SavingOptions,
        family: ModelFamily,
        parts: Parts,
        device: torch.device,
        process_index: int = 0,
        num_processes: int = 1,
        *,
        autocast_dtype: torch.dtype | None = None,
        prediction_type: str = "epsilon",
        zero_terminal_snr: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> Sampler | None:
        """Return the sampler that the options ask for, None if they ask for no previews.

        Args:
            options: when, what and with which sampler.
            saving: output_dir and output_name.
            family: encodes prompts, predicts, knows its latent space.
            parts: the models as trained, not wrapped by accelerate.
            device: where to draw; models that stand elsewhere are moved there and back.
            process_index: of this process.
            num_processes: that share the prompts.
            autocast_dtype: half precision of the denoiser and text encoders; None: as they are.
            prediction_type: "epsilon" or "v_prediction".
            zero_terminal_snr: the noise schedule ends in pure noise.
            modules: further modules to be in evaluation mode meanwhile, such as the network being trained.
        """
        prompts = check(options)
        if not prompts:
            return None
        if zero_terminal_snr:
            for name in sorted({check_sampler(prompt.sample_sampler or options.sample_sampler) for prompt in prompts}):
                if not SAMPLERS[name].knows_zero_snr:
                    log.warning(
                        "sampler %s cannot start from pure noise (--zero_terminal_snr); try ddim or euler", name
                    )
        painter = Painter(family, parts, device, autocast_dtype, prediction_type, zero_terminal_snr, tuple(modules))
        share = (process_index, num_processes)
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
        total = sum(prompt.sample_steps for _, prompt in self.prompts)
        made = []
        with self.painter.ready(), progress(label="sample", total=total, unit="step") as bar:
            for index, prompt in self.prompts:
                image = self.painter.paint(prompt, prompt.sample_sampler or self.sampler_name, bar.update)
                path = self.folder / f"{file_stem(self.name, stamp, index, prompt.seed)}.png"
                _save(image, path, prompt)
                made.append(Sample(path, index, prompt, step, epoch if by_epoch else None))
        self.made += made
        return [sample.path for sample in made]


def file_stem(name: str | None, stamp: str, index: int, seed: int | None) -> str:
    """Return name_e000002_00_20261122041500_42: run, epoch or step, prompt, local time, seed."""
    parts = [name, stamp, f"{index:02d}", time.strftime("%Y%m%d%H%M%S"), None if seed is None else str(seed)]
    return "_".join(part for part in parts if part)


@dataclass(frozen=True)
class Painter:
    """Turns prompts into pictures with the models being trained."""

    family: ModelFamily
    parts: Parts
    device: torch.device
    autocast_dtype: torch.dtype | None
    prediction_type: str
    zero_terminal_snr: bool
    modules: tuple[nn.Module, ...] = ()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put every model on the device and in evaluation mode; afterwards all is as it was, random states included."""
        models = (self.parts.denoiser, *self.parts.text_encoders, self.parts.vae)
        with ExitStack() as stack:
            stack.enter_context(random_states_kept())
            stack.enter_context(evaluating((*models, *self.modules)))
            for model in models:
                stack.enter_context(placed(model, self.device))
            stack.enter_context(torch.no_grad())
            yield

    def paint(self, prompt: SamplePrompt, sampler: str, advance: Any = lambda count: None) -> Image.Image:
        """Return the picture of a prompt, RGB, of its width and height; advance(1) is called after each step."""
        seed = random.SystemRandom().getrandbits(32) if prompt.seed is None else prompt.seed
        generator = torch.Generator().manual_seed(seed)  # on the CPU: a seed gives one picture on every device
        latents = self._denoise(prompt, sampler, generator, advance)
        pixels = self._decode(latents)
        if not bool(torch.isfinite(pixels).all()):
            log.warning("a preview picture holds no numbers (NaN); if the loss is fine, try --no_half_vae")
            pixels = pixels.nan_to_num(nan=-1.0)
        array = ((pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte()  # (H, W, 3)
        return Image.fromarray(array.numpy())

    def _denoise(self, prompt: SamplePrompt, sampler: str, generator: torch.Generator, advance: Any) -> Tensor:
        """Return the finished latents (1, C, h, w) as the denoiser's space has them."""
        is_guided = prompt.scale > 1
        captions = [prompt.negative_prompt, prompt.prompt] if is_guided else [prompt.prompt]
        space = self.family.latent_space
        size = (prompt.height // space.reduction, prompt.width // space.reduction)
        scheduler = build_scheduler(sampler, self.prediction_type, self.zero_terminal_snr)
        scheduler.set_timesteps(prompt.sample_steps, device=self.device)
        own_noise = {"generator": generator} if takes_generator(scheduler) else {}
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            tokens = self.family.tokenize(captions).to(self.device)
            text = self.family.encode_text(self.parts, tokens)
            batch = _batch(captions, tokens, prompt).to(self.device)
            latents = torch.randn((1, space.channels, *size), generator=generator).to(self.device)
            latents = latents * scheduler.init_noise_sigma
            for position, timestep in enumerate(scheduler.timesteps):
                noisy = scheduler.scale_model_input(latents, timestep).expand(len(captions), -1, -1, -1)
                output = self.family.predict(self.parts, noisy, timestep.expand(len(captions)), text, batch).float()
                if is_guided:
                    away, towards = output.chunk(2)
                    output = away + prompt.scale * (towards - away)
                latents = scheduler.step(output, timestep, latents, return_dict=False, **own_noise)[0]
                if (position + 1) % scheduler.order == 0:
                    advance(1)
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the picture (1, 3, H, W) float32 on the CPU, about [-1, 1]; in the VAE's own precision."""
        dtype = next(self.parts.vae.parameters()).dtype
        decoded = self.parts.vae.decode(self.family.latent_space.denormalise(latents).to(dtype), return_dict=False)
        return decoded[0].float().cpu()


def _batch(captions: Sequence[str], tokens: Tensor, prompt: SamplePrompt) -> Batch:
    """Return the batch that a training image of this size, uncropped, would come in."""
    count = len(captions)
    sizes = torch.tensor([[prompt.height, prompt.width]]).expand(count, 2)
    return Batch(
        names=("preview",) * count,
        captions=tuple(captions),
        tokens=tokens,
        images=None,
        latents=None,
        masks=None,
        weights=torch.ones(count),
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
    )


def _save(image: Image.Image, path: Path, prompt: SamplePrompt) -> None:
    """Write a PNG that carries its prompt, as viewers of generated pictures read it."""
    info = PngInfo()
    settings = f"Steps: {prompt.sample_steps}, CFG scale: {prompt.scale:g}, Size: {prompt.width}x{prompt.height}"
    seed = "" if prompt.seed is None else f", Seed: {prompt.seed}"
    info.add_itxt("parameters", f"{prompt.prompt}\nNegative prompt: {prompt.negative_prompt}\n{settings}{seed}")
    with whole_file(path) as partial:
        image.save(partial, pnginfo=info)


def _interval(every: int | None) -> int | None:
    """Return the interval, None where it is off; as sd-scripts: 0 and less switch it off."""
    return every if every is not None and every > 0 else None


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the states of torch's (CPU and CUDA), numpy's and Python's global random generators afterwards."""
    on_cpu, in_numpy, in_python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        np.random.set_state(in_numpy)  # noqa: NPY002
        random.setstate(in_python)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode; afterwards each of their submodules is in the mode it had before."""
    before = {submodule: submodule.training for module in modules for submodule in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for submodule, mode in before.items():
            submodule.training = mode


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put module on device; afterwards it stands where it stood before."""
    parameter = next(module.parameters(), None)
    before = device if parameter is None else parameter.device
    if before.type != device.type:
        module.to(device)
    try:
        yield
    finally:
        if before.type != device.type:
            module.to(before)
