"""What masks mean for captions: tags that are left out while an image is masked, and captions beside mask files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset import captions, files
from library.dataset.captions import NO_TAGS
from library.dataset.problems import Joint, Problem
from library.errors import DataError, did_you_mean
from library.masks import MaskSource

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig
    from library.dataset.scan import Sample

IDLE = "mask-settings-idle"
NEAR = 0.7  # alikeness of a tag that was perhaps meant: among many words some are a bit alike by chance
TEXT_FILES = (".txt", ".caption", ".cap")  # what captions are called where caption_extension is not set


def left_out(sample: Sample) -> frozenset[str]:
    """Return the tags, case-folded, that a sample's caption does not have when it is shown with its mask.

    A tag with a label is left out while the label weighs nothing, which only the label map in a mask file can say.
    """
    subset = sample.subset
    if not subset.mask_drop_tags or not sample.mask.is_given:
        return NO_TAGS
    weights = dict(subset.mask_labels)
    learnt_by_none = 1.0 if subset.mask_invert else 0.0
    tags = set()
    for each in subset.mask_drop_tags:
        if isinstance(each, str):
            tags.add(each.casefold())
        elif sample.mask.kind == "file" and weights.get(each[1], weights.get("other", 0.0)) == learnt_by_none:
            tags.add(each[0].casefold())
    return frozenset(tags)


def ways(sample: Sample) -> tuple[frozenset[str], ...]:
    """Return what may be left out of a sample's caption in one draw or another: with its mask, and without."""
    tags = left_out(sample)
    unmasked = 0.0 if sample.is_validation else sample.subset.unmasked_probability
    if not tags or unmasked >= 1:
        return (NO_TAGS,)
    return (tags, NO_TAGS) if unmasked else (tags,)


def beside(masks: Mapping[Path, MaskSource], subset: SubsetConfig) -> dict[Path, tuple[str, ...] | DataError]:
    """Return the captions that lie beside mask files, by image; an image whose mask has none is not among them.

    Args:
        masks: of the images.
        subset: says what a caption file is called, and whether its lines are wildcards.
    """
    with_file = {image: mask.path for image, mask in masks.items() if mask.path is not None}
    found = files.read_all(partial(captions.read, subset=subset), list(with_file.values()))
    return {image: lines for image, lines in zip(with_file, found, strict=True) if lines is not None}


def nothing_beside(masks: Mapping[Path, MaskSource], subset: SubsetConfig) -> Problem:
    """Return the warning that no mask file of a subset, of which there is one at least, has a caption beside it."""
    paths = [mask.path for mask in masks.values() if mask.path is not None]
    others = [end for end in TEXT_FILES for path in paths if path.with_suffix(end).exists()]
    hint = f' There are {others[0]} files: is caption_extension = "{others[0]}" meant?' if others else ""
    folder = subset.conditioning_data_dir
    message = (
        f"mask_captions: none of the {len(paths)} masks of {subset.source} has a {subset.caption_extension} file "
        f"beside it in {folder}.{hint}"
    )
    return Problem("warning", subset.source, message, code="mask-caption-missing")


def problems(samples: Sequence[Sample]) -> Iterator[Problem]:
    """Yield what of the settings for captions and masks finds nothing to act on.

    Args:
        samples: all that are trained on or held back. Subsets with the same tags are looked at together, because a
            setting that several inherit needs to fit only one of them.
    """
    by_tags: dict[tuple[str | tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        if sample.subset.mask_drop_tags:
            by_tags.setdefault(sample.subset.mask_drop_tags, []).append(sample)
    for tags, group in by_tags.items():
        yield from _idle_tags(tags, group)
    yield from _emptied(samples)
    wanting = [sample for sample in samples if sample.subset.mask_captions]
    if wanting and all(sample.mask.path is None for sample in wanting):
        message = f"mask_captions has no effect: none of the {len(wanting)} images it is set for has a mask file."
        yield Problem("warning", wanting[0].subset.source, message, code=IDLE)


def _idle_tags(tags: Iterable[str | tuple[str, str]], samples: Sequence[Sample]) -> Iterator[Problem]:
    source = samples[0].subset.source
    labelled = [each for each in tags if not isinstance(each, str)]
    if labelled and not any(sample.subset.mask_labels for sample in samples):
        tag, label = labelled[0]
        message = (
            f'{source}: mask_drop_tags ties "{tag}" to label {label}, but there is no mask_labels. Add the weights of '
            "the labels, or make mask_drop_tags a list of tags."
        )
        yield Problem("error", source, message, code="mask-settings-contradict")
        return
    masked = [sample for sample in samples if sample.mask.is_given]
    if not masked:
        message = f"mask_drop_tags has no effect: none of the {len(samples)} images it is set for has a mask."
        yield Problem("warning", source, message, code=IDLE)
        return
    known: set[str] = set()
    for sample in masked:
        known.update(*(captions.tags_of(line, sample.subset) for line in sample.captions))
    for tag in (each if isinstance(each, str) else each[0] for each in tags):
        if tag.casefold() not in known:
            message = f'{source}: mask_drop_tags has "{tag}", which is a tag of no masked image.'
            near = did_you_mean(tag.casefold(), sorted(known), least=NEAR)
            yield Problem("warning", source, f"{message}{near}", code="drop-tags-unused")


def _emptied(samples: Iterable[Sample]) -> Iterator[Problem]:
    for sample in samples:
        tags = left_out(sample)
        if not tags or not any(sample.captions):
            continue
        if not captions.preview(sample.captions, sample.subset, tags).strip():
            joint = Joint("captions are empty without what mask_drop_tags leaves out", sample.path.name)
            message = f"{sample.path}: its caption is empty without what mask_drop_tags leaves out."
            yield Problem("warning", sample.path, message, joint, code="drop-tags-all")
