"""The scan: from folders to samples, with every problem found on the way, without decoding a pixel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from library.dataset import buckets, captions, files, pairing
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.files import QUARTER_TURNS, Header
from library.dataset.geometry import Transform
from library.dataset.problems import Joint, Problem, listed
from library.errors import DataError, OptionError
from library.masks import MaskSource

NO_MASK = MaskSource("none")


@dataclass(frozen=True)
class Sample:
    """One image of a subset, as training sees it before anything is drawn by chance."""

    path: Path
    captions: tuple[str, ...]  # lines as read; one unless wildcards are on
    subset: SubsetConfig
    dataset: int  # index of the dataset
    is_reg: bool
    num_repeats: int  # in an epoch; regularisation images balanced against the others
    orientation: int  # EXIF, 1 to 8
    transform: Transform  # into the bucket, cut in the middle
    mask: MaskSource


@dataclass(frozen=True)
class Scan:
    """What a dataset holds: the samples that can be trained on, and the problems."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


@dataclass
class _Findings:
    """What several subsets share while they are read."""

    headers: dict[Path, Header] = field(default_factory=dict)
    mask_folders: dict[Path, list[Path]] = field(default_factory=dict)
    absent_folders: set[Path] = field(default_factory=set)
    stems: dict[Path, set[str]] = field(default_factory=lambda: defaultdict(set))  # of images, by mask folder
    problems: list[Problem] = field(default_factory=list)

    def error(self, path: Path, message: str) -> None:
        self.problems.append(Problem("error", path, message))


def scan(configs: Sequence[DatasetConfig]) -> Scan:
    """Return the samples of all datasets in the order of subsets and names, and all problems found."""
    findings = _Findings()
    samples: list[Sample] = []
    for number, config in enumerate(configs):
        found = [_scan_subset(config, subset, number, findings) for subset in config.subsets]
        samples += _balanced([sample for subset in found for sample in subset])
        if all(subset.is_reg for subset in config.subsets):
            folder = config.subsets[0].image_dir
            message = f"{folder}: datasets[{number}] has only regularisation images. Add a subset without is_reg."
            findings.error(folder, message)
    findings.problems += _surplus_masks(findings)
    return Scan(tuple(samples), tuple(dict.fromkeys(findings.problems)))  # two datasets may share a folder


def _scan_subset(config: DatasetConfig, subset: SubsetConfig, dataset: int, findings: _Findings) -> list[Sample]:
    """Return the subset's samples, with its own number of repeats."""
    try:
        images = files.list_images(subset.image_dir)
    except DataError as error:
        findings.error(subset.image_dir, str(error))
        return []
    if not images:
        message = f"{subset.image_dir}: has no images. Known are {', '.join(files.image_extensions())}."
        findings.error(subset.image_dir, message)
        return []
    known = files.load_info(subset.image_dir) if subset.cache_info else {}
    headers = _headers(images, findings, known)
    readable = [image for image in images if image in headers]
    texts = _captions(readable, subset, findings)
    if subset.cache_info and known != headers:
        files.save_info(subset.image_dir, headers, {image: "\n".join(lines) for image, lines in texts.items()})
    masks = _masks(readable, headers, subset, findings)
    return [
        Sample(
            path=image,
            captions=texts[image],
            subset=subset,
            dataset=dataset,
            is_reg=subset.is_reg,
            num_repeats=subset.num_repeats,
            orientation=headers[image].orientation,
            transform=buckets.assign(config, subset, headers[image].size),
            mask=masks[image],
        )
        for image in readable
        if image in texts and image in masks
    ]


def _headers(
    paths: Iterable[Path], findings: _Findings, known: Mapping[Path, Header] | None = None
) -> dict[Path, Header]:
    """Return the headers of the files that have a readable one."""
    paths = list(paths)
    if known:
        findings.headers.update(known)
    unread = [path for path in paths if path not in findings.headers]
    for path, header in zip(unread, files.read_all(files.read_header, unread), strict=True):
        if isinstance(header, DataError):
            findings.error(path, str(header))
        else:
            findings.headers[path] = header
    return {path: findings.headers[path] for path in paths if path in findings.headers}


def _captions(images: Sequence[Path], subset: SubsetConfig, findings: _Findings) -> dict[Path, tuple[str, ...]]:
    texts: dict[Path, tuple[str, ...]] = {}
    without: list[Path] = []
    read = partial(captions.read, subset=subset)
    for image, lines in zip(images, files.read_all(read, images), strict=True):
        if isinstance(lines, DataError):
            findings.error(image, str(lines))
        elif lines is not None:
            texts[image] = lines
        else:
            texts[image] = (subset.class_tokens or "",)
            if subset.class_tokens is None:
                without.append(image)
    if without:
        message = (
            f"{subset.image_dir}: {len(without)} of {len(images)} images have no {subset.caption_extension} file and "
            f"no class_tokens, so their caption is empty: {listed([image.name for image in without])}."
        )
        findings.problems.append(Problem("warning", subset.image_dir, message))
    return texts


