"""Samples and the latent cache: which entry each sample uses, what is stale, and the store that training reads."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from library.cache import fill, latents
from library.cache.entries import check_writable, content_digest, dtype_name, remove_abandoned
from library.cache.fill import Encoder, Request, Source, ahead, default_num_threads
from library.cache.latents import CachedLatents, Fingerprint, Stamp, State, Verdict, Wanted
from library.cache.store import LatentStore, Stored
from library.dataset import geometry, images, looks
from library.dataset.config import DatasetConfig
from library.dataset.geometry import Pixels, Transform
from library.dataset.looks import Look
from library.dataset.scan import Sample
from library.errors import DataError, OptionError
from library.isolation import Fill
from library.masks import MaskSource
from library.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What one entry holds: a sample under a look. Samples that agree in it share the entry."""

    path: Path
    transform: Transform  # not mirrored
    mask: MaskSource
    fill: Fill


@dataclass(frozen=True)
class LatentSettings:
    """What all entries of a run have in common."""

    family: str  # "sd": part of the file names
    vae: str  # identity of the VAE's weights: another one makes every entry stale
    dtype: torch.dtype  # the VAE's working dtype
    device: torch.device
    batch_size: int = 1  # images per call of the encoder
    to_disk: bool = False
    cache_dir: Path | None = None  # None: entries stand beside their images
    skip_check: bool = False  # take entries that exist as valid
    process_index: int = 0
    num_processes: int = 1


def refuse_uncacheable(configs: Iterable[DatasetConfig]) -> None:
    """Raise OptionError if a subset wants pixels to differ from draw to draw; for use with --cache_latents."""
    for config in configs:
        for subset in config.subsets:
            for name in ("color_aug", "random_crop"):
                if getattr(subset, name):
                    raise OptionError(
                        f"--cache_latents: {name} is on for {subset.source}, but cached latents cannot change from "
                        f"draw to draw. Leave out one of the two."
                    )
            if subset.face_crop_aug_range is not None:
                log.warning("%s: face_crop_aug_range has no effect with --cache_latents", subset.source)


def check_cache_folders(samples: Iterable[Sample], family: str, cache_dir: Path | None) -> None:
    """Find out, before any model is loaded, whether missing entries can be written. Raises: DataError."""
    places = (latents.entry_path(each.path, each.transform.target, family, cache_dir) for each in samples)
    check_writable(places, "latent cache")


def build_store(
    samples: Sequence[Sample],
    settings: LatentSettings,
    encode: Encoder,
    *,
    wait: Callable[[], None] = lambda: None,
    total: Callable[[list[int]], list[int]] = list,
) -> LatentStore:
    """Return the latents and masks of all samples, encoding only what is missing or stale.

    Args:
        samples: the store's indices are theirs.
        settings: what all entries have in common.
        encode: see cache.fill.Encoder.
        wait: blocks until every process has called it; entry i is made by process i modulo their number.
        total: returns the sums over all processes, which call it together.

    Raises: DataError, see cache.fill.fill.
    """
    keys = [_keys(sample) for sample in samples]
    flips: dict[Key, bool] = defaultdict(bool)
    for sample, own in zip(samples, keys, strict=True):
        for key in own:
            flips[key] |= sample.subset.flip_aug
    if not settings.to_disk:
        made: dict[Key, CachedLatents] = {}
        _encode(list(flips), flips, settings, encode, lambda key, cached, _: made.__setitem__(key, cached))
        log.info("latents: %d images encoded and kept in memory", len(made))
        return LatentStore([[Stored(made[key], key.mask.kind) for key in own] for own in keys])
    places = _places(list(flips), settings)
    _update(places, flips, settings, encode, total)
    wait()  # nobody reads before all is written
    return LatentStore([[Stored(places[key], key.mask.kind) for key in own] for own in keys])


def _keys(sample: Sample) -> list[Key]:
    """Return the entries of a sample's looks, in their order."""
    return [
        Key(sample.path, replace(look.transform, flip=False), sample.mask, look.fill) for look in looks.looks_of(sample)
    ]


def _places(keys: Sequence[Key], settings: LatentSettings) -> dict[Key, Path]:
    """Return where each entry stands: further uses of an image in one bucket, with one fill, get numbers."""
    uses: Counter[tuple[Path, geometry.Size, Fill]] = Counter()
    places = {}
    for key in keys:
        place = (key.path, key.transform.target, key.fill)
        places[key] = latents.entry_path(
            key.path, key.transform.target, settings.family, settings.cache_dir, uses[place], key.fill.name
        )
        uses[place] += 1
    return places


