"""The one transform of an image, its mask and its size conditioning: resize, crop, flip."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from library.dataset import placement
from library.dataset.placement import Placement
from library.errors import OptionError, did_you_mean

Size = tuple[int, int]  # (width, height)
Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels from left to before right
Pixels = npt.NDArray[np.uint8]  # (H, W) or (H, W, C)

OPENCV_FILTERS: Mapping[str, int] = MappingProxyType(
    {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
)
PILLOW_FILTERS: Mapping[str, Image.Resampling] = MappingProxyType(
    {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
)


@dataclass(frozen=True)
class Transform:
    """How the pixels of a file become the pixels of a bucket: resize to `resized`, cut `target` at `crop`, mirror."""

    source: Size  # the image as seen, its EXIF orientation applied
    resized: Size
    crop: tuple[int, int]  # left, top of the cut in the resized image, turned if it is placed
    target: Size  # the bucket
    interpolation: str | None = None  # None: area where neither side grows, else Lanczos
    flip: bool = False  # mirrored left to right after the cut
    reach: Box | None = None  # least left and top, most left and top of a drawn cut; None: anywhere
    placement: Placement | None = None  # None: the picture fills its bucket


@dataclass(frozen=True)
class Face:
    """A face in an image, in pixels of the file as seen."""

    x: int  # its centre
    y: int
    width: int
    height: int


class Augmentation(Protocol):
    """The settings of a subset that change geometry from draw to draw."""

    @property
    def flip_aug(self) -> bool:
        """Whether half of the draws are mirrored."""

    @property
    def random_crop(self) -> bool:
        """Whether the cut moves within the resized image."""

    @property
    def face_crop_aug_range(self) -> tuple[float, float] | None:
        """How many face sizes long the cut may be, smallest and largest."""


def apply(transform: Transform, pixels: Pixels) -> Pixels:
    """Return pixels (H, W) or (H, W, C) as the bucket shows them: (h, w) or (h, w, C), h and w being transform.target.

    The pixels may be an image or a mask of another size with the same proportions: both end at transform.resized, so
    that one cut fits both. Every channel is resized alone: colours under a transparent pixel stay what they are.
    Where a placed picture leaves the canvas free, a mask is black, and colours go on as they are at the edge.
    """
    resized = resize(pixels, transform.resized, transform.interpolation)
    (left, top), (width, height) = transform.crop, transform.target
    if transform.placement is not None:
        cut = placement.warp(transform, resized)
    else:
        cut = resized[top : top + height, left : left + width]
    assert cut.shape[:2] == (height, width), f"the cut leaves the image: {transform}"
    return np.ascontiguousarray(cut[:, ::-1] if transform.flip else cut)


def coverage(transform: Transform) -> Pixels:
    """Return (h, w) uint8, how much of each of the bucket's pixels the picture covers: 255 but where it is placed."""
    width, height = transform.resized
    if transform.placement is None:
        return np.full(transform.target[::-1], 255, np.uint8)
    return apply(transform, np.full((height, width), 255, np.uint8))


