"""The one transform of an image, its mask and its size conditioning: resize, crop, flip."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True)
class Transform:
    """How the pixels of a file become the pixels of a bucket: resize to `resized`, cut `target` at `crop`, mirror."""

    source: Size  # the image as seen, its EXIF orientation applied
    resized: Size
    crop: tuple[int, int]  # left, top of the cut in the resized image
    target: Size  # the bucket
    interpolation: str | None = None  # None: area where neither side grows, else Lanczos
    flip: bool = False  # mirrored left to right after the cut
