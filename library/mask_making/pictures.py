"""What goes in and what comes out: a picture as seen, and the mask that was drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.dataset.geometry import Pixels

LEARNT, MASKED_OUT = 255, 0


@dataclass(frozen=True)
class Picture:
    """A picture as seen: its EXIF orientation applied."""

    path: Path
    name: str  # relative to the folder of pictures, with forward slashes
    rgb: Pixels  # (H, W, 3); colours under transparent pixels as the file has them
    alpha: Pixels | None  # (H, W); None if it has no transparency


@dataclass(frozen=True)
class Drawn:
    """A mask of its picture's size."""

    mask: Pixels  # (H, W), 255 is learnt
    doubt: str = ""  # why it may be wrong; empty where nothing speaks against it


# Draws the masks of some pictures. It raises a UserError where no picture can have one.
Source = Callable[[Sequence[Picture]], list[Drawn]]


def one_by_one(draw: Callable[[Picture], Drawn]) -> Source:
    """Return a source that draws each mask by itself."""
    return lambda pictures: [draw(picture) for picture in pictures]