def resize(pixels: Pixels, size: Size, interpolation: str | None) -> Pixels:
    """Return pixels (H, W) or (H, W, C) at size (width, height), with the filter that interpolation names.

    Raises: OptionError for an unknown filter.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    name = interpolation or ("area" if size[0] <= width and size[1] <= height else "lanczos")
    if name in OPENCV_FILTERS:
        return np.asarray(cv2.resize(pixels, size, interpolation=OPENCV_FILTERS[name]), dtype=np.uint8)
    if name not in PILLOW_FILTERS:
        choices = (*PILLOW_FILTERS, *OPENCV_FILTERS)
        near = did_you_mean(name, choices)
        raise OptionError(f"resize_interpolation must be one of {', '.join(choices)}, got '{name}'.{near}")
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # Pillow would multiply the colours by alpha and lose the hidden ones
        colours, alpha = (resize(np.ascontiguousarray(part), size, name) for part in (pixels[..., :3], pixels[..., 3]))
        return np.dstack((colours, alpha))
    return np.asarray(Image.fromarray(pixels).resize(size, PILLOW_FILTERS[name]))


def draw(transform: Transform, settings: Augmentation, rng: random.Random, *, face: Face | None = None) -> Transform:
    """Return this draw's transform: mirrored half the time (flip_aug), cut elsewhere (random_crop), cut round a face.

    Args:
        transform: the sample's own: resized to cover the bucket, cut in the middle.
        settings: what the subset asks for.
        rng: the draw's own generator; the same numbers are taken whatever the settings.
        face: where the image's face is, for face_crop_aug_range; None leaves that setting without effect.
    """
    mirror, across, down = rng.random(), rng.random(), rng.random()
    if face is not None and settings.face_crop_aug_range is not None:
        transform = _cut_round_face(transform, face, settings.face_crop_aug_range, settings.random_crop, rng)
    elif settings.random_crop:
        (resized_w, resized_h), (width, height) = transform.resized, transform.target
        left, top, most_left, most_top = transform.reach or (0, 0, resized_w - width, resized_h - height)
        crop = (left + int(across * (most_left - left + 1)), top + int(down * (most_top - top + 1)))
        transform = replace(transform, crop=crop)
    return replace(transform, flip=settings.flip_aug and mirror < 0.5)


def _cut_round_face(
    transform: Transform, face: Face, face_crop_aug_range: tuple[float, float], random_crop: bool, rng: random.Random
) -> Transform:
    """Return transform with a drawn scale, cut round the face: the bucket's short side is `range` face sizes long.

    As sd-scripts: never enlarged beyond what covers the bucket, the cut jitters by a twentieth of the face when the
    range is open, and by up to the whole picture with random_crop.
    """
    (source_w, source_h), (width, height) = transform.source, transform.target
    face_size = max(face.width, face.height, 1)
    cover = max(width / source_w, height / source_h)
    near, far = sorted(face_crop_aug_range)
    smallest = max(cover, min(1.0, min(width, height) / (face_size * far)))
    largest = max(smallest, min(1.0, min(width, height) / (face_size * near)))
    scale = rng.uniform(smallest, largest)
    resized = (max(width, int(source_w * scale + 0.5)), max(height, int(source_h * scale + 0.5)))

    def start(length: int, target: int, centre: float) -> int:
        at = int(centre * scale + 0.5) - target // 2
        if random_crop:
            reach = int(max(length - centre * scale, centre * scale))
            at += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif near != far and face_size >= 40:  # a smaller face has no pixels to spare
            reach = int(face_size * scale / 20)
            at += rng.randint(-reach, reach)
        return max(0, min(at, length - target))

    crop = (start(resized[0], width, face.x), start(resized[1], height, face.y))
    return replace(transform, resized=resized, crop=crop)


def face_in_name(path: Path) -> Face | None:
    """Return the face that a file name ends with, as in `cat_120_80_64_64.png` (centre x, centre y, width, height)."""
    parts = path.stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    x, y, width, height = map(int, parts[-4:])
    return Face(x, y, width, height) if x > 0 else None


@dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told about a cut: each pair is (height, width) or (top, left)."""

    original: tuple[int, int]
    crop_top_left: tuple[int, int]
    target: tuple[int, int]


def size_conditioning(transform: Transform) -> SizeConditioning:
    """Return the sizes as they truly are: the crop is the cut that was made, seen in the mirrored image if mirrored.

    Of a placed picture the original is the smallest upright canvas that holds both picture and bucket, as large as it
    would be in pixels of the file: so a picture shown small counts as sharp, as it is.
    """
    if transform.placement is None:
        source, canvas, (left, top) = transform.source, transform.resized, transform.crop
    else:
        turned = placement.turned_size(transform.resized, transform.placement.angle)
        left, top = (max(0, start) for start in transform.crop)
        ends = [max(turned[axis], transform.crop[axis] + transform.target[axis]) for axis in (0, 1)]
        canvas = (ends[0] + left - transform.crop[0], ends[1] + top - transform.crop[1])
        source = _in_pixels_of_file(canvas, transform)
    if transform.flip:
        left = canvas[0] - transform.target[0] - left
    return SizeConditioning(source[::-1], (top, left), transform.target[::-1])


def _in_pixels_of_file(canvas: Size, transform: Transform) -> Size:
    (width, height), (resized_w, resized_h) = transform.source, transform.resized
    scale = math.sqrt(width * height / (resized_w * resized_h))
    return int(canvas[0] * scale + 0.5), int(canvas[1] * scale + 0.5)
