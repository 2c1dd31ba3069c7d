"""Which texts have to be encoded, and the pass that does it: the encoder works, a thread writes behind it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.cache import text
from library.cache.entries import remove_abandoned
from library.cache.fill import default_num_threads
from library.cache.store import TextStore
from library.cache.text import Key, Outputs, State
from library.errors import DataError
from library.progress import progress

log = logging.getLogger(__name__)

SHOWN_LETTERS = 60  # of a text, in a message

TextEncoder = Callable[[Sequence[Key]], list[dict[str, Tensor]]]
"""encode(keys) -> what is kept of each, by name, on any device and in any floating dtype."""


@dataclass(frozen=True)
class TextSettings:
    """What all entries of one kind have in common in a run."""

    encoder: str  # identity of the text encoders' weights, and of how they are called
    dtype: torch.dtype  # that outputs are kept in
    batch_size: int = 1  # texts per call of the encoders
    to_disk: bool = False
    skip_check: bool = False  # take entries that exist as valid
    process_index: int = 0
    num_processes: int = 1


@dataclass(frozen=True)
class Survey:
    """What is there already of the texts of a run."""

    settings: TextSettings
    places: Mapping[Key, Path]  # of all texts, in order
    missing: tuple[Key, ...]  # what this process is to encode
    num_fresh: int  # of its share


def survey(places: Mapping[Key, Path], settings: TextSettings) -> Survey:
    """Return what this process has to encode: all texts without files, or its share of what is missing or stale.

    Args:
        places: each text once, and where its entry stands or would.
        settings: what all entries have in common.
    """
    if not settings.to_disk:
        return Survey(settings, places, tuple(places), 0)

    def judge(key: Key) -> State:
        if settings.skip_check:
            return State.FRESH if places[key].exists() else State.MISSING
        return text.judge(places[key], text.fingerprint_of(key, settings.encoder, settings.dtype))

    own = [key for i, key in enumerate(places) if i % settings.num_processes == settings.process_index]
    with ThreadPoolExecutor(default_num_threads()) as pool:
        states = dict(zip(own, pool.map(judge, own), strict=True))
    for key, state in states.items():
        if state == State.DAMAGED:
            log.warning("%s: the cache entry is damaged and is made again", places[key])
    missing = tuple(key for key in own if states[key] != State.FRESH)
    return Survey(settings, places, missing, len(own) - len(missing))


def fill(found: Survey, encode: TextEncoder) -> TextStore:
    """Encode what is missing and return the outputs of all texts, which other processes may still be writing.

    Raises: DataError if an entry cannot be written, or the text encoders gave NaN or infinity.
    """
    settings = found.settings
    made: dict[Key, Outputs] = {}
    if settings.to_disk:
        for folder in {found.places[key].parent for key in found.missing}:
            remove_abandoned(folder)

    def keep(key: Key, outputs: Outputs) -> None:
        if settings.to_disk:
            text.write(found.places[key], outputs, text.fingerprint_of(key, settings.encoder, settings.dtype))
        else:
            made[key] = outputs

    _encode(found.missing, settings, encode, keep)
    return TextStore(found.places if settings.to_disk else made)


def _encode(
    keys: Sequence[Key], settings: TextSettings, encode: TextEncoder, keep: Callable[[Key, Outputs], None]
) -> None:
    if not keys:
        return
    behind: deque[Future[None]] = deque()
    with (
        progress(label="caching text", total=len(keys), unit=" texts") as bar,
        ThreadPoolExecutor(1, "write") as writer,
    ):
        for batch in _batches(keys, settings.batch_size):
            # One text alone is computed by other kernels, which round otherwise: it goes twice, so that what is made
            # of a text does not depend on how many were missing.
            is_doubled = len(batch) == 1 < settings.batch_size
            with torch.no_grad():
                encoded = encode([*batch, *batch] if is_doubled else batch)
            for key, outputs in zip(batch, encoded, strict=False):
                behind.append(writer.submit(keep, key, _checked(key, outputs, settings.dtype)))
            while len(behind) > 2 * settings.batch_size:
                behind.popleft().result()
            bar.update(len(batch))
        for written in behind:
            written.result()


def _batches(keys: Sequence[Key], batch_size: int) -> Iterator[Sequence[Key]]:
    for start in range(0, len(keys), batch_size):
        yield keys[start : start + batch_size]


def _checked(key: Key, outputs: Outputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return outputs on the CPU, in memory of their own, as they are kept. Raises: DataError for NaN or infinity."""
    kept = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in outputs.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        shown = key[-1] if len(key[-1]) <= SHOWN_LETTERS else f"{key[-1][:SHOWN_LETTERS]}..."
        name = str(dtype).removeprefix("torch.")
        remedy = "Use --mixed_precision bf16." if dtype == torch.float16 else "Their file is damaged: fetch it again."
        raise DataError(f'caption "{shown}": the text encoders make NaN or infinity of it in {name}. {remedy}')
    return kept
