"""Checks of folders: what lies there and is not read, and what is read under a name that means something else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from library.dataset.config import SubsetConfig
from library.dataset.faults import folders_of_images
from library.dataset.files import image_extensions, images_if_readable, list_folders, list_images
from library.dataset.problems import Problem, listed
from library.inspection.kinds import found
from library.inspection.scene import Scene

SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
UNREAD_FORMATS: tuple[str, ...] = (".gif", ".tif", ".tiff", ".heic", ".heif", ".psd", ".tga", ".jfif", ".jp2")
UNREAD_FORMATS += (".dds", ".exr", ".hdr", ".avif", ".jxl")  # where this installation cannot read them
MASK_WORDS = ("mask", "masks")


def _subsets(scene: Scene) -> list[SubsetConfig]:
    """Return the subsets that read whole folders, one for each folder that is there."""
    by_folder: dict[Path, SubsetConfig] = {}
    for config in scene.configs:
        for subset in config.subsets:
            if subset.metadata_file is None and subset.image_dir.is_dir():
                by_folder.setdefault(subset.image_dir, subset)
    return list(by_folder.values())


def _named(scene: Scene) -> set[Path]:
    """Return all folders that the configs name."""
    folders = set()
    for config in scene.configs:
        for subset in config.subsets:
            folders |= {subset.image_dir.resolve()}
            folders |= {subset.conditioning_data_dir.resolve()} if subset.conditioning_data_dir else set()
    return folders


def inner_folders(scene: Scene) -> Iterator[Problem]:
    """Yield folders within an image folder whose images are not read."""
    named = _named(scene)
    for subset in _subsets(scene):
        if not list_images(subset.image_dir):
            continue  # the scan says that
        inner = [each for each in folders_of_images(subset.image_dir) if each.resolve() not in named]
        inner = [each for each in inner if not _is_for_masks(each, subset)]
        if inner:
            names = listed([each.name for each in inner])
            reason = f"has folders with images within, which are not read: {names}."
            yield found("folder-inner", subset.image_dir, reason, files=tuple(inner))


def names_with_repeats(scene: Scene) -> Iterator[Problem]:
    """Yield folders like 10_cat whose subset shows each picture once."""
    for subset in _subsets(scene):
        repeats, _, words = subset.image_dir.name.partition("_")
        if repeats.isdecimal() and words and int(repeats) > 1 and subset.num_repeats == 1:
            reason = f"is named with {int(repeats)} repeats, and num_repeats is 1."
            remedy = f"Set num_repeats = {int(repeats)} in the subset: only --train_data_dir reads it from names."
            yield found("folder-repeats", subset.image_dir, reason, remedy=remedy)


def hidden_files(scene: Scene) -> Iterator[Problem]:
    """Yield hidden files and files of the system, which are not read."""
    for subset in _subsets(scene):
        for path in sorted(subset.image_dir.iterdir()):
            is_system = path.name.lower() in SYSTEM_FILES or path.name == ".DS_Store"
            is_hidden_image = path.name.startswith(".") and path.suffix.lower() in image_extensions()
            if is_system or is_hidden_image:
                yield found("file-hidden", path, "is hidden or of the system, and is not read.", joint="hidden files")


def unread_formats(scene: Scene) -> Iterator[Problem]:
    """Yield files that look like pictures and are of a format that is not read."""
    unread = set(UNREAD_FORMATS) - set(image_extensions())
    for subset in _subsets(scene):
        for path in sorted(subset.image_dir.iterdir()):
            if path.suffix.lower() in unread and path.is_file():
                joint = f"pictures in {subset.image_dir} are of formats that are not read"
                yield found("file-format", path, f"{path.suffix} is not read.", joint=joint)


def same_stems(scene: Scene) -> Iterator[Problem]:
    """Yield images of one folder that differ only in their extension."""
    first: dict[tuple[Path, str], Path] = {}
    told = set()
    for sample in scene.of_files:
        other = first.setdefault((sample.path.parent, sample.path.stem), sample.path)
        if other != sample.path and sample.path not in told:
            told.add(sample.path)
            reason = f"has the name of {other.name}: both have one caption, and one mask if any."
            yield found("image-same-stem", sample.path, reason, files=(other,))


def unused_masks(scene: Scene) -> Iterator[Problem]:
    """Yield mask folders beside or within an image folder that no subset names."""
    named = _named(scene)
    for subset in _subsets(scene):
        if subset.conditioning_data_dir is not None:
            continue
        stems = {path.stem for path in list_images(subset.image_dir)}
        for folder in _candidates(subset):
            if folder.resolve() not in named and stems & {path.stem for path in images_if_readable(folder)}:
                reason = f"looks like the masks of {subset.image_dir}, and no subset names it: all is learnt."
                if subset.alpha_mask:
                    reason = f"looks like the masks of {subset.image_dir}, and no subset names it."
                remedy = f'Set conditioning_data_dir = "{folder.as_posix()}" in the subset, or take the folder away.'
                yield found("masks-unused", folder, reason, remedy=remedy, files=(subset.image_dir,))
                break


def _candidates(subset: SubsetConfig) -> list[Path]:
    """Return the folders whose names say that they hold the masks of a subset."""
    folders = sorted([*list_folders(subset.image_dir.parent), *list_folders(subset.image_dir)])
    return [each for each in folders if _is_for_masks(each, subset)]


def _is_for_masks(folder: Path, subset: SubsetConfig) -> bool:
    name, own = folder.name.casefold(), subset.image_dir.name.casefold()
    if name in MASK_WORDS:
        return True
    joined = {own + mark + word for mark in ("_", "-", " ", ".", "") for word in MASK_WORDS}
    joined |= {word + mark + own for mark in ("_", "-", " ", ".") for word in MASK_WORDS}
    return name in joined
