"""Copies of a tree of pictures, each placed at random on the canvas of a bucket, with captions and masks."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from library import isolation
from library.dataset import buckets, files, geometry, images, pairing, placement, regions
from library.dataset.geometry import Box, Pixels, Size, Transform
from library.dataset.images import Decoded
from library.errors import DataError
from library.isolation import Fill
from library.whole_file import whole_file

NOT_WORDS = (".safetensors", ".npz")  # caches that lie beside pictures; all else of a picture's name is its words
CROP_TRIES = 24


@dataclass(frozen=True)
class PadSettings:
    """How pictures are placed."""

    buckets: tuple[Size, ...]
    bucket_aspect: float = 1.5  # how many times wider or narrower than the picture a bucket may be
    placement_scale: tuple[float, float] = (0.5, 1.0)  # 1 just fits the picture into the bucket
    placement_rotate: float = 0.0  # degrees, either way
    shift: float = 1.0  # share of the free room in which the picture stands, round the middle
    crop: tuple[float, float] = (1.0, 1.0)  # share of each of its sides that is kept, least and most
    fill: str = "mean"  # of the canvas that is left free: mean, extend, noise or a colour
    fill_masked: bool = False  # and of what is masked out of the picture
    seed: int = 0


@dataclass(frozen=True)
class Original:
    """A picture of the tree, and what belongs to it."""

    path: Path
    folder: Path  # its folder below the root of the tree
    mask: Path | None
    words: tuple[Path, ...]  # captions of any extension beside it
    mask_words: tuple[Path, ...]  # and beside its mask


@dataclass(frozen=True)
class PaddedCopy:
    """One of the copies of a picture."""

    original: Original
    number: int  # from 0
    picture: Path
    mask: Path | None  # None: the mask is the picture's alpha channel


def find(root: Path, mask_root: Path | None) -> list[Original]:
    """Return the pictures in a folder and those within, hidden ones and the masks left out, sorted by name.

    The masks of a folder are in the folder of its name below mask_root, or else in mask_root itself.

    Raises: DataError if there are none, or two of a folder could not be told apart by their masks and captions.
    """
    found: list[Original] = []
    for folder in _folders(root, mask_root):
        paths = files.list_images(folder)
        words = _words_in(folder)
        inner = folder.relative_to(root)
        masks, mask_words = _masks_of(paths, inner, mask_root)
        seen: dict[str, Path] = {}
        for path in paths:
            other = seen.setdefault(path.stem, path)
            if other != path:
                raise DataError(f"{path}: has the name of {other.name} but for the extension. Rename one of the two.")
            mask = masks.get(path)
            beside_mask = mask_words.get(mask.stem, ()) if mask is not None else ()
            found.append(Original(path, inner, mask, _words_of(path, words), beside_mask))
    if not found:
        raise DataError(f"{root}: has no images, nor have the folders in it.")
    return found


def _folders(root: Path, mask_root: Path | None) -> Iterator[Path]:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder.")
    yield root
    left_out = None if mask_root is None else mask_root.resolve()
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.resolve() != left_out:
            yield from _folders(path, mask_root)


def _masks_of(
    paths: Sequence[Path], inner: Path, mask_root: Path | None
) -> tuple[dict[Path, Path], Mapping[str, tuple[Path, ...]]]:
    if mask_root is None:
        return {}, {}
    folder = mask_root / inner
    folder = folder if folder.is_dir() else mask_root
    return pairing.pair(paths, files.list_images(folder)).masks, _words_in(folder)


def _words_in(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the files of a folder that may hold captions, by stem."""
    left_out = (*files.image_extensions(), *NOT_WORDS, "")
    words: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in left_out and not path.name.startswith(".") and path.is_file():
            words[path.stem].append(path)
    return {stem: tuple(paths) for stem, paths in words.items()}


def _words_of(path: Path, words: Mapping[str, tuple[Path, ...]]) -> tuple[Path, ...]:
    parts = path.stem.split("_")  # a face's place at the end of a name is not part of its caption's
    short = "_".join(parts[:-4]) if len(parts) >= 5 else path.stem
    return words.get(path.stem) or words.get(short, ())


def copies_of(original: Original, count: int, root: Path, mask_root: Path | None) -> list[PaddedCopy]:
    """Return the copies of a picture: under its own name, or with _1, _2 ... where there are several."""
    copies = []
    for number in range(count):
        name = f"{original.path.stem}{f'_{number + 1}' if count > 1 else ''}.png"
        mask = None if mask_root is None else mask_root / original.folder / name
        copies.append(PaddedCopy(original, number, root / original.folder / name, mask))
    return copies


def is_whole(copy: PaddedCopy) -> bool:
    """Return whether picture and mask of a copy are there, and not cut short."""
    try:
        return all(path.exists() and files.read_header(path) for path in (copy.picture, copy.mask) if path is not None)
    except DataError:
        return False


def make(copy: PaddedCopy, settings: PadSettings) -> None:
    """Write a copy's picture and mask, each whole or not at all. Raises: DataError."""
    image, mask = read(copy.original)
    draws = random.Random(f"pad {settings.seed} {_name(copy)}")
    transform, image, mask = draw(image, mask, settings, draws)
    rgb = image.rgb
    if settings.fill_masked and mask is not None:  # before it is resized: what is masked out touches nothing else
        rgb = np.where(mask[..., None] > 0, rgb, np.rint(_canvas(rgb, mask, settings, _name(copy)))).astype(np.uint8)
    coverage = geometry.coverage(transform)
    shown_mask = coverage if mask is None else geometry.apply(transform, mask)
    pixels = geometry.apply(transform, rgb)
    canvas = _canvas(pixels, shown_mask if shown_mask.any() else coverage, settings, _name(copy))
    pixels = placement.over_canvas(pixels, coverage, canvas)
    if settings.fill_masked:
        pixels = np.where(shown_mask[..., None] > 0, pixels, np.rint(canvas)).astype(np.uint8)
    if copy.mask is None:
        pixels = np.dstack((pixels, shown_mask))
    else:
        _write(copy.mask, shown_mask)
    _write(copy.picture, pixels)


