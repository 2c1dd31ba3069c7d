"""The models of a run, loaded where they are needed: complete caches need neither VAE nor text encoders."""

from __future__ import annotations

import functools
import gc
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.models import float8
from library.models.family import Absent, Parts
from library.training import data as training_data
from library.training import text_cache
from library.training.text_cache import Texts

if TYPE_CHECKING:
    from library.cache.store import LatentStore
    from library.training.assembly import Setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The models of a run on the device, and what stands for those that are not needed."""

    parts: Parts
    latents: LatentStore | None  # None: images are encoded at each step
    texts: Texts | None  # None: captions are


def load(setting: Setting) -> Loaded:
    """Return the models and all that is to be cached; what only the caches needed has been let go."""
    options, family, formats = setting.options, setting.family, setting.checked.precision
    checkpoint = options.model.pretrained_model_name_or_path or ""
    if options.caching.cache_text_encoder_outputs and not options.network.base_weights:
        # text encoders may be larger than the denoiser: they are let go before it comes
        parts, texts = load_text(setting, Parts(Absent(), (), None))
        parts = replace(parts, denoiser=family.load_denoiser(checkpoint, formats.frozen))
    else:
        parts, texts = load_text(setting, Parts(family.load_denoiser(checkpoint, formats.frozen), (), None))
    log.info("loaded %s", checkpoint)
    family.set_attention(parts, "xformers" if options.training.xformers else "sdpa")
    vae, latents = load_vae(setting, parts)
    parts = replace(parts, vae=vae)
    settle_weights(setting, parts)
    return Loaded(parts, latents, texts)


def load_text(setting: Setting, parts: Parts) -> tuple[Parts, Texts | None]:
    """Return parts with the text encoders, or without them but with what they make of every caption.

    Args:
        setting: of the run.
        parts: the denoiser is needed only where --base_weights are merged, before captions are encoded.
    """
    options, family, formats = setting.options, setting.family, setting.checked.precision
    checkpoint = options.model.pretrained_model_name_or_path or ""
    if not options.caching.cache_text_encoder_outputs:
        return replace(parts, text_encoders=family.load_text_encoders(checkpoint, formats.frozen)), None
    data, prompts, accelerator = setting.checked.data, setting.checked.prompts, setting.accelerator
    pending = text_cache.survey(data, prompts, options, family, formats, accelerator)
    if pending.num_missing or options.network.base_weights:
        parts = replace(parts, text_encoders=family.load_text_encoders(checkpoint, formats.frozen))
        place_text_encoders(setting, parts)
        if options.network.base_weights:
            if not options.training.blocks_to_swap:
                parts.denoiser.to(accelerator.device)
            merge_base_weights(setting, parts)
    texts = text_cache.fill(pending, family, parts, formats.autocast, accelerator)
    is_loaded = bool(parts.text_encoders)
    kept = (
        family.beside_cache(parts.text_encoders) if is_loaded else family.load_beside_cache(checkpoint, formats.frozen)
    )
    parts = replace(parts, text_encoders=kept)
    gc.collect()  # modules that know of each other would stay until the collector comes by
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()  # once: the models to come are in pieces of other sizes
    return parts, texts


def load_vae(setting: Setting, parts: Parts) -> tuple[nn.Module | None, LatentStore | None]:
    """Return the VAE, None if nothing is left for it to do, and all latents if they are to be cached."""
    options, family, formats = setting.options, setting.family, setting.checked.precision
    model, device = options.model, setting.accelerator.device
    checkpoint = model.pretrained_model_name_or_path or ""

    @functools.cache
    def vae() -> nn.Module:
        return family.load_vae(checkpoint, model.vae, formats.vae).to(device)

    if not options.caching.cache_latents:
        return vae(), None
    encode = training_data.encoder(family, lambda: replace(parts, vae=vae()))
    identity = family.vae_identity(checkpoint, model.vae)
    latents = training_data.cache(
        setting.checked.data, options.caching, family.name, encode, formats.vae, identity, setting.accelerator
    )
    if not setting.checked.prompts:
        return None, latents
    return (vae() if model.lowram else vae().to("cpu")), latents


def settle_weights(setting: Setting, parts: Parts) -> None:
    """Give the frozen weights their place on the device, what is merged into them, and their format."""
    formats = setting.checked.precision
    has_merged = setting.options.caching.cache_text_encoder_outputs
    if has_merged or not setting.options.network.base_weights:
        # float8 before the move: the device never holds more than what it keeps
        for model in formats.float8_parts(parts):
            float8.store(model)
    blocks_to_swap, device = setting.options.training.blocks_to_swap, setting.accelerator.device
    place_text_encoders(setting, parts)
    if not blocks_to_swap:  # a denoiser that may be larger than the device is placed once the network is made
        parts.denoiser.to(device)
    if not has_merged:
        merge_base_weights(setting, parts)
        for model in formats.float8_parts(parts):
            float8.store(model)
    setting.family.fit_to(parts.denoiser, [config.resolution for config in setting.checked.data.configs])


def place_text_encoders(setting: Setting, parts: Parts) -> None:
    """Put each text encoder where it is to compute."""
    for index, text_encoder in enumerate(parts.text_encoders):
        text_encoder.to(setting.family.text_device(index, setting.accelerator.device))


def merge_base_weights(setting: Setting, parts: Parts) -> None:
    """Merge the files of --base_weights into the models, wherever they are."""
    setting.checked.method.merge_base_weights(setting.options, setting.family, parts)
