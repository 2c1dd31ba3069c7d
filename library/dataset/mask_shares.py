"""How much of each image its mask lets be learnt, read before the training; images with empty masks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from library.dataset import images, looks, shares
from library.dataset.problems import listed
from library.dataset.scan import Sample, Scan
from library.dataset.weighing import Cells
from library.masks import cell_weights
from library.progress import progress

if TYPE_CHECKING:
    from library.cache.store import LatentStore

log = logging.getLogger(__name__)

EMPTY = "nothing white in the part that is trained"
LEFT_OUT = "Left out, as mask_area_norm has nothing to scale there. If black and white are swapped, set mask_invert."
KEPT = "Nothing is learnt there. If black and white are swapped, set mask_invert."


@dataclass(frozen=True)
class MaskShare:
    """What one image's mask lets through."""

    sample: Sample
    share: float  # the mean weight of its cells, in [0, 1]
    is_empty: bool  # no cell of its mask is above 0


def of_cells(sample: Sample, mask: Cells | None) -> MaskShare | None:
    """Return what a mask (h, w) in [0, 1] lets through, mask_weight_min included; None for no mask."""
    if mask is None:
        return None
    least = sample.subset.mask_weight_min
    weights = cell_weights(mask, least, images.read_cover(sample) if least else None)
    return MaskShare(sample, float(weights.mean(dtype=np.float64)), not mask.any())


def decoded(samples: Sequence[Sample], *, label: str | None = None) -> list[MaskShare]:
    """Return what the masks of samples let through, of those that have one; read from their files.

    Args:
        samples: in the middle of their pictures, as they are without augmentation.
        label: of a progress bar; None: without one.

    Raises: DataError.
    """
    masked = [samples[index] for index in masked_once(samples)]
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        found = pool.map(_decoded, masked)
        shown = found if label is None else progress(found, label=label, total=len(masked), unit=" masks")
        return [share for share in shown if share is not None]


def _decoded(sample: Sample) -> MaskShare | None:
    """Return what the mask of a sample lets through; of one that is cut elsewhere at each draw, in the middle."""
    share = of_cells(sample, images.read_mask_weights(sample))
    if share is None or not (share.is_empty and looks.is_cut_anew(sample)):
        return share
    image, shown, _ = images.of_sample(sample)  # other cuts may show what the middle does not
    whole = images.mask_of(image, shown.mask, shown.transform.source)
    return replace(share, is_empty=whole is None or not whole.any())


def masked_once(samples: Sequence[Sample]) -> list[int]:
    """Return the indices of samples with masks, of those that are alike one."""
    once = {identity(sample): index for index, sample in enumerate(samples) if sample.mask.is_given}
    return list(once.values())


def identity(sample: Sample) -> tuple[object, ...]:
    """Return what samples have alike whose masks let the same through."""
    return sample.path, sample.transform, sample.mask, sample.subset.mask_weight_min


def stored(samples: Sequence[Sample], store: LatentStore) -> list[MaskShare]:
    """Return what the masks of samples let through, from the cache that holds these samples. Raises: DataError."""
    found = [of_cells(samples[index], store.mask_weights(index)) for index in masked_once(samples)]
    return [share for share in found if share is not None]


def without_empty(found: Scan) -> Scan:
    """Return the scan without the images whose loss mask_area_norm is to scale and whose masks are empty; name them.

    Regularisation images become as many as the images that are left.

    Masks are read for that. Those that a class of the user's makes anew at each draw stay.

    Raises: DataError.
    """
    asked = [
        sample
        for sample in (*found.samples, *found.validation)
        if sample.subset.mask_area_norm > 0 and sample.mask.kind in ("file", "alpha")
    ]
    if not asked:
        return found
    empty = [share for share in decoded(asked, label="looking for empty masks") if share.is_empty]
    warn_of_empty(empty, LEFT_OUT)
    gone = {identity(share.sample) for share in empty}

    def is_kept(sample: Sample) -> bool:
        return not sample.subset.mask_area_norm or identity(sample) not in gone

    samples, validation = (tuple(filter(is_kept, each)) for each in (found.samples, found.validation))
    return replace(found, samples=tuple(shares.balanced_again(samples)), validation=validation)


def warn_of_empty(empty: Sequence[MaskShare], outcome: str) -> None:
    """Name the images of empty masks in one line that ends with what becomes of them."""
    names = [str(share.sample.path) for share in empty]
    if len(names) == 1:
        log.warning("%s: its mask has %s. %s", names[0], EMPTY, outcome)
    elif names:
        log.warning("%d masks have %s: %s. %s", len(names), EMPTY, listed(names), outcome)