def _masks(
    images: Sequence[Path], headers: Mapping[Path, Header], subset: SubsetConfig, findings: _Findings
) -> dict[Path, MaskSource]:
    """Return where each image's mask is; an image that must be left out is left out here."""
    folder = subset.conditioning_data_dir
    pairs = pairing.pair(images, () if folder is None else _mask_files(folder, findings))
    if folder is not None:
        findings.stems[folder] |= {image.stem for image in images}
    mask_headers = _headers(pairs.masks.values(), findings)
    masks: dict[Path, MaskSource] = {}
    lacking: list[Path] = []
    for image in images:
        mask = pairs.masks.get(image)
        if mask is not None:
            if mask in mask_headers and _fits(mask, mask_headers[mask], image, headers[image], findings):
                masks[image] = MaskSource("file", mask)
        elif subset.alpha_mask and headers[image].has_alpha:
            masks[image] = MaskSource("alpha")
        elif folder is None or subset.is_reg or subset.missing_mask == "train_all":
            masks[image] = NO_MASK
        else:
            lacking.append(image)
    for mask, used in pairs.doubled.items():
        findings.problems.append(Problem("warning", mask, f"{mask}: not used, {used.name} comes first."))
    if folder is not None and folder.resolve() == subset.image_dir.resolve():
        message = f"conditioning_data_dir: {folder} is the folder of the images: each is used as its own mask."
        findings.problems.append(Problem("warning", folder, message))
    if folder is not None and folder not in findings.absent_folders:
        findings.problems += _missing_masks(lacking, folder, subset, pairs.surplus)
    return masks


def _mask_files(folder: Path, findings: _Findings) -> list[Path]:
    if folder not in findings.mask_folders:
        findings.mask_folders[folder] = []
        try:
            findings.mask_folders[folder] = files.list_images(folder)
        except DataError as error:
            findings.absent_folders.add(folder)
            findings.error(folder, f"conditioning_data_dir: {error}")
    return findings.mask_folders[folder]


def _fits(mask: Path, mask_header: Header, image: Path, header: Header, findings: _Findings) -> bool:
    if pairing.has_same_aspect(mask_header.size, header.size):
        return True
    hint = " Make both the same size."
    if header.orientation in QUARTER_TURNS and pairing.has_same_aspect(mask_header.size[::-1], header.size):
        hint = (
            f" The image is stored lying on its side (EXIF orientation {header.orientation}): "
            "turn the mask as the picture is seen, or save the picture without that mark."
        )
    is_size = "{}x{}".format(*mask_header.size)
    findings.error(mask, f"{mask}: mask is {is_size}, its image {image.name} is {_size(header)}.{hint}")
    return False


def _size(header: Header) -> str:
    return f"{header.size[0]}x{header.size[1]}"


def _missing_masks(
    lacking: Sequence[Path], folder: Path, subset: SubsetConfig, surplus: Sequence[Path]
) -> Iterable[Problem]:
    remedy = 'Name a mask like its image, or set missing_mask = "train_all" or "skip" in the subset.'
    for image in lacking:
        near = pairing.near_miss(image, surplus)
        hint = f" (is {near.name} meant?)" if near else ""
        if subset.missing_mask == "error":
            joint = Joint(f"images of {subset.image_dir} have no mask in {folder}", image.name + hint, remedy)
            yield Problem("error", image, f"{image}: has no mask in {folder}{hint}. {remedy}", joint)
        else:
            joint = Joint(f"images of {subset.image_dir} are left out, having no mask in {folder}", image.name + hint)
            yield Problem("warning", image, f"{image}: left out, it has no mask in {folder}{hint}.", joint)


def _surplus_masks(findings: _Findings) -> Iterable[Problem]:
    for folder, masks in findings.mask_folders.items():
        for mask in masks:
            if mask.stem not in findings.stems[folder]:
                joint = Joint(f"masks in {folder} are not used, no image has their name", mask.name)
                yield Problem("warning", mask, f"{mask}: not used, no image has this name.", joint)


def _balanced(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples with regularisation images repeated, or left out, until they are as many as the others.

    In order, each with its own repeats, until the others' number is reached; the rest are not used. If they are too
    few, each gets one repeat more, in order and again, until it is reached.
    """
    regular = [sample for sample in samples if not sample.is_reg]
    wanted = sum(sample.num_repeats for sample in regular)
    chosen: list[Sample] = []
    total = 0
    for sample in samples:
        if sample.is_reg and total < wanted:
            chosen.append(sample)
            total += sample.num_repeats
    if not chosen:
        return regular
    rounds, rest = divmod(max(0, wanted - total), len(chosen))
    return regular + [
        replace(sample, num_repeats=sample.num_repeats + rounds + (number < rest))
        for number, sample in enumerate(chosen)
    ]


def check_masked_loss(masked_loss: bool, samples: Sequence[Sample]) -> None:
    """Raise OptionError if --masked_loss is asked for and no sample has a mask."""
    if masked_loss and all(sample.mask.kind == "none" for sample in samples):
        raise OptionError(
            f"--masked_loss: none of the {len(samples)} images has a mask. Set conditioning_data_dir or alpha_mask "
            "in a subset of the dataset config, or leave --masked_loss out."
        )
