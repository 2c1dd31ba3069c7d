"""Checks of settings that have no effect, or work against each other."""

from __future__ import annotations

from collections.abc import Iterator

from library.dataset import cut_settings, mask_settings
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.problems import Problem, listed
from library.inspection.kinds import found
from library.inspection.scene import Scene

OF_MASKS = ("mask_labels", *mask_settings.ACTING_ON_MASKS)
OF_PLACEMENT = tuple(name for name, needed in cut_settings.PARTS.items() if needed == "random_placement")


def idle_mask_settings(scene: Scene) -> Iterator[Problem]:
    """Yield settings of masks that no masked image has; where masks may only be missing by mistake, nothing."""
    has_errors = any(problem.severity == "error" for problem in scene.scan.problems)
    masked = {id(sample.subset) for sample in scene.samples if sample.mask.is_given}
    has_masks = {name for subset in _subsets(scene) if id(subset) in masked for name in _set(subset, OF_MASKS)}
    for subset in _subsets(scene):
        may_have_masks = subset.conditioning_data_dir is not None and has_errors
        if id(subset) not in masked and not may_have_masks:
            names = [name for name in _set(subset, OF_MASKS) if name not in has_masks]
            if subset.random_placement:  # which fills what it leaves free
                names = [name for name in names if name != "mask_fill"]
            if names:
                reason = f"{listed(names)} has no effect: no image here has a mask."
                yield found("mask-settings-idle", subset.source, reason)


def idle_placement(scene: Scene) -> Iterator[Problem]:
    """Yield settings of what is switched off."""
    for subset in _subsets(scene):
        names = [] if subset.random_placement else _set(subset, OF_PLACEMENT)
        if names:
            remedy = "Set random_placement = true, or leave it out."
            reason = f"{listed(names)} has no effect without random_placement."
            yield found("placement-idle", subset.source, reason, remedy=remedy)
        if subset.mask_aware_zoom > 1 and not subset.mask_aware_crop:
            remedy = "Set mask_aware_crop = true, or leave it out."
            reason = "mask_aware_zoom has no effect without mask_aware_crop."
            yield found("placement-idle", subset.source, reason, remedy=remedy)


def contradictions(scene: Scene) -> Iterator[Problem]:
    """Yield settings of masks that take away what others give."""
    for subset in _subsets(scene):
        source = subset.source
        if subset.mask_weight_min >= 1:
            reason = "mask_weight_min = 1 lets everything be learnt: the masks have no effect."
            yield found("mask-settings-contradict", source, reason, remedy="Set it well below 1.")
        if subset.unmasked_probability >= 1:
            reason = "unmasked_probability = 1 shows every image without its mask: the masks have no effect."
            yield found("mask-settings-contradict", source, reason, remedy="Set it below 1.")
        if subset.mask_labels and all(weight == 0 for _, weight in subset.mask_labels) and not subset.mask_invert:
            reason = "mask_labels gives every label the weight 0: nothing is learnt."
            yield found("mask-settings-contradict", source, reason, remedy="Give what is to be learnt a weight.")


def learnt_fills(scene: Scene) -> Iterator[Problem]:
    """Yield weights of what is masked out that let a fill be learnt; reading the config says that too."""
    for subset in _subsets(scene):
        if 0 < subset.mask_weight_min < 1 and set(subset.mask_fill) != {"keep"}:
            reason = f"mask_weight_min = {subset.mask_weight_min:g} lets the fill be learnt that mask_fill puts there."
            remedy = 'Set mask_weight_min = 0, or mask_fill = "keep".'
            yield found("mask-settings-contradict", subset.source, reason, remedy=remedy)


def _subsets(scene: Scene) -> list[SubsetConfig]:
    return [subset for config in scene.configs for subset in _of(config)]


def _of(config: DatasetConfig) -> tuple[SubsetConfig, ...]:
    return config.subsets


def _set(subset: SubsetConfig, names: tuple[str, ...]) -> list[str]:
    """Return those of the settings that differ from their defaults."""
    return [name for name in names if subset.sets(name)]
