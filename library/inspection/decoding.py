"""The one pass over the pixels: each picture and each mask is decoded once, several at a time."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from library import mask_shaping
from library.dataset import contact_sheet, files, geometry, images, looks
from library.dataset.geometry import Pixels, Transform
from library.dataset.images import Decoded
from library.dataset.problems import Problem
from library.dataset.scan import Sample
from library.errors import DataError
from library.inspection import measuring
from library.inspection.facts import Coverage, FileFacts, Looked, MaskFacts, PictureFacts
from library.masks import CELL, Sums, cell_weights, shrink, to_array
from library.whole_file import fitting_name

FRAME = 1 / 16  # width of the frame whose weight tells an inverted mask, of the shorter side
THUMBNAIL = 176  # pixels, longest side of a picture on the page
THUMBNAIL_GAP = 4
PNG_BITS = 24  # where a PNG says how many bits a channel has
MULTI_PICTURE = "MPO"  # JPEGs of cameras with a second picture for preview: not animated


def look_at(samples: Sequence[Sample], *, weights: Path | None = None, thumbnails: bool = False) -> list[Looked]:
    """Return what the pixels of each sample tell, in the order of samples.

    Args:
        samples: to look at; one without a mask weighs 1 everywhere.
        weights: folder where the weights (h, w) are written, one float32 .npy a sample; None writes nothing.
        thumbnails: whether small pictures are wanted.

    Raises: DataError if the folder cannot be made, or a file there cannot be written.
    """
    if weights is not None:
        try:
            weights.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{weights}: cannot be made ({error.strerror or error}).") from None
    digits = len(str(len(samples)))
    groups: dict[object, list[tuple[int, Sample, Path | None]]] = defaultdict(list)
    for number, sample in enumerate(samples):
        name = fitting_name(f"{number:0{digits}}_{sample.path.stem}", ".npy")
        target = None if weights is None else weights.resolve() / name
        groups[sample.path, sample.mask].append((number, sample, target))
    wanted = list(groups.values())
    done = files.read_all(lambda group: _look_at_group(group, thumbnails), wanted, label="pixels")
    looked: dict[int, Looked] = {}
    for result in done:
        if isinstance(result, DataError):
            raise result
        looked |= result
    return [looked[number] for number in range(len(samples))]


def _look_at_group(group: Sequence[tuple[int, Sample, Path | None]], thumbnails: bool) -> dict[int, Looked]:
    """Return what is found, by number, of samples that share a picture and a mask."""
    first = group[0][1]
    problems: list[Problem] = []
    picture, decoded, given = _picture(first, problems)
    mask, shaped = _mask(first, decoded, problems)
    looked = {}
    for number, sample, target in group:
        seen = sample if given is None else replace(sample, captions=given.captions, transform=given.transform)
        is_known = not sample.mask.is_given or shaped is not None or not problems
        coverage = _coverage(seen, shaped, target) if is_known else None
        thumbnail = _thumbnail(seen, decoded, shaped) if thumbnails and decoded is not None else None
        looked[number] = Looked(sample, picture, mask, coverage, tuple(problems), thumbnail)
    return looked


def _picture(sample: Sample, problems: list[Problem]) -> tuple[PictureFacts | None, Decoded | None, Sample | None]:
    """Return the facts of a picture, its pixels, and the sample as a class of the user's gives it."""
    try:
        if sample.give is not None:
            decoded, given, _ = images.of_sample(sample)
            return None, decoded, given
        data = images.read_bytes(sample.path)
        decoded = images.decode(data, sample.path, want_alpha=True)
        height, width = decoded.rgb.shape[:2]
        if (width, height) != sample.transform.source:
            raise DataError(f"{sample.path}: has changed while it was read. Start again.")
    except DataError as error:
        problems.append(_failure(sample.path, error, "image-unreadable"))
        return None, None, None
    alpha = None if decoded.alpha is None else measuring.alpha_facts(decoded.rgb, decoded.alpha)
    return PictureFacts(_file_facts(data), alpha, *measuring.likeness(decoded.rgb, decoded.alpha)), decoded, None


def _failure(path: Path, error: DataError, code: str, about: tuple[Path, ...] = ()) -> Problem:
    """Return the error of a file that cannot be decoded; the last sentence of its message says what to do."""
    remedy = str(error).rpartition(". ")[2]
    return Problem("error", path, str(error), code=code, remedy=remedy, files=about)


def _file_facts(data: bytes) -> FileFacts:
    with Image.open(io.BytesIO(data)) as file:
        kind = file.format or ""
        bits = 16 if file.mode.startswith("I") else 8
        if kind == "PNG":
            bits = max(bits, data[PNG_BITS]) if data[PNG_BITS] >= CELL else 8
        frames = 1 if kind == MULTI_PICTURE else getattr(file, "n_frames", 1)
        orientation = Image.Image.getexif(file).get(files.ORIENTATION_TAG, 1)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return FileFacts(kind, file.mode, bits, frames, orientation, digest)


