"""Which mask file belongs to which image: the one with the same name up to the extension."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.dataset.geometry import Size


@dataclass(frozen=True)
class Pairing:
    """The masks of some images, each list sorted as it came."""

    masks: dict[Path, Path]  # image: its mask
    missing: tuple[Path, ...]  # images without a mask
    surplus: tuple[Path, ...]  # masks without an image
    doubled: dict[Path, Path]  # masks that are not taken: the one of the same stem that is, the first by name


def pair(images: Iterable[Path], masks: Sequence[Path]) -> Pairing:
    """Return which of masks belongs to which of images, by their stems, in which small and capital letters differ."""
    images = list(images)
    by_stem: dict[str, Path] = {}
    doubled = {}
    for mask in masks:
        if mask.stem in by_stem:
            doubled[mask] = by_stem[mask.stem]
        else:
            by_stem[mask.stem] = mask
    stems = {image.stem for image in images}
    return Pairing(
        masks={image: by_stem[image.stem] for image in images if image.stem in by_stem},
        missing=tuple(image for image in images if image.stem not in by_stem),
        surplus=tuple(mask for mask in masks if mask.stem not in stems),
        doubled={mask: used for mask, used in doubled.items() if mask.stem in stems},
    )


def near_miss(image: Path, masks: Sequence[Path]) -> Path | None:
    """Return the mask whose name was most likely meant for image, or None."""
    stem = image.stem.casefold()
    by_stem = {mask.stem.casefold(): mask for mask in masks}
    if stem in by_stem:
        return by_stem[stem]
    # Numbered names resemble each other too much: only a mask that contains the name, or is nearly equal, will do.
    containing = [name for name in by_stem if name.startswith(stem) or name.endswith(stem)]
    near = containing or difflib.get_close_matches(stem, by_stem, n=1, cutoff=0.75)
    return by_stem[min(near, key=len)] if near else None


def has_same_aspect(mask: Size, image: Size) -> bool:
    """Return whether a mask is its image rescaled: of the same proportions up to the rounding of its sides."""
    return abs(mask[0] * image[1] - mask[1] * image[0]) <= image[0] + image[1]
