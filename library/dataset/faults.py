"""The problems of files that do not find each other: images without masks or captions, masks without images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset import files, pairing
from library.dataset.files import QUARTER_TURNS, Header
from library.dataset.problems import MOST_NAMES, FileError, Joint, Problem, listed

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig
    from library.errors import DataError

UNREAD = ("image-unreadable", "image-too-large", "file-empty")  # codes of images that are left out
CAPTION_EXTENSIONS = (".txt", ".caption", ".cap", ".tags", ".text")  # that tagging programs write


def failure(path: Path, error: DataError, otherwise: str) -> Problem:
    """Return the error of a file that cannot be used; otherwise: its code if it says none but "unreadable"."""
    if not isinstance(error, FileError):
        return Problem("error", path, str(error), code=otherwise)
    code = otherwise if error.code == "unreadable" else error.code
    return Problem("error", path, str(error), code=code, remedy=error.remedy)


def absent_images(absent: Sequence[Path], subset: SubsetConfig) -> Iterator[Problem]:
    """Yield an error for each image that a metadata file lists and that is not there."""
    remedy = f"Relative names start at {subset.image_dir}, and end with the file's extension."
    beside: dict[Path, list[Path]] = {}
    for number, path in enumerate(absent):
        near = None
        if number < MOST_NAMES:  # more are not shown at once, and looking for each takes its time
            if path.parent not in beside:
                beside[path.parent] = files.list_images(path.parent) if path.parent.is_dir() else []
            near = pairing.near_miss(path, beside[path.parent])
        hint = f" (is {near.name} meant?)" if near else ""
        joint = Joint(f"images of {subset.source} are not there", path.name + hint, remedy)
        message = f"{subset.source}: there is no image {path}{hint}. {remedy}"
        yield Problem("error", path, message, joint, "metadata-image", remedy)


def no_images(subset: SubsetConfig) -> Problem:
    """Return the error of a folder without images, which may be a level too high."""
    folder = subset.image_dir
    message = f"{folder}: has no images. Known are {', '.join(files.image_extensions())}."
    inner = folders_of_images(folder)
    if not inner:
        return Problem("error", folder, message, code="no-images")
    names = listed([each.name for each in inner])
    remedy = "Name such a folder itself as image_dir, in a subset of its own."
    if all(each.name.partition("_")[0].isdecimal() for each in inner):
        remedy = f"Name such a folder as image_dir, or leave the config out and give --train_data_dir {folder}."
    message = f"{folder}: has no images itself, only folders with images: {names}. {remedy}"
    return Problem("error", folder, message, code="folder-level", remedy=remedy, files=tuple(inner))


def folders_of_images(folder: Path) -> list[Path]:
    """Return the folders directly within a folder in which images lie, by name; hidden ones are not looked at."""
    inner = [each for each in files.list_folders(folder) if not each.name.startswith(".")]
    return [each for each in inner if files.images_if_readable(each)]


def missing_captions(without: Sequence[Path], num_images: int, subset: SubsetConfig) -> Iterator[Problem]:
    """Yield a warning for images without caption: one for those that have it under another extension, one for the rest.

    Args:
        without: images that have none, by name.
        num_images: of the subset.
        subset: where they are.
    """
    if subset.metadata_file is not None:
        others: dict[Path, Path] = {}
    else:
        others = _other_captions(without, subset.caption_extension)
    if others:
        known = sorted({path.suffix for path in others.values()})
        remedy = f'Set caption_extension = "{known[0]}" in the subset, or rename the files.'
        names = listed([path.name for path in others.values()])
        instead = "an empty caption" if subset.class_tokens is None else f'"{subset.class_tokens}"'
        yield Problem(
            "warning",
            subset.source,
            f"{subset.source}: {len(others)} of {num_images} images have no {subset.caption_extension} file and are "
            f"trained with {instead}, but these lie beside them: {names}. {remedy}",
            code="caption-extension",
            remedy=remedy,
            files=tuple(others),
        )
    lacking = [image for image in without if image not in others]
    if lacking and subset.class_tokens is None:
        what = "caption or tags" if subset.metadata_file else f"{subset.caption_extension} file"
        message = (
            f"{subset.source}: {len(lacking)} of {num_images} images have no {what} and no class_tokens, so their "
            f"caption is empty: {listed([image.name for image in lacking])}."
        )
        yield Problem("warning", subset.source, message, code="caption-missing", files=tuple(lacking))


def _other_captions(images: Iterable[Path], extension: str) -> dict[Path, Path]:
    """Return the file that looks like the caption of an image, by image, of those that have one."""
    beside: dict[Path, set[str]] = {}
    found = {}
    for image in images:
        if image.parent not in beside:
            beside[image.parent] = {path.name for path in image.parent.iterdir()}
        names = [image.stem + other for other in CAPTION_EXTENSIONS if other != extension]
        names += [image.name + other for other in CAPTION_EXTENSIONS]  # cat.png.txt
        name = next((name for name in names if name in beside[image.parent]), None)
        if name is not None:
            found[image] = image.with_name(name)
    return found


def ambiguous_masks(masks: Mapping[Path, Path], folder: Path) -> Iterator[Problem]:
    """Yield an error for each mask that images in several folders share; masks: by image."""
    first: dict[Path, Path] = {}
    for image, mask in masks.items():
        other = first.setdefault(mask, image)
        if other.parent != image.parent:
            remedy = f"Put their masks into folders within {folder} that are named like theirs."
            message = f"{mask}: is the mask of {other} as well as of {image}. {remedy}"
            yield Problem("error", mask, message, code="mask-ambiguous", remedy=remedy, files=(other, image))


def misfit(mask: Path, mask_header: Header, image: Path, header: Header) -> Problem | None:
    """Return the error of a mask that has not the shape of its image, None if it fits."""
    if pairing.has_same_aspect(mask_header.size, header.size):
        return None
    code, remedy = "mask-shape", "Make both the same size."
    if header.orientation in QUARTER_TURNS and pairing.has_same_aspect(mask_header.size[::-1], header.size):
        code = "mask-orientation"
        remedy = (
            f"The image is stored lying on its side (EXIF orientation {header.orientation}): "
            "turn the mask as the picture is seen, or save the picture without that mark."
        )
    message = f"{mask}: mask is {_size(mask_header)}, its image {image.name} is {_size(header)}. {remedy}"
    return Problem("error", mask, message, code=code, remedy=remedy, files=(image,))


def _size(header: Header) -> str:
    return f"{header.size[0]}x{header.size[1]}"


def missing_masks(
    lacking: Sequence[Path], folder: Path, subset: SubsetConfig, surplus: Sequence[Path]
) -> Iterator[Problem]:
    """Yield a problem for each image without a mask, with the one of surplus that was perhaps meant."""
    remedy = 'Name a mask like its image, or set missing_mask = "train_all" or "skip" in the subset.'
    for image in lacking:
        near = pairing.near_miss(image, surplus)
        hint = f" (is {near.name} meant?)" if near else ""
        code, about = _kind_of_missing(image, near), () if near is None else (near,)
        if subset.missing_mask == "error":
            joint = Joint(f"images of {subset.source} have no mask in {folder}", image.name + hint, remedy)
            message = f"{image}: has no mask in {folder}{hint}. {remedy}"
            yield Problem("error", image, message, joint, code, remedy, about)
        else:
            joint = Joint(f"images of {subset.source} are left out, having no mask in {folder}", image.name + hint)
            message = f"{image}: left out, it has no mask in {folder}{hint}."
            yield Problem("warning", image, message, joint, code, files=about)


def _kind_of_missing(image: Path, near: Path | None) -> str:
    if near is None:
        return "mask-missing"
    return "mask-case" if near.stem.casefold() == image.stem.casefold() else "mask-near-miss"


def surplus_masks(
    masks: Mapping[Path, Sequence[Path]], stems: Mapping[Path, Collection[str]], known: Iterable[Problem]
) -> Iterator[Problem]:
    """Yield a warning for each mask without an image, of the kind of the near miss that it was found to be.

    Args:
        masks: by folder.
        stems: of the images that look there for their masks, by folder.
        known: problems found so far; the mask of an image that cannot be read is not told of.
    """
    known = list(known)
    unread = {each.path.stem for each in known if each.code in UNREAD}
    nearly = {file: each.code for each in known if each.code in ("mask-case", "mask-near-miss") for file in each.files}
    for folder, paths in masks.items():
        for mask in paths:
            if mask.stem not in stems[folder] and mask.stem not in unread:
                joint = Joint(f"masks in {folder} are not used, no image has their name", mask.name)
                message = f"{mask}: not used, no image has this name."
                yield Problem("warning", mask, message, joint, nearly.get(mask, "mask-surplus"))
