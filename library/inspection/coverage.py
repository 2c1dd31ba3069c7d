"""A dataset looked at before it is trained: what each image becomes, what its mask lets through, what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from library.dataset import captions, files, images, summary
from library.dataset.problems import Joint, Problem
from library.dataset.scan import Sample, Scan
from library.errors import DataError
from library.masks import CELL
from library.whole_file import fitting_name

NEARLY = 0.02  # a mean weight this near to 0 or 1 is suspicious
FRAME = 1 / 16  # width of the frame whose weight tells an inverted mask, of the shorter side

Weights = npt.NDArray[np.float32]  # (h, w) in [0, 1]


@dataclass(frozen=True)
class Coverage:
    """What was found by reading the pixels of one sample's mask."""

    mean: float  # weight, in [0, 1]
    centre: float  # mean of the middle half of both sides
    frame: float  # mean along the border
    file: Path | None = None  # where the weights are written


def read_masks(samples: Sequence[Sample], folder: Path | None = None) -> list[Coverage | DataError]:
    """Return what each sample's mask lets through at latent size, or why it cannot be read.

    Args:
        samples: to look at; a sample without a mask weighs 1 everywhere.
        folder: where the weights (h, w) are written, one float32 .npy a sample; None writes nothing.

    Raises: DataError if the folder cannot be made.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made ({error.strerror or error}).") from None
    digits = len(str(len(samples)))
    targets = [
        None if folder is None else folder.resolve() / fitting_name(f"{number:0{digits}}_{sample.path.stem}", ".npy")
        for number, sample in enumerate(samples)
    ]
    pairs = list(zip(samples, targets, strict=True))
    return files.read_all(lambda pair: _read_mask(*pair), pairs, label="masks")


def _read_mask(sample: Sample, target: Path | None) -> Coverage:
    weights = images.read_mask_weights(sample)
    if weights is None:
        width, height = sample.transform.target
        weights = np.ones((height // CELL, width // CELL), np.float32)
    if target is not None:
        try:
            np.save(target, weights)
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error}).") from None
    return Coverage(float(weights.mean()), *_centre_and_frame(weights), target)


def _centre_and_frame(weights: Weights) -> tuple[float, float]:
    height, width = weights.shape
    centre = weights[height // 4 : -(-3 * height // 4), width // 4 : -(-3 * width // 4)]
    border = max(1, round(min(weights.shape) * FRAME))
    is_frame = np.ones(weights.shape, bool)
    is_frame[border : height - border, border : width - border] = False
    return float(centre.mean()), float(weights[is_frame].mean())


def mask_problems(samples: Sequence[Sample], coverages: Sequence[Coverage | DataError]) -> list[Problem]:
    """Return errors for what cannot be read, and warnings for masks that are empty, full, or probably inverted."""
    found = []
    for sample, coverage in zip(samples, coverages, strict=True):
        if isinstance(coverage, DataError):
            found.append(Problem("error", sample.mask.path or sample.path, str(coverage)))
        elif sample.mask.kind != "none":
            found += _doubts(sample, coverage)
    return list(dict.fromkeys(found))  # an image may be in two datasets


def _doubts(sample: Sample, coverage: Coverage) -> list[Problem]:
    path = sample.mask.path or sample.path
    kind = "mask" if sample.mask.kind == "file" else "alpha channel"
    (width, height), resized = sample.transform.target, sample.transform.resized
    everywhere = "everywhere"
    if resized != (width, height):  # what is cut off may be of another colour
        everywhere += f" in the {width}x{height} that are kept of {resized[0]}x{resized[1]}"
    if coverage.mean == 0:
        text = f"the {kind} is black {everywhere}: nothing of {sample.path.name} is learnt."
        joint = Joint("masks are black everywhere, so that nothing of their image is learnt", path.name)
    elif coverage.mean < NEARLY:
        text = f"the {kind} lets only {coverage.mean:.1%} of {sample.path.name} through."
        joint = Joint(f"masks let less than {NEARLY:.0%} of their image through", path.name)
    elif coverage.mean == 1:
        text = f"the {kind} is white {everywhere}: all of {sample.path.name} is learnt, as without a mask."
        joint = Joint("masks are white everywhere, as if there were none", path.name)
    elif coverage.frame > 0.75 and coverage.centre < 0.25:
        text = f"the {kind} is white along the border and black in the middle: is it inverted? White is learnt."
        joint = Joint(
            "masks are white along the border and black in the middle", path.name, "Inverted? White is learnt."
        )
    else:
        return []
    return [Problem("warning", path, f"{path}: {text}", joint)]


def mean_weight(samples: Sequence[Sample], coverages: Sequence[Coverage | DataError]) -> float | None:
    """Return the mean weight of the masked images, None if there is none."""
    means = [
        coverage.mean
        for sample, coverage in zip(samples, coverages, strict=True)
        if sample.mask.kind != "none" and isinstance(coverage, Coverage)
    ]
    return sum(means) / len(means) if means else None


def coverage_line(samples: Sequence[Sample], coverages: Sequence[Coverage | DataError]) -> str | None:
    """Return one line with the least and the most that a mask lets through, None without masks."""
    means = [
        (coverage.mean, sample.path.name)
        for sample, coverage in zip(samples, coverages, strict=True)
        if sample.mask.kind != "none" and isinstance(coverage, Coverage)
    ]
    if not means:
        return None
    (least, first), (most, last) = min(means), max(means)
    return f"learnt at latent size: from {least:.1%} ({first}) to {most:.1%} ({last})"


def as_json(
    found: Scan, coverages: Sequence[Coverage | DataError], problems: Sequence[Problem]
) -> dict[str, list[Any]]:
    """Return all findings as plain values: "images", those held back last, "buckets" of training, "problems"."""
    samples = found.samples + found.validation
    return {
        "images": [_image(sample, coverage) for sample, coverage in zip(samples, coverages, strict=True)],
        "buckets": [
            {"resolution": list(size), "count": count} for size, count in summary.bucket_counts(found.samples).items()
        ],
        "problems": [
            {"severity": problem.severity, "path": str(problem.path), "message": problem.message}
            for problem in problems
        ],
    }


def _image(sample: Sample, coverage: Coverage | DataError) -> dict[str, Any]:
    mean, weights = (coverage.mean, coverage.file) if isinstance(coverage, Coverage) else (None, None)
    return {
        "path": str(sample.path),
        "dataset": sample.dataset,
        "subset": sample.subset.index,
        "size": list(sample.transform.source),
        "caption": captions.preview(sample.captions, sample.subset),
        "is_reg": sample.is_reg,
        "num_repeats": sample.num_repeats,
        "bucket": list(sample.transform.target),
        "resized": list(sample.transform.resized),
        "crop": list(sample.transform.crop),
        "mask": {
            "source": sample.mask.kind,
            "path": str(sample.mask.path) if sample.mask.path else None,
            "mean_weight": mean,
            "weights": str(weights) if weights else None,
        },
        **({"is_validation": True} if sample.is_validation else {}),  # only of a split: readers know the other keys
    }


def write_json(content: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write lists by name, an entry a line. Raises: DataError if the file cannot be written."""
    parts = []
    for name, entries in content.items():
        rows = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        parts.append(f' "{name}": [\n  {rows}\n ]' if entries else f' "{name}": []')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from None
