"""One cache entry per image and bucket: latents and mask in a safetensors file, and what they were made from.

The header's metadata holds a fingerprint. An entry is used only if it is what this run would make; what is stale is
told apart, because a changed mask needs no encoding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.cache.entries import (
    DTYPES,
    SUFFIX,
    DamagedEntryError,
    Tensors,
    content_digest,
    dtype_name,
    parse_header,
    read_bytes,
    read_tensor,
    require_whole,
    unusable,
    write_entry,
)
from library.errors import DataError
from library.masks import MaskKind, MaskSource, Sums
from library.whole_file import fitting_name

FORMAT = 1  # raised when the same fingerprint would mean other contents


@dataclass(frozen=True)
class CachedLatents:
    """What an entry gives to training."""

    latents: Tensor  # (C, h, w) VAE sample, not yet scaled, in the VAE's working dtype
    flipped: Tensor | None  # (C, h, w) of the mirrored image; None without flip_aug
    mask: Sums | None  # (h, w) uint16, see masks.shrink; None: every cell weighs 1


@dataclass(frozen=True)
class Stamp:
    """A file that an entry was made from: time and size are looked at first, the content only if they differ."""

    path: str
    mtime_ns: int
    num_bytes: int
    digest: str  # of the content


@dataclass(frozen=True)
class Fingerprint:
    """All that an entry depends on."""

    image: Stamp
    transform: str
    vae: str
    dtype: str
    mask_kind: MaskKind
    mask: Stamp | None  # the mask file; an alpha channel stands with its image
    format: int = FORMAT
    mask_shape: str = ""  # what was done to the mask, in words; entries without these two are of neither
    fill: str = ""  # what stands where the picture is masked out, in words: then the latents depend on the mask too


@dataclass(frozen=True)
class Wanted:
    """What this run needs of an entry, known without opening a file."""

    image: Path
    mask: MaskSource
    transform: str  # resize and cut in words; any two that differ give other pixels
    vae: str
    dtype: torch.dtype
    needs_flipped: bool
    fill: str = ""  # like Fingerprint's


class State(Enum):
    """What is to be done about an entry."""

    FRESH = "used as it is"
    MASK_STALE = "gets a new mask"
    STALE = "is encoded again"
    MISSING = "is made"
    DAMAGED = "cannot be read and is made again"


@dataclass(frozen=True)
class Verdict:
    """The state of an entry, and the fingerprint it has or will keep where its latents stay."""

    state: State
    fingerprint: Fingerprint | None = None
    is_restamped: bool = False  # same contents under another time or name: worth noting for the next start


def entry_path(
    image: Path, bucket: tuple[int, int], family: str, cache_dir: Path | None, variant: int = 0, fill: str = ""
) -> Path:
    """Return where the entry of an image in a bucket stands: beside the image, or in a folder of its own in cache_dir.

    Args:
        image: the image file; its extension stays in the name, so that a.png and a.webp do not share an entry.
        bucket: width and height.
        family: "sd": latents of different families do not meet.
        cache_dir: None for beside the image.
        variant: counts the further uses of an image in the same bucket with another cut or mask in one run.
        fill: short name of what stands where the picture is masked out: each keeps entries of its own.
    """
    tags = "".join(f"~{tag}" for tag in (fill, variant) if tag)
    ending = f"_{bucket[0]}x{bucket[1]}_{family}{tags}{SUFFIX}"
    name = fitting_name(image.name, ending)
    if cache_dir is None:
        return image.parent / name
    folder = image.parent.resolve()  # folders of the same name are told apart by the whole path
    tag = hashlib.blake2b(folder.as_posix().encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return cache_dir / fitting_name(folder.name or "root", f"-{tag}") / name


def read_stamped(path: Path) -> tuple[bytes, Stamp]:
    """Return a file's content and its stamp. Raises: DataError naming the file."""
    try:
        status = path.stat()
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return data, Stamp(str(path.absolute()), status.st_mtime_ns, len(data), content_digest(data))


def judge(path: Path, wanted: Wanted) -> Verdict:
    """Return the state of the entry at path, for what is wanted. Raises: DataError if the image or mask is gone."""
    if not path.exists():
        return Verdict(State.MISSING)
    try:
        tensors, fingerprint = _read_fingerprint(path)
    except (DamagedEntryError, OSError):
        return Verdict(State.DAMAGED)
    made_like = (fingerprint.transform, fingerprint.vae, fingerprint.dtype, fingerprint.format, fingerprint.fill)
    if made_like != (wanted.transform, wanted.vae, dtype_name(wanted.dtype), FORMAT, wanted.fill):
        return Verdict(State.STALE)
    if wanted.needs_flipped and "latents_flipped" not in tensors:
        return Verdict(State.STALE)
    image = _restamped(fingerprint.image, wanted.image)
    if image is None:
        return Verdict(State.STALE)
    kept = replace(fingerprint, image=image)
    of_another_mask = Verdict(State.STALE) if wanted.fill else Verdict(State.MASK_STALE, kept)
    if (wanted.mask.kind, wanted.mask.shape.in_words()) != (fingerprint.mask_kind, fingerprint.mask_shape):
        return of_another_mask
    if wanted.mask.path is not None:
        mask = None if fingerprint.mask is None else _restamped(fingerprint.mask, wanted.mask.path)
        if mask is None:
            return of_another_mask
        kept = replace(kept, mask=mask)
    return Verdict(State.FRESH, kept, is_restamped=kept != fingerprint)


