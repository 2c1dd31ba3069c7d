"""Preview pictures drawn with the models that are being trained, which notice nothing of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.batch import Batch
from library.training.prompts import SamplePrompt
from library.training.schedulers import build_scheduler, takes_generator

if TYPE_CHECKING:
    from library.cache.store import TextStore
    from library.models.family import ModelFamily, Parts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """How the models are to be run."""

    autocast_dtype: torch.dtype | None = None  # half precision of the denoiser and text encoders; None: as they are
    prediction_type: str = "epsilon"  # or "v_prediction" or "flow"
    zero_terminal_snr: bool = False  # the noise schedule ends in pure noise
    modules: tuple[nn.Module, ...] = ()  # further ones to be in evaluation mode meanwhile: the network being trained
    texts: TextStore | None = None  # prompts that were encoded while there were text encoders; None: there are


@dataclass(frozen=True)
class Painter:
    """Turns prompts into pictures with the models being trained."""

    family: ModelFamily
    parts: Parts
    device: torch.device
    drawing: Drawing

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put every model on the device and in evaluation mode; afterwards all is as it was, random states included."""
        assert self.parts.vae is not None, "a run with previews keeps its VAE"
        models = (self.parts.denoiser, *self.parts.text_encoders, self.parts.vae)
        text_devices = [self.family.text_device(i, self.device) for i in range(len(self.parts.text_encoders))]
        devices = (self.device, *text_devices, self.device)
        with ExitStack() as stack:
            stack.enter_context(random_states_kept())
            stack.enter_context(evaluating((*models, *self.drawing.modules)))
            for model, device in zip(models, devices, strict=True):
                stack.enter_context(placed(model, device))
            stack.enter_context(torch.no_grad())
            yield

    def paint(self, prompt: SamplePrompt, sampler: str) -> Image.Image:
        """Return the picture of a prompt, RGB, of its width and height."""
        seed = random.SystemRandom().getrandbits(32) if prompt.seed is None else prompt.seed
        generator = torch.Generator().manual_seed(seed)  # on the CPU: a seed gives one picture on every device
        latents = self._denoise(prompt, sampler, generator)
        pixels = self._decode(latents)
        if not bool(torch.isfinite(pixels).all()):
            log.warning("a preview picture holds no numbers (NaN); if the loss is fine, try --no_half_vae")
            pixels = pixels.nan_to_num(nan=-1.0)
        array = ((pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte()  # (H, W, 3)
        return Image.fromarray(array.numpy())

    def _denoise(self, prompt: SamplePrompt, sampler: str, generator: torch.Generator) -> Tensor:
        """Return the finished latents (1, C, h, w) as the denoiser's space has them."""
        captions = captions_of(prompt)
        is_guided = len(captions) > 1
        space = self.family.latent_space
        size = (prompt.height // space.reduction, prompt.width // space.reduction)
        scheduler = build_scheduler(sampler, self.drawing.prediction_type, self.drawing.zero_terminal_snr)
        scheduler.set_timesteps(prompt.sample_steps, device=self.device)
        own_noise = {"generator": generator} if takes_generator(scheduler) else {}
        dtype = self.drawing.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            text = self._text(captions)
            batch = _batch(captions, prompt).to(self.device)
            latents = torch.randn((1, space.channels, *size), generator=generator).to(self.device)
            latents = latents * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                noisy = scheduler.scale_model_input(latents, timestep).expand(len(captions), -1, -1, -1)
                output = self.family.predict(self.parts, noisy, timestep.expand(len(captions)), text, batch).float()
                if is_guided:
                    away, towards = output.chunk(2)
                    output = away + prompt.scale * (towards - away)
                latents = scheduler.step(output, timestep, latents, return_dict=False, **own_noise)[0]
        return latents

    def _text(self, captions: tuple[str, ...]) -> Any:
        """Return what the denoiser is told of captions: as cached, or as the text encoders say now."""
        if self.drawing.texts is None:
            return encode_prompts(self.family, self.parts, captions, self.device)
        outputs = {name: tensor.to(self.device) for name, tensor in self.drawing.texts.get(captions).items()}
        if self.family.caches_all_text:
            return self.family.text_of(outputs)
        return encode_prompts(self.family, self.parts, captions, self.device, outputs)

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the picture (1, 3, H, W) float32 on the CPU, about [-1, 1]; in the VAE's own precision."""
        vae: Any = self.parts.vae
        dtype = next(vae.parameters()).dtype
        decoded = vae.decode(self.family.latent_space.denormalise(latents).to(dtype), return_dict=False)
        pixels: Tensor = decoded[0].float().cpu()
        return pixels


def captions_of(prompt: SamplePrompt) -> tuple[str, ...]:
    """Return the texts that a picture needs, encoded together: what to move away from, if anything, and the prompt."""
    return (prompt.negative_prompt, prompt.prompt) if prompt.scale > 1 else (prompt.prompt,)


def encode_prompts(
    family: ModelFamily,
    parts: Parts,
    captions: Sequence[str],
    device: torch.device,
    known: Mapping[str, Tensor] | None = None,
) -> Any:
    """Return what the denoiser is told of captions, in as many windows as the longest needs.

    Args:
        family: that is trained.
        parts: with text encoders, on the device.
        captions: from `captions_of`.
        device: of the run.
        known: what the cache kept of the captions, for a family whose cache does not keep all.
    """
    wide = preview_family(family)
    tokens = shortest(wide.tokenize(captions), wide.tokenize([""])).to(device)
    return wide.encode_text(parts, tokens, known)


def preview_family(family: ModelFamily) -> ModelFamily:
    """Return the family with what previews always have: prompts of up to three windows, with (weights:1.2)."""
    assert is_dataclass(family)
    wanted = {"weighted_captions": True, "max_token_length": 225}
    known = {entry.name for entry in fields(family)}
    return replace(family, **{name: value for name, value in wanted.items() if name in known})


def shortest(tokens: Tensor, empty: Tensor) -> Tensor:
    """Return tokens (B, windows, ...) without the windows at the end that hold no text in any caption.

    Args:
        tokens: of the captions.
        empty: (1, windows, ...): the tokens of an empty caption.
    """
    count = tokens.shape[1]
    while count > 1 and bool((tokens[:, count - 1] == empty[:, count - 1]).all()):
        count -= 1
    return tokens[:, :count]


def _batch(captions: Sequence[str], prompt: SamplePrompt) -> Batch:
    """Return the batch that a training image of this size, uncropped, would come in."""
    count = len(captions)
    sizes = torch.tensor([[prompt.height, prompt.width]]).expand(count, 2)
    return Batch(
        names=("preview",) * count,
        captions=tuple(captions),
        tokens=None,
        images=None,
        latents=None,
        masks=None,
        weights=torch.ones(count),
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
    )


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the states of torch's (CPU and CUDA), numpy's and Python's global random generators afterwards."""
    on_cpu, in_numpy, in_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        np.random.set_state(in_numpy)
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
