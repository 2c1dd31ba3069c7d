"""What the mask settings of a subset demand of each other, and which of them have nothing to act on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    if subset.mask_labels and subset.conditioning_data_dir is None:
        log.warning("%s: mask_labels has no effect without conditioning_data_dir: only mask files hold labels", place)


def warn_of_idle(subsets: Iterable[SubsetConfig], samples: Iterable[Sample]) -> None:
    """Warn of settings that act on masks where no image of the run has one."""
    if any(sample.mask.kind != "none" for sample in samples):
        return
    for subset in subsets:
        plain = type(subset)(subset.image_dir)
        for name in ACTING_ON_MASKS:
            if getattr(subset, name) != getattr(plain, name):
                log.warning("%s: %s has no effect: no image has a mask", subset.source, name)