def _restamped(stamp: Stamp, path: Path) -> Stamp | None:
    """Return the stamp of path if it holds what was stamped, perhaps under another time or name; else None."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    seen = (str(path.absolute()), status.st_mtime_ns, status.st_size)
    if seen == (stamp.path, stamp.mtime_ns, stamp.num_bytes):
        return stamp
    if status.st_size != stamp.num_bytes:
        return None
    _, now = read_stamped(path)
    return now if now.digest == stamp.digest else None


def write(path: Path, cached: CachedLatents, fingerprint: Fingerprint) -> None:
    """Write an entry whole or not at all: under a temporary name in the same folder, then renamed.

    Raises: DataError if the folder cannot be written.
    """
    tensors = {"latents": cached.latents.contiguous()}
    if cached.flipped is not None:
        tensors["latents_flipped"] = cached.flipped.contiguous()
    if cached.mask is not None:
        tensors["mask"] = torch.from_numpy(np.ascontiguousarray(cached.mask))
    written = {name: value for name, value in asdict(fingerprint).items() if value != ""}
    metadata = {"fingerprint": json.dumps(written), "mask_kind": fingerprint.mask_kind}
    write_entry(path, tensors, metadata)


def read(path: Path, *, flip: bool, mask_kind: MaskKind) -> tuple[Tensor, Sums | None]:
    """Return an entry's latents (C, h, w), of the mirrored image if flip, and its mask (h, w), not mirrored.

    Only what is asked for is read. No mask, or mask_kind "none": every cell weighs 1.

    Raises: DataError if the file is missing or damaged, or was made without the kind of mask that is wanted.
    """
    with _opened(path) as (file, tensors, metadata, start):
        name = "latents_flipped" if flip else "latents"
        if name not in tensors:
            raise DamagedEntryError(f"it holds no {name}")
        latents = read_tensor(file, start, tensors[name])
        return latents, _read_mask(file, start, tensors, metadata, mask_kind)


def read_mask(path: Path, mask_kind: MaskKind) -> Sums | None:
    """Return an entry's mask as `read` does, without reading its latents. Raises: DataError."""
    with _opened(path) as (file, tensors, metadata, start):
        return _read_mask(file, start, tensors, metadata, mask_kind)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[FileIO, Tensors, dict[str, str], int]]:
    """Yield the entry's file and what its header says. Raises: DataError for whatever goes wrong meanwhile."""
    try:
        with path.open("rb", buffering=0) as file:
            yield (file, *_parse_header(file))
    except (DamagedEntryError, OSError) as error:
        raise unusable(path, error) from error


def read_latents(path: Path) -> CachedLatents:
    """Return all of an entry but its mask. Raises: DataError if the file is missing or damaged."""
    latents, _ = read(path, flip=False, mask_kind="none")
    with path.open("rb", buffering=0) as file:
        has_flipped = "latents_flipped" in _parse_header(file)[0]
    return CachedLatents(latents, read(path, flip=True, mask_kind="none")[0] if has_flipped else None, None)


def _parse_header(file: FileIO) -> tuple[Tensors, dict[str, str], int]:
    """Return the tensors' places, the metadata, and where the data starts. Raises: DamagedEntryError."""
    tensors, metadata, start = parse_header(file)
    is_known = tensors.get("latents", {}).get("dtype") in DTYPES and {"fingerprint", "mask_kind"} <= metadata.keys()
    if not is_known:
        raise DamagedEntryError("not an entry of the latent cache")
    return tensors, metadata, start


def _read_fingerprint(path: Path) -> tuple[Tensors, Fingerprint]:
    """Return an entry's tensors and fingerprint; the file must have all its bytes. Raises: DamagedEntryError."""
    with path.open("rb", buffering=0) as file:
        tensors, metadata, start = _parse_header(file)
    try:
        values = json.loads(metadata["fingerprint"])
        image = Stamp(**values.pop("image"))
        mask = values.pop("mask")
        fingerprint = Fingerprint(image=image, mask=None if mask is None else Stamp(**mask), **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedEntryError("not an entry of the latent cache") from error
    require_whole(path, tensors, start)
    return tensors, fingerprint


def _read_mask(
    file: FileIO, start: int, tensors: Tensors, metadata: Mapping[str, str], mask_kind: MaskKind
) -> Sums | None:
    if mask_kind == "none":
        return None
    if metadata["mask_kind"] != mask_kind:
        raise DamagedEntryError(f"its mask is from '{metadata['mask_kind']}', wanted is '{mask_kind}'")
    if "mask" not in tensors:
        return None
    entry = tensors["mask"]
    data = read_bytes(file, start, entry)
    return np.frombuffer(data, dtype="<u2").reshape(entry["shape"])
