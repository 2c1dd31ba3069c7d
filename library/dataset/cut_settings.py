"""What the settings of a subset that choose its cuts demand of each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.errors import OptionError

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig

DEFAULT_VARIANTS = 4
log = logging.getLogger(__name__)

# Each of these says where in the bucket a picture stands.
RIVALS = {
    "random_placement": ("random_crop", "face_crop_aug_range", "mask_aware_crop"),
    "mask_aware_crop": ("face_crop_aug_range",),
}
PARTS = {
    "mask_aware_zoom": "mask_aware_crop",
    "placement_scale": "random_placement",
    "placement_rotate": "random_placement",
    "placement_variants": "random_placement",
}


def warn_of_idle(subsets: Iterable[SubsetConfig], *, is_cached: bool) -> None:
    """Warn of placement_variants where no cache holds them: each draw is a variant of its own."""
    for subset in subsets:
        count = subset.placement_variants
        if subset.random_placement and not is_cached and count != DEFAULT_VARIANTS:
            log.warning(
                "%s: placement_variants %d has no effect without --cache_latents: each draw is placed anew",
                *(subset.source, count),
            )


def check(place: str, subset: SubsetConfig) -> None:
    """Warn of settings without effect, and refuse those of which only one can be honoured.

    Args:
        place: of the subset, for messages.
        subset: resolved.

    Raises: OptionError.
    """
    for name, others in RIVALS.items():
        for other in others:
            if getattr(subset, name) and getattr(subset, other):
                raise OptionError(
                    f"{place}: {name} and {other} both say where {subset.source} is cut. Leave out one of the two."
                )
    for name, needed in PARTS.items():
        if subset.sets(name) and not getattr(subset, needed):
            log.warning("%s: %s has no effect without %s", place, name, needed)
