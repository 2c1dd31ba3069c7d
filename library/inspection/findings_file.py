"""The findings as JSON, and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.dataset import captions, mask_captions, summary
from library.dataset.problems import Problem
from library.dataset.scan import Scan
from library.errors import DataError
from library.inspection.facts import Looked
from library.inspection.kinds import reason_of, remedy_of


def mean_weight(looked: Sequence[Looked]) -> float | None:
    """Return the mean weight of the masked images, None if there is none."""
    means = [each.coverage.learnt for each in looked if each.coverage and each.sample.mask.is_given]
    return sum(means) / len(means) if means else None


def coverage_line(looked: Sequence[Looked]) -> str | None:
    """Return one line with the least and the most that a mask lets through, None without masks."""
    masked = [each for each in looked if each.coverage and each.sample.mask.is_given]
    means = [(each.coverage.learnt, each.sample.path.name) for each in masked if each.coverage]
    if not means:
        return None
    (least, first), (most, last) = min(means), max(means)
    return f"learnt at latent size: from {least:.1%} ({first}) to {most:.1%} ({last})"


def as_json(scan: Scan, looked: Sequence[Looked], problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """Return all findings as plain values: "images", those held back last, "buckets" of training, "problems"."""
    return {
        "images": [_image(each) for each in looked],
        "buckets": [
            {"resolution": list(size), "count": count} for size, count in summary.bucket_counts(scan.samples).items()
        ],
        "problems": [
            {
                "severity": problem.severity,
                "code": problem.code,
                "path": str(problem.path),
                "message": problem.message,
                "reason": reason_of(problem),
                "remedy": remedy_of(problem),
                "files": [str(path) for path in problem.files],
            }
            for problem in problems
        ],
    }


def _image(looked: Looked) -> dict[str, Any]:
    sample, coverage = looked.sample, looked.coverage
    return {
        "path": str(sample.path),
        "dataset": sample.dataset,
        "subset": sample.subset.index,
        "size": list(sample.transform.source),
        "caption": captions.preview(sample.captions, sample.subset, mask_captions.left_out(sample)),
        "is_reg": sample.is_reg,
        "num_repeats": sample.num_repeats,
        "bucket": list(sample.transform.target),
        "resized": list(sample.transform.resized),
        "crop": list(sample.transform.crop),
        "mask": {
            "source": sample.mask.kind,
            "path": str(sample.mask.path) if sample.mask.path else None,
            "mean_weight": coverage.learnt if coverage else None,
            "weights": str(coverage.file) if coverage and coverage.file else None,
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
        # a name that is not UTF-8 is written as JSON escapes it
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from None
