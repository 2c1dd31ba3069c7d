"""The scan: from folders to samples, with every problem found on the way, without decoding a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset import (
    captions,
    faults,
    files,
    framing,
    mask_captions,
    metadata_file,
    pairing,
    placement,
    regions,
    shares,
    split,
)
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.files import QUARTER_TURNS, Header
from library.dataset.geometry import Box, Size, Transform
from library.dataset.problems import Problem, listed
from library.errors import DataError, OptionError
from library.masks import MaskSource

if TYPE_CHECKING:
    from library.dataset.images import Given

NO_MASK = MaskSource("none")
Lines = tuple[str, ...]  # of a caption
Written = dict[Path, Lines | DataError | None]  # captions as the files say, by image


@dataclass(frozen=True)
class Sample:
    """One image of a subset, as training sees it before anything is drawn by chance."""

    path: Path
    captions: Lines  # as read; one unless wildcards are on
    subset: SubsetConfig
    dataset: int  # index of the dataset
    is_reg: bool
    num_repeats: int  # in an epoch; regularisation images balanced against the others
    orientation: int  # EXIF, 1 to 8
    transform: Transform  # into the bucket, cut in the middle
    mask: MaskSource
    region: Box | None = None  # what the mask lets be learnt, in pixels of the image; None: not asked for, or nothing
    is_validation: bool = False  # held back from training; num_repeats is 1 then
    give: Callable[[str], Given] | None = field(default=None, compare=False, repr=False)  # of the user's class: by seed


@dataclass(frozen=True)
class Scan:
    """What a dataset holds: the samples that can be trained on, and the problems."""

    samples: tuple[Sample, ...]  # trained on
    problems: tuple[Problem, ...]
    validation: tuple[Sample, ...] = ()  # held back


@dataclass
class _Findings:
    """What several subsets share while they are read."""

    headers: dict[Path, Header] = field(default_factory=dict)
    mask_folders: dict[Path, list[Path]] = field(default_factory=dict)
    absent_folders: set[Path] = field(default_factory=set)
    stems: dict[Path, set[str]] = field(default_factory=lambda: defaultdict(set))  # of images, by mask folder
    problems: list[Problem] = field(default_factory=list)

    def error(self, path: Path, message: str, code: str) -> None:
        self.problems.append(Problem("error", path, message, code=code))

    def failure(self, path: Path, error: DataError, otherwise: str) -> None:
        """Note that a file cannot be used; otherwise: the code of a picture that is not readable where it lies."""
        self.problems.append(faults.failure(path, error, otherwise))


def scan(configs: Sequence[DatasetConfig]) -> Scan:
    """Return the samples of all datasets in the order of subsets and names, and all problems found."""
    findings = _Findings()
    found: list[list[Sample]] = []
    for number, config in enumerate(configs):
        found.append([sample for subset in config.subsets for sample in _scan_subset(config, subset, number, findings)])
        if all(subset.is_reg for subset in config.subsets):
            folder = config.subsets[0].source
            message = f"{folder}: datasets[{number}] has only regularisation images. Add a subset without is_reg."
            findings.error(folder, message, "only-regularisation")
    findings.problems += faults.surplus_masks(findings.mask_folders, findings.stems, findings.problems)
    findings.problems += framing.cut_off(configs, (sample for samples in found for sample in samples))
    samples, validation, shared = shares.divide(found)
    findings.problems += shared
    findings.problems += mask_captions.problems([*samples, *validation])
    problems = tuple(dict.fromkeys(findings.problems))  # two datasets may share a folder
    return Scan(tuple(samples), problems, tuple(validation))


def _scan_subset(config: DatasetConfig, subset: SubsetConfig, dataset: int, findings: _Findings) -> list[Sample]:
    """Return the subset's samples, with its own number of repeats."""
    scan_source = _scan_folder if subset.metadata_file is None else _scan_metadata_file
    try:
        headers, written = scan_source(subset, findings)
    except DataError as error:
        findings.failure(subset.source, error, "source-unreadable")
        return []
    readable = list(headers)
    masks = _masks(readable, headers, subset, findings)
    texts = _captions(written | _beside_masks(masks, subset, findings), subset, findings)
    boxes = regions.of_subset(subset, masks, {image: headers[image].size for image in masks}, findings.problems)
    held = split.held_back(readable, subset.validation_split, subset.validation_seed)
    if subset.validation_split and readable and len(held) in (0, len(readable)):
        message = (
            f"{subset.source}: validation_split {subset.validation_split:g} holds back "
            f"{'all' if held else 'none'} of {len(readable)} images."
        )
        findings.problems.append(Problem("warning", subset.source, message, code="validation-split"))
    return [
        Sample(
            path=image,
            captions=texts[image],
            subset=subset,
            dataset=dataset,
            is_reg=subset.is_reg,
            num_repeats=1 if image in held else subset.num_repeats,
            orientation=headers[image].orientation,
            transform=framing.assign(config, subset, headers[image].size, boxes.get(image)),
            mask=placement.mask_of(masks[image], subset.random_placement),
            region=boxes.get(image),
            is_validation=image in held,
        )
        for image in readable
        if image in texts and image in masks
    ]