def _mask(sample: Sample, decoded: Decoded | None, problems: list[Problem]) -> tuple[MaskFacts | None, Pixels | None]:
    """Return the facts of a sample's mask and the mask as it is used, shaped; None where there is none."""
    source, labels = sample.mask, sample.mask.shape.labels
    unlisted: tuple[tuple[str, float], ...] = ()
    listed: frozenset[str] = frozenset()
    file, hue, transparency = None, 0.0, None
    if source.kind == "file":
        assert source.path is not None
        try:
            data = images.read_bytes(source.path)
            image = images.open_mask(data, source.path)
            raw = images.mask_values(image, source.path, labels)
        except DataError as error:
            problems.append(_failure(source.path, error, "mask-unreadable", (sample.path,)))
            return None, None
        file, hue, transparency = _file_facts(data), measuring.coloured(image), measuring.transparency(image)
        if labels:
            unlisted, listed = measuring.label_shares(image, dict(labels))
    elif decoded is not None and decoded.alpha is not None and source.kind in ("alpha", "own"):
        raw = decoded.alpha
    else:
        return None, None
    shaped = raw if source.shape.is_plain else mask_shaping.shape(raw, source.shape, sample.transform.source)
    facts = MaskFacts(
        file=file,
        least=int(raw.min()),
        most=int(raw.max()),
        coloured=hue,
        alpha=transparency,
        ringing=measuring.ringing(raw),
        labels=unlisted,
        listed=listed,
        specks=measuring.specks(shaped),
    )
    return facts, shaped


def _coverage(sample: Sample, mask: Pixels | None, target: Path | None) -> Coverage:
    """Return what a mask lets through at latent size, and write the weights. Raises: DataError if that fails.

    Masks are judged as their pictures are cut without augmentation, or whole where each draw shows another part; the
    weights are those of training in its first look.
    """
    transform = _whole(sample.transform) if sample.subset.random_placement else sample.transform
    lost, strokes = 0.0, None
    if mask is None:
        width, height = transform.target
        judged = np.ones((height // CELL, width // CELL), np.float32)
    else:
        cut = geometry.apply(transform, mask)
        judged = to_array(shrink(cut))
        strokes = measuring.strokes(cut, judged, transform)
        if looks.is_cut_anew(sample):
            judged = np.asarray(mask / np.float32(255))
        else:
            lost = measuring.lost(mask, cut, transform)
    placed = images.shrunk(mask, looks.look_of(sample, 0).transform)
    trained = judged if placed is None else _as_trained(placed, sample)
    if target is not None:
        try:
            np.save(target, trained)
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error}).") from None
    means = (float(judged.mean()), float(trained.mean()))
    return Coverage(*means, *_centre_and_frame(judged), target, lost, strokes)


def _whole(transform: Transform) -> Transform:
    """Return what shows the whole picture as large as its bucket allows, in whole latent cells."""
    scale = min(transform.target[axis] / transform.source[axis] for axis in (0, 1))
    width, height = (max(CELL, round(length * scale / CELL) * CELL) for length in transform.source)
    return replace(transform, resized=(width, height), crop=(0, 0), target=(width, height))


def _as_trained(mask: Sums, sample: Sample) -> measuring.Weights:
    """Return what the cells of a mask in its first look weigh: (h, w) in [0, 1]."""
    cover = images.shrunk(None, looks.look_of(sample, 0).transform)
    return cell_weights(to_array(mask), sample.subset.mask_weight_min, None if cover is None else to_array(cover))


def _centre_and_frame(weights: measuring.Weights) -> tuple[float, float]:
    height, width = weights.shape
    centre = weights[height // 4 : -(-3 * height // 4), width // 4 : -(-3 * width // 4)]
    border = max(1, round(min(weights.shape) * FRAME))
    is_frame = np.ones(weights.shape, bool)
    is_frame[border : height - border, border : width - border] = False
    return float(centre.mean()), float(weights[is_frame].mean())


def _thumbnail(sample: Sample, decoded: Decoded, mask: Pixels | None) -> bytes:
    """Return a WebP of a sample as trained, and beside it, if it has a mask, the same under its veil."""
    look = looks.look_of(sample, 0)
    seen = images.see(decoded, mask, look, sample.path)
    (width, height), longest = sample.transform.target, max(sample.transform.target)
    size = (width, height)
    if longest > THUMBNAIL:
        size = (max(1, width * THUMBNAIL // longest), max(1, height * THUMBNAIL // longest))
    small = np.asarray(cv2.resize(seen.pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    parts = [small]
    if seen.mask is not None:
        weights = cv2.resize(_as_trained(seen.mask, sample), size, interpolation=cv2.INTER_NEAREST_EXACT)
        parts.append(contact_sheet.veiled(small, np.asarray(weights, np.float32)))
    gap = np.full((size[1], THUMBNAIL_GAP, 3), 255, np.uint8)
    row = parts if len(parts) == 1 else [parts[0], gap, parts[1]]
    return as_webp(Image.fromarray(np.concatenate(row, axis=1)))


def as_webp(image: Image.Image) -> bytes:
    """Return a picture as WebP, small rather than exact."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72, method=2)
    return buffer.getvalue()
