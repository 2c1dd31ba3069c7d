"""The inspection as a whole: all checks, each cause told once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from library.dataset.config import DatasetConfig
from library.dataset.problems import Problem
from library.dataset.scan import Scan
from library.inspection import captions, duplicates, folders, masks, pictures, settings, shapes
from library.inspection.facts import Looked
from library.inspection.scene import Check, Scene

QUICK: tuple[Check, ...] = (  # of names, headers, captions and settings
    folders.inner_folders,
    folders.names_with_repeats,
    folders.hidden_files,
    folders.unread_formats,
    folders.same_stems,
    folders.unused_masks,
    shapes.turned,
    shapes.enlarged,
    shapes.extreme,
    shapes.cut,
    shapes.short_batches,
    pictures.too_large,
    captions.blank,
    captions.garbled,
    captions.naming_what_is_masked,
    settings.idle_mask_settings,
    settings.idle_placement,
    settings.contradictions,
    settings.learnt_fills,
)
TOLD_AT_START: tuple[Check, ...] = (  # of training, which has told of some others by then
    folders.inner_folders,
    folders.names_with_repeats,
    folders.unread_formats,
    folders.same_stems,
    folders.unused_masks,
    shapes.enlarged,
    shapes.extreme,
    shapes.cut,
    captions.blank,
    captions.garbled,
    captions.naming_what_is_masked,
    settings.contradictions,
)
OF_PIXELS: tuple[Check, ...] = (  # of what the pass over all pixels found
    pictures.unreadable,
    pictures.animated,
    pictures.deep,
    pictures.of_print,
    pictures.with_palette,
    pictures.unused_transparency,
    pictures.hidden_pictures,
    masks.of_files,
    masks.as_used,
    masks.unused_labels,
    captions.naming_the_background,
    duplicates.duplicates,
)
# What need not be told of a file of which the others are told: they are its cause, or say more.
TOLD_BY: dict[str, tuple[str, ...]] = {
    "image-cut": ("mask-cut-away",),
    "image-similar": ("image-same-stem",),
    "image-duplicate": ("image-same-stem",),
    "alpha-unused": ("image-palette",),
}


def inspect(configs: Sequence[DatasetConfig], scan: Scan, looked: Sequence[Looked] = ()) -> list[Problem]:
    """Return all problems of a dataset: those of the scan, of names and settings, and of the pixels if these were read.

    Args:
        configs: of the datasets.
        scan: what was found in their folders.
        looked: of all samples, from decoding.look_at; empty: only the quick checks are made.
    """
    scene = Scene(configs, scan, looked)
    found = list(scan.problems)
    for check in (*QUICK, *(OF_PIXELS if looked else ())):
        found += check(scene)
    return once(found)


def warnings_at_start(configs: Sequence[DatasetConfig], scan: Scan) -> list[Problem]:
    """Return what training should warn of besides what it says itself, without reading a pixel."""
    scene = Scene(configs, scan)
    found = once(problem for check in TOLD_AT_START for problem in check(scene))
    return [problem for problem in found if problem.severity == "warning"]


def once(problems: Iterable[Problem]) -> list[Problem]:
    """Return problems, each once, without those whose cause another tells of the same file."""
    alike = {(problem.code, problem.path, problem.message): problem for problem in reversed(list(problems))}
    problems = list(reversed(alike.values()))  # two datasets may share a folder
    told: dict[Path, set[str]] = {}
    for problem in problems:
        for path in (problem.path, *problem.files):
            told.setdefault(path, set()).add(problem.code)
    return [each for each in problems if told[each.path].isdisjoint(TOLD_BY.get(each.code, ()))]