def _scan_folder(subset: SubsetConfig, findings: _Findings) -> tuple[dict[Path, Header], Written]:
    """Return headers and captions of the images in the subset's folder. Raises: DataError if it is not there."""
    images = files.list_images(subset.image_dir)
    if not images:
        findings.problems.append(faults.no_images(subset))
        return {}, {}
    known = files.load_info(subset.image_dir) if subset.cache_info else {}
    headers = _headers(images, findings, known)
    found = files.read_all(partial(captions.read, subset=subset), list(headers))
    written: Written = dict(zip(headers, found, strict=True))
    if subset.cache_info and known != headers:
        kept = {image: lines or (subset.class_tokens or "",) for image, lines in written.items()}
        texts = {image: "\n".join(lines) for image, lines in kept.items() if not isinstance(lines, DataError)}
        files.save_info(subset.image_dir, headers, texts)
    return headers, written


def _scan_metadata_file(subset: SubsetConfig, findings: _Findings) -> tuple[dict[Path, Header], Written]:
    """Return headers and captions of the images in the subset's metadata file. Raises: DataError if there are none."""
    file = subset.source
    content = metadata_file.read(file, subset)
    if not content.entries:
        raise DataError(f"{file}: lists no images.")
    findings.problems += [
        Problem("warning", file, message, code="metadata-entries") for message in metadata_file.warnings(content, file)
    ]
    entries = {entry.path: entry for entry in content.entries}
    present = [path for path in entries if path.is_file()]
    findings.problems += faults.absent_images(sorted(entries.keys() - set(present)), subset)
    headers = _headers(present, findings)
    outdated = [path.name for path in headers if not _has_size(headers[path], entries[path].size)]
    if outdated:
        message = f"{file}: image_size of {len(outdated)} images is not the file's own, which is used: "
        message += f"{listed(outdated)}."
        findings.problems.append(Problem("warning", file, message, code="metadata-size"))
    return headers, {path: entries[path].captions for path in headers}


def _has_size(header: Header, size: Size | None) -> bool:
    """Return whether a size, or none, is that of the picture as seen, or as stored: programs write either."""
    stored = header.size[::-1] if header.orientation in QUARTER_TURNS else header.size
    return size in (None, header.size, stored)


def _headers(
    paths: Iterable[Path], findings: _Findings, known: Mapping[Path, Header] | None = None, kind: str = "image"
) -> dict[Path, Header]:
    """Return the headers of the files that have a readable one; kind, image or mask, is for the problems' codes."""
    paths = list(paths)
    if known:
        findings.headers.update(known)
    unread = [path for path in paths if path not in findings.headers]
    for path, header in zip(unread, files.read_all(files.read_header, unread), strict=True):
        if isinstance(header, DataError):
            findings.failure(path, header, f"{kind}-unreadable")
        else:
            findings.headers[path] = header
    return {path: findings.headers[path] for path in paths if path in findings.headers}


def _beside_masks(masks: Mapping[Path, MaskSource], subset: SubsetConfig, findings: _Findings) -> Written:
    """Return the captions that replace those of the images whose masks have one beside them."""
    if not subset.mask_captions:
        return {}
    found: Written = dict(mask_captions.beside(masks, subset))
    if not found and any(mask.path is not None for mask in masks.values()):
        findings.problems.append(mask_captions.nothing_beside(masks, subset))
    return found


