"""What the mask settings of a subset demand of each other, and which of them have nothing to act on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from library.dataset import images
from library.errors import OptionError

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig
    from library.dataset.scan import Sample

log = logging.getLogger(__name__)

ACTING_ON_MASKS = (
    "mask_fill",
    "mask_invert",
    "mask_erode",
    "mask_dilate",
    "mask_feather",
    "mask_weight_min",
    "mask_area_norm",
    "mask_prior_weight",
    "unmasked_probability",
)


def check(place: str, subset: SubsetConfig) -> None:
    """Refuse mask settings that contradict each other, and warn of those that lead to what is seldom meant.

    Args:
        place: of the subset, for messages.
        subset: resolved.

    Raises: OptionError.
    """
    fills = ", ".join(name for name in dict.fromkeys(subset.mask_fill) if name != "keep")
    if fills and subset.unmasked_probability:
        raise OptionError(
            f"{place}: unmasked_probability {subset.unmasked_probability:g} shows and learns what mask_fill {fills} is "
            "to keep from the model. Leave out one of the two."
        )
    if fills and subset.mask_weight_min:
        log.warning(
            "%s: mask_weight_min %g lets the fill itself (mask_fill %s) be learnt at that weight",
            *(place, subset.mask_weight_min, fills),
        )
    if subset.sets("mask_area_floor") and not subset.mask_area_norm:
        log.warning("%s: mask_area_floor has no effect without mask_area_norm", place)
    if subset.mask_labels and subset.conditioning_data_dir is None:
        log.warning("%s: mask_labels has no effect without conditioning_data_dir: only mask files hold labels", place)


def warn_of_idle(subsets: Iterable[SubsetConfig], samples: Iterable[Sample]) -> None:
    """Warn of settings that act on masks where no image of the run has one."""
    kinds = {sample.mask.kind for sample in samples}
    idle = set() if kinds - {"none", "padding"} else {*ACTING_ON_MASKS}
    if "padding" in kinds:
        idle -= {"mask_fill"}  # it fills the canvas that placed images leave free
    for subset in subsets:
        for name in sorted(idle, key=ACTING_ON_MASKS.index):
            if subset.sets(name):
                log.warning("%s: %s has no effect: no image has a mask", subset.source, name)


def warn_of_idle_dropping(reach: int | None, samples: Sequence[Sample]) -> None:
    """Warn of --mask_token_drop where every part of every image is learnt."""
    if reach is None:
        return
    masked = [sample for sample in samples if sample.mask.kind != "none"]  # the canvas round placed images counts
    if not masked:
        log.warning("--mask_token_drop has no effect: none of the %d images has a mask", len(samples))
    elif all(sample.subset.mask_weight_min for sample in masked):
        log.warning("--mask_token_drop has no effect: mask_weight_min gives every cell some weight")


def read_first_label_maps(samples: Iterable[Sample]) -> None:
    """Look into the first label map of each subset: a table that does not fit is found before a model is loaded.

    Raises: DataError.
    """
    seen: set[tuple[int, int]] = set()
    for sample in samples:
        path, labels, subset = sample.mask.path, sample.mask.shape.labels, (sample.dataset, sample.subset.index)
        if path is not None and labels and subset not in seen:
            seen.add(subset)
            images.decode_mask(images.read_bytes(path), path, labels)


def warn_of_idle_prior(every: int, samples: Iterable[Sample]) -> None:
    """Warn of --mask_prior_every where nothing is held to the untrained model."""
    if every > 1 and not any(sample.subset.mask_prior_weight and sample.mask.kind != "none" for sample in samples):
        log.warning("--mask_prior_every has no effect: no image with a mask has a mask_prior_weight")
