"""How much of each image its mask lets be learnt, read before the training; images with empty masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from library.dataset import images
from library.dataset.problems import Joint, Problem, log_warnings
from library.dataset.scan import Sample, Scan
from library.dataset.weighing import Cells
from library.progress import progress

if TYPE_CHECKING:
    from library.cache.store import LatentStore

WITH_NORM = "masks with nothing white in the part that is trained are left out, as mask_area_norm cannot scale nothing"
WITHOUT_NORM = "masks have nothing white in the part that is trained, so nothing of their images is learnt"
REMEDY = "Are they inverted?"


@dataclass(frozen=True)
class MaskShare:
    """What one image's mask lets through."""

    sample: Sample
    share: float  # the mean weight of its cells, in [0, 1]
    is_empty: bool  # no cell of its mask is above 0


def of_cells(sample: Sample, mask: Cells) -> MaskShare:
    """Return what a mask (h, w) in [0, 1] lets through, mask_weight_min included."""
    weights = np.maximum(mask, np.float32(sample.subset.mask_weight_min))
    return MaskShare(sample, float(weights.mean(dtype=np.float64)), not mask.any())


def decoded(samples: Sequence[Sample], *, label: str | None = None) -> list[MaskShare]:
    """Return what the masks of samples let through, of those that have one; read from their files.

    Args:
        samples: in the middle of their pictures, as they are without augmentation.
        label: of a progress bar; None: without one.

    Raises: DataError.
    """
    masked = {(sample.path, sample.transform, sample.mask): sample for sample in samples if sample.mask.kind != "none"}
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        found = pool.map(images.read_mask_weights, masked.values())
        shown = found if label is None else progress(found, label=label, total=len(masked), unit="mask")
        pairs = list(zip(masked.values(), shown, strict=True))
    return [of_cells(sample, mask) for sample, mask in pairs if mask is not None]


def stored(samples: Sequence[Sample], store: LatentStore) -> list[MaskShare]:
    """Return what the masks of samples let through, from the cache that holds these samples. Raises: DataError."""
    masked = {
        (sample.path, sample.transform, sample.mask): index
        for index, sample in enumerate(samples)
        if sample.mask.kind != "none"
    }
    found = ((samples[index], store.mask_weights(index)) for index in masked.values())
    return [of_cells(sample, mask) for sample, mask in found if mask is not None]


def without_empty(found: Scan) -> Scan:
    """Return the scan without the images whose loss mask_area_norm is to scale and whose masks are empty; name them.

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
    empty = [each for each in decoded(asked, label="looking for empty masks") if each.is_empty]
    name(empty, WITH_NORM)
    gone = {(each.sample.path, each.sample.transform, each.sample.mask) for each in empty}

    def is_kept(sample: Sample) -> bool:
        return not sample.subset.mask_area_norm or (sample.path, sample.transform, sample.mask) not in gone

    samples, validation = (tuple(filter(is_kept, each)) for each in (found.samples, found.validation))
    return replace(found, samples=samples, validation=validation)


def name(empty: Sequence[MaskShare], what: str) -> None:
    """Warn of empty masks in one line, with the names of their images; what: follows their number."""
    log_warnings([problem_of(each.sample, what) for each in empty])


def problem_of(sample: Sample, what: str) -> Problem:
    """Return an empty mask as a problem that is told with others of its kind."""
    path = sample.mask.path or sample.path
    return Problem("warning", path, f"1 {what}: {sample.path}. {REMEDY}", Joint(what, str(sample.path), REMEDY))
