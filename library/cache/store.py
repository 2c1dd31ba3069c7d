"""Latents with masks, and text, at hand: from entries on disk or from memory, behind one face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from library.cache import latents as entries
from library.cache import text
from library.cache.latents import CachedLatents
from library.cache.text import Key, Outputs
from library.masks import MaskKind, Sums, to_array


@dataclass(frozen=True)
class Stored:
    """Where the latents of one image in one bucket are."""

    place: Path | CachedLatents
    mask_kind: MaskKind  # what this run masks it with; a mask that an entry happens to hold does not count


class LatentStore:
    """The latents of a run, by the index of the sample and the number of its look."""

    def __init__(self, stored: Sequence[Sequence[Stored]]) -> None:
        """Take where the looks of each sample are, one at least."""
        self._stored = tuple(map(tuple, stored))

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def is_in_memory(self) -> bool:
        """Whether latents are kept in this process: loading them in others would copy them."""
        return any(isinstance(stored.place, CachedLatents) for looks in self._stored for stored in looks)

    def get(self, index: int, *, flip: bool, look: int = 0) -> tuple[Tensor, Sums | None]:
        """Return the latents (C, h, w) and the mask (h, w) of a sample, both mirrored if flip; no mask: 1 everywhere.

        Raises: DataError if an entry on disk is gone or damaged.
        """
        stored = self._stored[index][look]
        if isinstance(stored.place, Path):
            latents, mask = entries.read(stored.place, flip=flip, mask_kind=stored.mask_kind)
        else:
            mask = stored.place.mask
            chosen = stored.place.flipped if flip else stored.place.latents
            assert chosen is not None, "flip_aug is known when the store is built"
            latents = chosen
        if flip and mask is not None:
            mask = np.ascontiguousarray(mask[:, ::-1])
        return latents, mask

    def mask_weights(self, index: int) -> npt.NDArray[np.float32] | None:
        """Return the mask (h, w) of a sample in its first look, in [0, 1], not mirrored; None: 1 everywhere.

        Raises: DataError.
        """
        stored = self._stored[index][0]
        place = stored.place
        mask = entries.read_mask(place, stored.mask_kind) if isinstance(place, Path) else place.mask
        return None if mask is None else to_array(mask)


class TextStore:
    """What the text encoders of a run made of its texts."""

    def __init__(self, places: Mapping[Key, Path | Outputs]) -> None:
        self._places = dict(places)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: Key) -> Outputs:
        """Return the outputs of texts that were encoded together. Raises: DataError if an entry is gone or damaged."""
        place = self._places[key]
        return text.read(place) if isinstance(place, Path) else place

    def stacked(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs (B, ...) by name of captions that were encoded one by one. Raises: DataError."""
        found = {caption: self.get((caption,)) for caption in dict.fromkeys(captions)}
        first = found[captions[0]]
        return {name: torch.stack([found[caption][name] for caption in captions]) for name in first}