def _captions(written: Written, subset: SubsetConfig, findings: _Findings) -> dict[Path, Lines]:
    texts: dict[Path, Lines] = {}
    without: list[Path] = []
    for image, lines in written.items():
        if isinstance(lines, DataError):
            findings.failure(image, lines, "caption-unreadable")
        else:
            texts[image] = (subset.class_tokens or "",) if lines is None else lines
            without += [image] if lines is None else []
    findings.problems += faults.missing_captions(without, len(written), subset)
    return texts


def _masks(
    images: Sequence[Path], headers: Mapping[Path, Header], subset: SubsetConfig, findings: _Findings
) -> dict[Path, MaskSource]:
    """Return where each image's mask is; an image that must be left out is left out here.

    Images of a folder within image_dir have theirs in the folder of that name within conditioning_data_dir, if there
    is one: a metadata file may list several images of one name.
    """
    groups: dict[Path | None, list[Path]] = defaultdict(list)
    for image in images:
        groups[_mask_folder(image, subset)].append(image)
    masks: dict[Path, MaskSource] = {}
    for folder, group in groups.items():
        masks |= _masks_in(folder, group, headers, subset, findings)
    return masks


def _mask_folder(image: Path, subset: SubsetConfig) -> Path | None:
    folder = subset.conditioning_data_dir
    if folder is not None and image.parent != subset.image_dir and image.is_relative_to(subset.image_dir):
        inner = image.parent.relative_to(subset.image_dir)
        if ".." in inner.parts:  # leaves both folders: there it could find the image itself
            return folder
        within = folder / inner
        return within if within.is_dir() else folder
    return folder


def _masks_in(
    folder: Path | None,
    images: Sequence[Path],
    headers: Mapping[Path, Header],
    subset: SubsetConfig,
    findings: _Findings,
) -> dict[Path, MaskSource]:
    pairs = pairing.pair(images, () if folder is None else _mask_files(folder, findings))
    if folder is not None:
        findings.stems[folder] |= {image.stem for image in images}
        findings.problems += faults.ambiguous_masks(pairs.masks, folder)
    mask_headers = _headers(pairs.masks.values(), findings, kind="mask")
    masks: dict[Path, MaskSource] = {}
    lacking: list[Path] = []
    for image in images:
        mask = pairs.masks.get(image)
        if mask is not None:
            if mask in mask_headers and _fits(mask, mask_headers[mask], image, headers[image], findings):
                masks[image] = MaskSource("file", mask, subset.mask_shape)
        elif subset.alpha_mask and headers[image].has_alpha:
            masks[image] = MaskSource("alpha", shape=replace(subset.mask_shape, labels=()))
        elif folder is None or subset.is_reg or subset.missing_mask == "train_all":
            masks[image] = NO_MASK
        else:
            lacking.append(image)
    for mask, used in pairs.doubled.items():
        message = f"{mask}: not used, {used.name} comes first."
        findings.problems.append(Problem("warning", mask, message, code="mask-same-stem", files=(used,)))
    if folder is not None and folder.resolve() == subset.image_dir.resolve():
        message = f"conditioning_data_dir: {folder} is the folder of the images: each is used as its own mask."
        findings.problems.append(Problem("warning", folder, message, code="mask-folder-of-images"))
    if folder is not None and folder not in findings.absent_folders:
        findings.problems += faults.missing_masks(lacking, folder, subset, pairs.surplus)
    return masks


def _mask_files(folder: Path, findings: _Findings) -> list[Path]:
    if folder not in findings.mask_folders:
        findings.mask_folders[folder] = []
        try:
            findings.mask_folders[folder] = files.list_images(folder)
        except DataError as error:
            findings.absent_folders.add(folder)
            findings.error(folder, f"conditioning_data_dir: {error}", "mask-folder-absent")
    return findings.mask_folders[folder]


def _fits(mask: Path, mask_header: Header, image: Path, header: Header, findings: _Findings) -> bool:
    problem = faults.misfit(mask, mask_header, image, header)
    findings.problems += () if problem is None else (problem,)
    return problem is None


def check_masked_loss(masked_loss: bool, samples: Sequence[Sample]) -> None:
    """Raise OptionError if --masked_loss is asked for and no sample has a mask."""
    if masked_loss and all(not sample.mask.is_given for sample in samples):
        raise OptionError(
            f"--masked_loss: none of the {len(samples)} images has a mask. Set conditioning_data_dir or alpha_mask "
            "in a subset of the dataset config, or leave --masked_loss out."
        )
