"""From draws to batches: the one torch Dataset. It keeps no state, so any number of workers gives the same batches."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from library.batch import Batch, Share
from library.cache.fill import to_images
from library.cache.store import LatentStore, TextStore
from library.dataset import captions, geometry, images, looks, mask_captions, placement, plan
from library.dataset.geometry import Pixels, SizeConditioning
from library.dataset.looks import Look
from library.dataset.plan import Draw
from library.dataset.scan import Sample
from library.dataset.weighing import Shown, weigh
from library.errors import UserError
from library.masks import Sums

if TYPE_CHECKING:
    DrawsDataset = Dataset["Batch | Failure"]
else:
    DrawsDataset = Dataset

Tokenize = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class LoaderSettings:
    """What all batches of a run have in common."""

    seed: int
    max_train_steps: int  # what a token_warmup_step below 1 is a share of
    prior_loss_weight: float = 1.0  # the weight of a regularisation image
    process_index: int = 0
    num_processes: int = 1  # that share each batch
    token_reach: int | None = None  # latent cells, see masks.kept_tokens; None: all tokens are computed
    prior_every: int = 0  # optimizer steps after which the untrained model predicts; 0: never, as in validation


@dataclass(frozen=True)
class Failure:
    """A user's error on its way out of a worker, which would wrap it in a traceback if it were raised there."""

    error: UserError


@dataclass(frozen=True)
class _Item:
    """One image of a batch."""

    caption: str
    pixels: Pixels | None  # (H, W, 3)
    latents: Tensor | None  # (C, h, w)
    mask: Sums | None  # (h, w)
    sizes: SizeConditioning
    weight: float = 1.0  # of its loss
    cover: Sums | None = None  # (h, w), see Shown