def _update(
    places: Mapping[Key, Path],
    flips: Mapping[Key, bool],
    settings: LatentSettings,
    encode: Encoder,
    total: Callable[[list[int]], list[int]],
) -> None:
    """Bring this process's entries on disk up to date."""

    def judge(key: Key) -> Verdict:
        if settings.skip_check:
            return Verdict(State.FRESH if places[key].exists() else State.MISSING)
        return latents.judge(places[key], _wanted(key, needs_flipped=flips[key], settings=settings))

    own = [key for i, key in enumerate(places) if i % settings.num_processes == settings.process_index]
    with ThreadPoolExecutor(default_num_threads()) as pool:
        verdicts = dict(zip(own, pool.map(judge, own), strict=True))
    by_state = {state: [key for key in own if verdicts[key].state == state] for state in State}
    for key in by_state[State.DAMAGED]:
        log.warning("%s: the cache entry is damaged and is made again", places[key])
    stale = [key for state in (State.STALE, State.MISSING, State.DAMAGED) for key in by_state[state]]
    for folder in {places[key].parent for key in stale}:
        remove_abandoned(folder)
    for key in by_state[State.FRESH]:
        if verdicts[key].is_restamped:
            _restamp(places[key], key, verdicts[key])
    _renew_masks(by_state[State.MASK_STALE], places, verdicts)
    _encode(stale, flips, settings, encode, lambda key, cached, made_of: latents.write(places[key], cached, made_of))
    num_fresh, num_renewed, num_encoded = total(
        [len(by_state[State.FRESH]), len(by_state[State.MASK_STALE]), len(stale)]
    )
    log.info(
        "latents: %d entries %s, %d masks changed, %d encoded",
        num_fresh,
        "taken unchecked" if settings.skip_check else "up to date",
        num_renewed,
        num_encoded,
    )


def _wanted(key: Key, *, needs_flipped: bool, settings: LatentSettings) -> Wanted:
    fill_in_words = key.fill.in_words(looks.seed_of(key.path))
    return Wanted(
        key.path, key.mask, _in_words(key.transform), settings.vae, settings.dtype, needs_flipped, fill_in_words
    )


def _in_words(transform: Transform) -> str:
    sizes = (transform.source, transform.resized, transform.crop, transform.target)
    placed = "" if transform.placement is None else f" {transform.placement.in_words()}"
    return " ".join(f"{a}x{b}" for a, b in sizes) + f" {transform.interpolation or 'default'}{placed}"


def _restamp(place: Path, key: Key, verdict: Verdict) -> None:
    """Note the files' new times, so that their contents need not be compared at the next start."""
    assert verdict.fingerprint is not None
    cached = latents.read_latents(place)
    mask = latents.read_mask(place, key.mask.kind)
    with contextlib.suppress(DataError):  # a folder that cannot be written is compared again at each start
        latents.write(place, replace(cached, mask=mask), verdict.fingerprint)


def _renew_masks(keys: Sequence[Key], places: Mapping[Key, Path], verdicts: Mapping[Key, Verdict]) -> None:
    """Give entries a new mask, or none, and leave their latents as they are."""

    def renew(key: Key) -> None:
        fingerprint = verdicts[key].fingerprint
        assert fingerprint is not None
        image = images.read_image(key.path, want_alpha=True) if key.mask.kind == "alpha" else None
        mask, stamp = _mask(image, key)
        cached = latents.read_latents(places[key])
        made_of = replace(fingerprint, mask_kind=key.mask.kind, mask=stamp, mask_shape=key.mask.shape.in_words())
        latents.write(places[key], replace(cached, mask=images.shrunk(mask, key.transform)), made_of)

    if not keys:
        return
    num_threads = default_num_threads()
    with ThreadPoolExecutor(num_threads) as pool:
        renewed = ahead(pool, renew, keys, num_waiting=2 * num_threads)
        for _ in progress(renewed, label="renewing masks", total=len(keys), unit=" images"):
            pass


def _mask(image: images.Decoded | None, key: Key) -> tuple[Pixels | None, Stamp | None]:
    """Return a mask in the size of its file, see images.mask_of, and the stamp of its file if it has one."""
    data, stamp = None, None
    if key.mask.path is not None:
        data, stamp = latents.read_stamped(key.mask.path)
    return images.mask_of(image, key.mask, key.transform.source, data=data), stamp


def _encode(
    keys: Sequence[Key],
    flips: Mapping[Key, bool],
    settings: LatentSettings,
    encode: Encoder,
    keep: Callable[[Key, CachedLatents, Fingerprint], None],
) -> None:
    if not keys:
        return

    def decode(request: Request[Key]) -> Source:
        key = request.key
        data, stamp = latents.read_stamped(key.path)
        image = images.decode(data, key.path, want_alpha=key.mask.kind == "alpha")
        mask, mask_stamp = _mask(image, key)
        seen = images.see(image, mask, Look(key.transform, key.fill), key.path)
        wanted = _wanted(key, needs_flipped=request.needs_flipped, settings=settings)
        fingerprint = Fingerprint(
            stamp,
            wanted.transform,
            settings.vae,
            dtype_name(settings.dtype),
            mask_kind=key.mask.kind,
            mask=mask_stamp,
            mask_shape=key.mask.shape.in_words(),
            fill=wanted.fill,
        )
        # what is masked out decides nothing of a picture that is filled, not even the noise
        digest = stamp.digest if key.fill.is_keep else content_digest(seen.pixels.tobytes())
        return Source(seen.pixels, seen.mask, fingerprint, _seed(digest, wanted.transform))

    fill.fill(
        [Request(key, str(key.path), key.transform.target, flips[key]) for key in keys],
        decode=decode,
        encode=encode,
        keep=lambda request, cached, made_of: keep(request.key, cached, made_of),
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=settings.device,
    )


def _seed(digest: str, transform: str) -> int:
    """Return the seed of the VAE's noise: the same picture cut alike gets the same noise, wherever it stands."""
    mixed = hashlib.blake2b(f"{digest} {transform}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1  # torch's generators take 63 bits
