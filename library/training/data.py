"""The training data of a run: read and checked before any model is loaded, then dealt out in batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.dataset import (
    config,
    cut_settings,
    latents,
    mask_settings,
    mask_shares,
    own_class,
    plan,
    problems,
    scan,
    texts,
)
from library.dataset.latents import LatentSettings
from library.dataset.loader import BatchLoader, DrawnImages, LoaderSettings, make_loader
from library.errors import OptionError
from library.inspection.inspect import warnings_at_start

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.batch import Batch
    from library.cache.fill import Encoder
    from library.cache.store import LatentStore, TextStore
    from library.dataset.config import DatasetConfig
    from library.dataset.plan import Draw, RunPlan
    from library.dataset.scan import Sample
    from library.models.family import ModelFamily, Parts
    from library.options import Options
    from library.options.caching import CachingOptions

log = logging.getLogger(__name__)

MOST_DOUBTS = 5  # lines about the data set


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held back."""

    configs: tuple[DatasetConfig, ...]
    samples: tuple[Sample, ...]
    validation: tuple[Sample, ...] = ()  # never trained on

    @property
    def all_samples(self) -> tuple[Sample, ...]:
        """Return both: the indices of latents are those of this list."""
        return self.samples + self.validation

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask, of those trained on."""
        return any(sample.mask.kind != "none" for sample in self.samples)

    @property
    def users_of_untrained(self) -> tuple[str, ...]:
        """The settings that compare images with what the models predicted before the training; none: it is not asked.

        Validation holds nothing to it, but measures by the targets of training.
        """
        preserved = any(sample.subset.diff_output_preservation for sample in self.all_samples)
        held = any(sample.subset.mask_prior_weight and sample.mask.kind != "none" for sample in self.samples)
        names = {"diff_output_preservation": preserved, "mask_prior_weight": held}
        return tuple(name for name, is_used in names.items() if is_used)


@dataclass(frozen=True)
class Stores:
    """What is cached of the data."""

    latents: LatentStore | None = None  # None: images are encoded at each step
    texts: TextStore | None = None  # None: captions are


def read(options: Options, bucket_step_multiple: int, side_multiple: int = 8) -> Data:
    """Return the samples of the run, all of them usable.

    Raises: OptionError or DataError for the first thing that is wrong.
    """
    configs = config.load(
        options.dataset,
        options.captions,
        options.masks,
        options.validation,
        bucket_step_multiple=bucket_step_multiple,
    )
    configs = tuple(in_whole_tokens(each, side_multiple) for each in configs)
    found = own_class.scan_any(configs, options.dataset, options.model.max_token_length)
    problems.raise_errors(found.problems)
    problems.log_warnings(found.problems)
    scan.check_masked_loss(options.masks.masked_loss, found.samples + found.validation)
    _warn_of_doubts(configs, found)
    mask_settings.read_first_label_maps(found.samples + found.validation)
    mask_settings.warn_of_idle([subset for each in configs for subset in each.subsets], found.samples)
    mask_settings.warn_of_idle_dropping(options.masks.mask_token_drop, found.samples)
    mask_settings.warn_of_idle_prior(options.masks.mask_prior_every, found.samples)
    found = mask_shares.without_empty(found)
    cut_settings.warn_of_idle(
        [subset for each in configs for subset in each.subsets], is_cached=options.caching.cache_latents
    )
    if options.caching.cache_latents:
        latents.refuse_uncacheable(configs)
    if options.caching.cache_text_encoder_outputs:
        texts.refuse_uncacheable(configs)
    if not found.samples:
        reason = "every one is held back. Lower validation_split" if found.validation else "every one was left out"
        raise OptionError(f"The dataset has no image to train on: {reason}.")
    if not found.validation:
        for name in ("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
            if getattr(options.validation, name) is not None:
                log.warning("--%s has no effect: no image is held back, see --validation_split", name)
    return Data(configs, found.samples, found.validation)


def _warn_of_doubts(configs: Sequence[DatasetConfig], found: scan.Scan) -> None:
    """Warn of what is no error and seldom meant, in a few lines; no pixel is read."""
    messages = problems.joint_messages(warnings_at_start(configs, found))
    for message in messages[:MOST_DOUBTS]:
        log.warning("%s", message)
    if messages[MOST_DOUBTS:]:
        log.warning("%d more warnings about the data set: see tools/check_dataset.py", len(messages[MOST_DOUBTS:]))


def in_whole_tokens(config: DatasetConfig, side_multiple: int) -> DatasetConfig:
    """Return the config with a resolution that the model can take; buckets are finer multiples already.

    Args:
        config: of a dataset.
        side_multiple: pixels, what the sides of pictures are multiples of.
    """
    width, height = (side // side_multiple * side_multiple for side in config.resolution)
    if config.enable_bucket or (width, height) == config.resolution:
        return config
    log.warning("resolution %dx%d becomes %dx%d, multiples of %d", *config.resolution, width, height, side_multiple)
    return replace(config, resolution=(width, height))


def make_plan(data: Data, options: Options, seed: int, num_processes: int) -> RunPlan:
    """Return the order in which the processes together draw the samples."""
    return plan.make_plan(
        data.configs,
        data.samples,
        seed=seed,
        gradient_accumulation_steps=options.training.gradient_accumulation_steps,
        num_processes=num_processes,
    )


def encoder(family: ModelFamily, parts: Callable[[], Parts]) -> Encoder:
    """Return the VAE's encoder as the cache wants it: the noise of image i is drawn from seeds[i], on the CPU.

    Args:
        family: encodes.
        parts: returns the models, of which only the VAE is used; called when there is something to encode.
    """

    def encode(images: Tensor, seeds: Sequence[int]) -> Tensor:
        space = family.latent_space
        size = (space.channels, images.shape[2] // space.reduction, images.shape[3] // space.reduction)
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return family.encode_images(parts(), images, noise)

    return encode


def cache(
    data: Data,
    options: CachingOptions,
    family: str,
    encode: Encoder,
    dtype: torch.dtype,
    vae_identity: str,
    accelerator: Accelerator,
) -> LatentStore:
    """Return all latents, encoding what is missing.

    Args:
        data: all images, held back or not.
        options: the caching group.
        family: its name, part of the names of files.
        encode: see cache.fill.Encoder.
        dtype: the VAE's working dtype.
        vae_identity: of its weights.
        accelerator: several processes share the work.
    """
    settings = LatentSettings(
        family=family,
        vae=vae_identity,
        dtype=dtype,
        device=accelerator.device,
        batch_size=options.vae_batch_size,
        to_disk=options.cache_latents_to_disk,
        cache_dir=Path(options.cache_dir) if options.cache_dir else None,
        skip_check=options.skip_cache_check,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )

    def total(counts: list[int]) -> list[int]:
        summed: Tensor = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum")
        return summed.tolist()

    return latents.build_store(data.all_samples, settings, encode, wait=accelerator.wait_for_everyone, total=total)


def latents_of(family: ModelFamily, parts: Parts, batch_size: int) -> Callable[[Batch], Tensor]:
    """Return what gives a batch's latents, float32: the cached ones, or the VAE's, batch_size images at a time."""
    space = family.latent_space

    def get(batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        images, share = batch.images, batch.share
        assert images is not None
        size = (space.channels, images.shape[2] // space.reduction, images.shape[3] // space.reduction)
        noise = torch.randn(len(images) if share is None else share.num_images, *size, device=images.device)
        own = noise if share is None else noise[share.rows]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            chunks = zip(images.split(batch_size), own.split(batch_size), strict=True)
            return torch.cat([family.encode_images(parts, *chunk) for chunk in chunks]).float()

    return get


def load(
    data: Data,
    options: Options,
    run_plan: RunPlan,
    stores: Stores,
    family: ModelFamily,
    max_train_steps: int,
    steps_done: int = 0,
    process: tuple[int, int] = (0, 1),
) -> BatchLoader:
    """Return the endless batches after steps_done, of each the part of this process (index, of how many)."""
    prior, reach = options.dataset.prior_loss_weight, options.masks.mask_token_drop
    every = options.masks.mask_prior_every
    settings = LoaderSettings(run_plan.seed, max_train_steps, prior, *process, token_reach=reach, prior_every=every)
    images = drawn_images(data, settings, stores, family)
    batches = run_plan.batches(run_plan.first_batch_of(steps_done))
    num_workers = min(options.training.max_data_loader_n_workers, os.cpu_count() or 1)
    return make_loader(images, batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())


def drawn_images(data: Data, settings: LoaderSettings, stores: Stores, family: ModelFamily) -> DrawnImages:
    """Return the batches of a run by their draws; captions are tokenized where there are encoders to read them."""
    is_read = stores.texts is None or not family.caches_all_text
    tokenize = family.tokenize if is_read else None
    return DrawnImages(data.all_samples, settings, tokenize=tokenize, store=stores.latents, texts=stores.texts)


def load_validation(
    data: Data,
    options: Options,
    batches: Sequence[tuple[Draw, ...]],
    seed: int,
    stores: Stores,
    family: ModelFamily,
    max_train_steps: int,
) -> BatchLoader:
    """Return the batches given, of images that are held back; each pass over them gives the same."""
    settings = LoaderSettings(seed, max_train_steps, token_reach=options.masks.mask_token_drop)
    images = drawn_images(data, settings, stores, family)
    num_workers = min(options.training.max_data_loader_n_workers, os.cpu_count() or 1, len(batches))
    return make_loader(images, batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())
