"""What one pass over the pixels of a dataset finds out: facts of each picture and mask, which the checks judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from library.dataset.problems import Problem
from library.dataset.scan import Sample

Bits = npt.NDArray[np.bool_]
Profile = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FileFacts:
    """What a picture file is."""

    format: str  # Pillow's name: PNG, JPEG
    mode: str  # Pillow's: RGB, L, P, CMYK
    bits: int  # of a channel
    num_frames: int
    orientation: int  # EXIF, 1 to 8
    digest: bytes  # of the file


@dataclass(frozen=True)
class AlphaFacts:
    """The transparency of a picture."""

    least: int  # 0 is transparent, 255 opaque
    most: int
    hidden: float  # share of the pixels that are transparent altogether
    hidden_detail: float  # share of these that differ from their neighbour


@dataclass(frozen=True, eq=False)
class PictureFacts:
    """A picture as it is stored."""

    file: FileFacts
    alpha: AlphaFacts | None
    profile: Profile | None  # (n,) of unit length: its brightness in coarse squares; None for one without any detail
    bits: Bits  # (n,): whether it grows brighter from each square to its neighbour


@dataclass(frozen=True)
class MaskFacts:
    """A mask as it is painted, and specks in it once it is shaped."""

    file: FileFacts | None  # None: not a file of its own
    least: int
    most: int
    coloured: float  # share of the pixels whose channels differ
    alpha: tuple[int, int] | None  # least and most of a transparency in the mask file
    ringing: float  # share of the pixels that are nearly black or nearly white, but not quite
    labels: tuple[tuple[str, float], ...]  # of a label map: what the table does not list, and its share of the pixels
    listed: frozenset[str]  # of a label map: entries of the table that it has
    specks: int


@dataclass(frozen=True)
class Strokes:
    """Parts of a mask that are so thin that no latent cell is mostly white."""

    share: float  # of all that is white, in [0, 1]
    num_cells: int
    width: float  # pixels of the image
    dilate: float  # pixels of the image by which they should grow


@dataclass(frozen=True)
class Coverage:
    """What was found by reading the pixels of one sample's mask."""

    judged: float  # mean of the mask as it is judged, in [0, 1]: where each draw shows another part, of all of it
    learnt: float  # mean weight as trained, mask_weight_min and random_placement included
    centre: float  # of what is judged, the mean of the middle half of both sides
    frame: float  # of what is judged, the mean along the border
    file: Path | None = None  # where the weights are written
    lost: float = 0.0  # share of what is white that the cut leaves out
    strokes: Strokes | None = None


@dataclass(frozen=True, eq=False)
class Looked:
    """One sample looked at."""

    sample: Sample
    picture: PictureFacts | None  # None: cannot be read, or made by a class of the user's
    mask: MaskFacts | None  # None: has none, or it cannot be read
    coverage: Coverage | None  # None: cannot be read
    problems: tuple[Problem, ...] = ()  # what cannot be read, and why
    thumbnail: bytes | None = None  # WebP: as trained, and beside it what its mask lets through
