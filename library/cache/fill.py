"""The pass that fills the latent cache: threads decode ahead, the encoder works, a thread writes behind it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from library.cache.latents import CachedLatents, Fingerprint
from library.errors import DataError
from library.masks import Sums
from library.progress import progress

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")

Encoder = Callable[[Tensor, Sequence[int]], Tensor]
"""encode(images (B, 3, H, W) float32 in [-1, 1], seeds (B,)) -> latents (B, C, h, w), not yet scaled.

The noise of image i's sample is drawn from seeds[i], so that a cache made again is the same.
"""


@dataclass(frozen=True)
class Request(Generic[Key]):
    """One entry to encode."""

    key: Key
    name: str  # the image's path, for messages
    bucket: tuple[int, int]
    needs_flipped: bool


@dataclass(frozen=True)
class Source:
    """What decoding gives for one entry."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3), in the bucket
    mask: Sums | None
    fingerprint: Fingerprint
    seed: int  # of the VAE's sampling noise


def fill(
    requests: Sequence[Request[Key]],
    *,
    decode: Callable[[Request[Key]], Source],
    encode: Encoder,
    keep: Callable[[Request[Key], CachedLatents, Fingerprint], None],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Encode all requests, in batches of one bucket; decoding, encoding and keeping overlap.

    At most a few batches are in memory at a time, however many requests there are.

    Args:
        requests: what to encode, in any order.
        decode: called on several threads at a time.
        encode: called on this thread, with images on device.
        keep: called on one other thread, in order.
        batch_size: images that the encoder gets at once; the last batch of a bucket may be smaller.
        dtype: of the latents that are kept: the VAE's working dtype.
        device: where the encoder works.

    Raises:
        DataError: an image cannot be read, an entry cannot be written, or the VAE gave NaN or infinity.
    """
    num_threads = default_num_threads()
    in_order = sorted(requests, key=lambda request: request.bucket)
    behind: deque[Future[None]] = deque()
    with (
        progress(label="caching latents", total=len(in_order), unit=" images") as bar,
        ThreadPoolExecutor(num_threads, "decode") as decoders,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        sources = ahead(decoders, decode, in_order, num_waiting=num_threads + batch_size)
        for batch in _same_bucket(in_order, batch_size):
            decoded = list(islice(sources, len(batch)))
            made = _encode(batch, decoded, encode, dtype, device)
            for request, source, cached in zip(batch, decoded, made, strict=True):
                behind.append(writer.submit(keep, request, cached, source.fingerprint))
            while len(behind) > 2 * batch_size:
                behind.popleft().result()
            bar.update(len(batch))
        for written in behind:
            written.result()


def default_num_threads() -> int:
    """Return how many images are decoded at a time: more than 8 wait for the disk and the encoder."""
    return max(2, min(8, os.cpu_count() or 2))


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], *, num_waiting: int
) -> Iterator[Result]:
    """Yield work(item) in the order of items, with up to num_waiting results under way or waiting."""
    remaining = iter(items)
    futures = deque(pool.submit(work, item) for item in islice(remaining, num_waiting))
    try:
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in futures:
            future.cancel()


def _same_bucket(requests: Sequence[Request[Key]], batch_size: int) -> Iterator[list[Request[Key]]]:
    batch: list[Request[Key]] = []
    for request in requests:
        if batch and (len(batch) == batch_size or request.bucket != batch[0].bucket):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _encode(
    batch: Sequence[Request[Key]],
    sources: Sequence[Source],
    encode: Encoder,
    dtype: torch.dtype,
    device: torch.device,
) -> list[CachedLatents]:
    images = to_images([source.pixels for source in sources], device)
    seeds = [source.seed for source in sources]
    latents = _encode_checked(batch, images, seeds, encode, dtype)
    flipped: list[Tensor | None] = [None] * len(batch)
    mirrored = [i for i, request in enumerate(batch) if request.needs_flipped]
    if mirrored:
        made = _encode_checked(
            [batch[i] for i in mirrored],
            images[mirrored].flip(-1),
            [seeds[i] ^ 1 for i in mirrored],  # noise of its own, as for another image
            encode,
            dtype,
        )
        for i, each in zip(mirrored, made, strict=True):
            flipped[i] = each
    return [
        CachedLatents(each, mirror, source.mask) for each, mirror, source in zip(latents, flipped, sources, strict=True)
    ]


def _encode_checked(
    batch: Sequence[Request[Key]], images: Tensor, seeds: Sequence[int], encode: Encoder, dtype: torch.dtype
) -> list[Tensor]:
    with torch.no_grad():
        latents = encode(images, seeds).to("cpu", dtype)
    finite = latents.isfinite().flatten(1).all(dim=1)
    remedy = "Use --no_half_vae."
    if dtype == torch.float32:
        remedy = "Its file is damaged: fetch it again, or name another VAE with --vae."
    for request, is_finite in zip(batch, finite.tolist(), strict=True):
        if not is_finite:
            raise DataError(
                f"{request.name}: the VAE makes NaN or infinity of it in {str(dtype).removeprefix('torch.')}. {remedy}"
            )
    return [each.clone() for each in latents]  # each its own memory: a view would keep the whole batch


def to_images(pixels: Sequence[npt.NDArray[np.uint8]], device: torch.device | None = None) -> Tensor:
    """Return pixels (H, W, 3) uint8 of equal size as the VAE takes them: (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pixels)).to(device)
    return stacked.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