def _name(copy: PaddedCopy) -> str:
    return f"{(copy.original.folder / copy.original.path.name).as_posix()} {copy.number}"


def read(original: Original) -> tuple[Decoded, Pixels | None]:
    """Return a picture and its mask (H, W), None if it has neither mask file nor transparency. Raises: DataError."""
    image = images.read_image(original.path, want_alpha=original.mask is None)
    if original.mask is None:
        return image, image.alpha
    mask = images.read_mask(original.mask)
    height, width = image.rgb.shape[:2]
    if not pairing.has_same_aspect((mask.shape[1], mask.shape[0]), (width, height)):
        sizes = f"is {mask.shape[1]}x{mask.shape[0]}, its image {original.path.name} is {width}x{height}"
        raise DataError(f"{original.mask}: mask {sizes}. Make both the same size.")
    return image, geometry.resize(mask, (width, height), "area" if mask.shape[1] > width else "bilinear")


def draw(
    image: Decoded, mask: Pixels | None, settings: PadSettings, draws: random.Random
) -> tuple[Transform, Decoded, Pixels | None]:
    """Return where a picture is placed, and the part of it that is, with the same part of its mask."""
    height, width = image.rgb.shape[:2]
    target = draws.choice(_buckets_of((width, height), settings))
    region = None if mask is None else regions.of_mask(mask, (width, height))
    if settings.crop[0] < 1:
        left, top, right, bottom = _cut_out((width, height), region, settings.crop, draws)
        image = replace(image, rgb=np.ascontiguousarray(image.rgb[top:bottom, left:right]))
        mask = None if mask is None else np.ascontiguousarray(mask[top:bottom, left:right])
        width, height = right - left, bottom - top
        region = None if mask is None else regions.of_mask(mask, (width, height))
    plain = Transform((width, height), target, (0, 0), target)
    return placement.draw(plain, settings, draws, region, spread=settings.shift), image, mask


def _buckets_of(size: Size, settings: PadSettings) -> list[Size]:
    """Return the buckets for a picture: those that are not much wider or narrower than it, the nearest at least."""
    nearest = buckets.choose(size, settings.buckets)
    aspect = size[0] / size[1]
    limits = (aspect / settings.bucket_aspect, aspect * settings.bucket_aspect)
    return [each for each in settings.buckets if each == nearest or limits[0] <= each[0] / each[1] <= limits[1]]


def _cut_out(size: Size, region: Box | None, shares: tuple[float, float], draws: random.Random) -> Box:
    """Return a part of a picture in which most of its weighted region is; all of it where none was found."""
    whole = (0, 0, *size)
    kept = whole if region is None else region
    for _ in range(CROP_TRIES):
        sides = [max(1, round(side * draws.uniform(*shares))) for side in size]
        left, top = (draws.randint(0, side - part) for side, part in zip(size, sides, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        if region is None or _shared(box, kept) >= placement.LEAST_KEPT:
            return box
    return whole


def _shared(box: Box, region: Box) -> float:
    share = 1.0
    for axis in (0, 1):
        overlap = min(box[axis + 2], region[axis + 2]) - max(box[axis], region[axis])
        share *= max(0, overlap) / (region[axis + 2] - region[axis])
    return share


def _canvas(pixels: Pixels, weights: Pixels, settings: PadSettings, name: str) -> npt.NDArray[np.float64] | Pixels:
    """Return what stands where the canvas is free: a colour (3,), or pixels (h, w, 3)."""
    if settings.fill == "mean":
        return placement.mean_colour(pixels, weights)
    if settings.fill == "extend":
        return isolation.fill(pixels, weights, Fill("extend"), name)
    if settings.fill == "noise":
        return isolation.fill(pixels, weights, Fill("noise"), f"{settings.seed} {name}")
    return np.array(ImageColor.getrgb(settings.fill)[:3], np.float64)


def _write(path: Path, pixels: Pixels) -> None:
    try:
        with whole_file(path) as partial:
            Image.fromarray(pixels).save(partial, format="PNG", compress_level=4)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from None


def copy_words(copy: PaddedCopy) -> None:
    """Write the captions beside a copy and its mask, where they are not there already. Raises: DataError."""
    beside = [(path, copy.picture) for path in copy.original.words]
    beside += [(path, copy.mask) for path in copy.original.mask_words if copy.mask is not None]
    for path, place in beside:
        data = images.read_bytes(path)
        target = place.with_suffix(path.suffix)
        if target.exists() and images.read_bytes(target) == data:
            continue
        try:
            with whole_file(target) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error}).") from None


def check_places(root: Path, mask_root: Path | None, output: Path, mask_output: Path | None) -> None:
    """Refuse folders that would be read as well as written. Raises: DataError."""
    read_from = [folder.resolve() for folder in (root, mask_root) if folder is not None]
    for name, folder in (("the output folder", output), ("--mask_out", mask_output)):
        if folder is not None and any(folder.resolve().is_relative_to(each) for each in read_from):
            raise DataError(f"{folder}: {name} is within a folder that is read. Name one beside it.")
    if mask_output is not None and os.path.normpath(mask_output) == os.path.normpath(output):
        raise DataError(f"{mask_output}: --mask_out is the output folder. Masks would replace the pictures.")