class DrawnImages(DrawsDataset):
    """Batches by their draws."""

    def __init__(
        self,
        samples: Sequence[Sample],
        settings: LoaderSettings,
        *,
        tokenize: Tokenize | None = None,
        store: LatentStore | None = None,
        texts: TextStore | None = None,
    ) -> None:
        """Take what batches are made of.

        Args:
            samples: a draw's index is among them.
            settings: what all batches have in common.
            tokenize: gives Batch.tokens; None leaves them out.
            texts: gives Batch.text, of every caption that can be drawn; None leaves it out.
            store: where latents and masks come from; None: images are decoded at each draw.
        """
        self._samples = samples
        self._settings = settings
        self._tokenize = tokenize
        self._texts = texts
        self.store = store

    def __getitem__(self, draws: tuple[Draw, ...]) -> Batch | Failure:
        """Return what this process has of the batch of draws, all of one bucket; or the user's error in the way."""
        try:
            if self._settings.num_processes == 1:
                return self._batch(draws)
            share = Share(len(draws), self._settings.process_index, self._settings.num_processes)
            return replace(self._batch(draws[share.rows]), share=share)
        except UserError as error:
            return Failure(error)

    def _batch(self, draws: tuple[Draw, ...]) -> Batch:
        items = [self._item(draw) for draw in draws]
        samples = [self._samples[draw.sample] for draw in draws]
        texts = tuple(item.caption for item in items)
        pixels = [item.pixels for item in items if item.pixels is not None]
        latents = [item.latents for item in items if item.latents is not None]
        prior, every = self._settings.prior_loss_weight, self._settings.prior_every
        shown = [
            Shown(sample.subset, item.mask, (prior if sample.is_reg else 1.0) * item.weight, item.cover)
            for sample, item in zip(samples, items, strict=True)
        ]
        is_due = every > 0 and draws[0].step % every == 0
        weighed = weigh(shown, token_reach=self._settings.token_reach, prior_every=every if is_due else 0)
        return Batch(
            names=tuple(str(sample.path) for sample in samples),
            captions=texts,
            tokens=None if self._tokenize is None else self._tokenize(texts),
            images=to_images(pixels) if pixels else None,
            latents=torch.stack(latents) if latents else None,
            original_sizes=torch.tensor([item.sizes.original for item in items]),
            crop_top_lefts=torch.tensor([item.sizes.crop_top_left for item in items]),
            target_sizes=torch.tensor([item.sizes.target for item in items]),
            text=None if self._texts is None else self._texts.stacked(texts),
            preserved=_flags([sample.subset.diff_output_preservation for sample in samples]),
            **vars(weighed),
        )

    def _item(self, draw: Draw) -> _Item:
        sample = self._samples[draw.sample]
        name = f"{sample.path.parent.name}/{sample.path.name}"  # of the picture, wherever the folder stands
        stem = looks.seed_of(sample.path)  # in whatever format the picture is saved
        seed = self._settings.seed
        image, weight = None, 1.0
        if self.store is None:
            image, sample, weight = images.of_sample(sample, seed=f"{seed} {draw.epoch} {draw.repeat}")
        is_masked = looks.is_shown_masked(sample, plan.rng(seed, draw, f"{stem} mask"))
        is_whole = image is not None and sample.give is not None and image.alpha is None  # a class may give no mask
        caption = captions.compose(
            sample.captions,
            sample.subset,
            plan.rng(seed, draw, f"{name} caption"),
            epoch=draw.epoch,
            step=draw.step,
            max_train_steps=self._settings.max_train_steps,
            left_out=mask_captions.left_out(sample) if is_masked and not is_whole else captions.NO_TAGS,
        )
        face = None if self.store is not None else geometry.face_in_name(sample.path)
        number = looks.draw(looks.num_looks(sample), plan.rng(seed, draw, f"{stem} look"))
        if self.store is None and sample.subset.random_placement:
            placed_by = plan.rng(seed, draw, f"{stem} placement")
            placed = placement.draw(sample.transform, sample.subset, placed_by, sample.region)
            look = Look(placed, looks.fill_of(sample, number))
        else:
            look = looks.look_of(sample, number)
        transform = geometry.draw(look.transform, sample.subset, plan.rng(seed, draw, f"{name} geometry"), face=face)
        sizes = geometry.size_conditioning(transform)
        cover = images.shrunk(None, transform) if sample.subset.mask_weight_min else None
        if image is None:
            assert self.store is not None
            latents, mask = self.store.get(draw.sample, flip=transform.flip, look=number)
            if sample.mask.is_given and not is_masked:
                mask = images.shrunk(None, transform)
            return _Item(caption, None, latents, mask, sizes, cover=cover)
        mask_pixels = images.mask_of(image, sample.mask, transform.source) if is_masked else None
        seen = images.see(image, mask_pixels, replace(look, transform=transform), sample.path)
        pixels = seen.pixels
        if sample.subset.color_aug:
            pixels = images.augment_colour(pixels, plan.rng(seed, draw, f"{name} colour"))
        return _Item(caption, pixels, None, seen.mask, sizes, weight, cover)


def _flags(values: Sequence[bool]) -> Tensor | None:
    """Return (B,) bool, or None if all are false, which is thereby known without asking the device."""
    return torch.tensor(values) if any(values) else None


class BatchLoader(DataLoader[Any]):
    """A torch DataLoader that raises users' errors as they are."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches in the order of their draws. Raises: UserError."""
        batches = super().__iter__()
        if self.num_workers:
            atexit.unregister(_kill_workers)
            atexit.register(_kill_workers)  # last in, first out: before anybody waits for them
        for loaded in batches:
            if isinstance(loaded, Failure):
                raise loaded.error
            yield loaded


def make_loader(
    dataset: DrawnImages, batches: Iterable[tuple[Draw, ...]], *, num_workers: int, pin_memory: bool
) -> BatchLoader:
    """Return what yields the batches of dataset in the order given, loading ahead in num_workers processes.

    Args:
        dataset: gives the batches.
        batches: their draws; may be endless.
        num_workers: 0 loads in this process; taken as 0 when latents are in memory, which need no loading.
        pin_memory: for copies to a GPU that do not wait.
    """
    if dataset.store is not None and dataset.store.is_in_memory:
        num_workers = 0
    return BatchLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker if num_workers else None,
        prefetch_factor=4 if num_workers else None,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _kill_workers() -> None:
    """End the workers that a run leaves which broke off: they are deaf to the signal by which Python would end them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _prepare_worker(_: int) -> None:
    # Ctrl-C, and the SIGTERM of a launcher, reach all processes: the main one saves first, then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)  # its pool does not survive a fork, and the workers are the threads
    torch.set_num_threads(1)
