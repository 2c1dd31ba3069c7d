"""The findings as one HTML page that needs nothing else, with pictures of what they are about."""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from library.dataset.config import SubsetConfig
from library.dataset.plan import group_by_bucket
from library.dataset.problems import Problem
from library.errors import DataError
from library.inspection import figures
from library.inspection.decoding import THUMBNAIL, as_webp
from library.inspection.facts import Looked
from library.inspection.findings_file import mean_weight
from library.inspection.kinds import KINDS, reason_of, remedy_of
from library.inspection.page_style import DATASET_STYLE
from library.inspection.scene import Scene
from library.pages.parts import document, heading, picture, scrolled, table
from library.whole_file import whole_file

SEVERITIES = ("error", "warning", "note")
MOST_CASES = 24  # shown of a kind
MOST_SHOTS = 3  # pictures of a case; a folder's case has more
MOST_OF_FOLDER = 8
MOST_PICTURES = 240  # on the sheet of all
PLURAL = {"error": "errors", "warning": "warnings", "note": "notes"}


@dataclass(frozen=True)
class _Shots:
    """The small pictures that are there, by the file they belong to, and those that have been made since."""

    looked: dict[Path, Looked]
    made: dict[Path, str] = field(default_factory=dict)


def write_page(path: Path, title: str, scene: Scene, problems: Sequence[Problem]) -> None:
    """Write the page of a dataset that was looked at with thumbnails. Raises: DataError if it cannot be written."""
    by_path: dict[Path, Looked] = {}
    for looked in scene.looked:
        by_path.setdefault(looked.sample.path, looked)
        if looked.sample.mask.path is not None:
            by_path.setdefault(looked.sample.mask.path, looked)
    sections = [
        ("Findings", _findings(problems, _Shots(by_path))),
        ("How much of each masked image is learnt", _histogram(scene)),
        ("Subsets", table(_subset_rows(scene))),
        ("Buckets", figures.bucket_shapes(group_by_bucket(scene.configs, scene.scan.samples))),
        ("All pictures as training sees them", _sheet(scene.looked, problems)),
    ]
    top = heading(f"Dataset report · {time.strftime('%Y-%m-%d %H:%M')}", title, _tiles(scene, problems))
    page = document(f"{title} – dataset report", top + _verdict(problems), sections, DATASET_STYLE)
    try:
        with whole_file(path) as partial:
            partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may not be UTF-8
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from None


def _histogram(scene: Scene) -> str:
    drawn = figures.weight_histogram(_weights(scene.looked))
    return scrolled(drawn, "mean weights") if drawn else ""


def _tiles(scene: Scene, problems: Sequence[Problem]) -> list[tuple[str, str]]:
    masked = [looked for looked in scene.looked if looked.sample.mask.is_given]
    tiles = [("Images", f"{len(scene.samples):,}"), ("With a mask", f"{len(masked):,}")]
    mean = mean_weight(scene.looked)
    tiles += [("Learnt of these", f"{mean:.0%}")] if mean is not None else []
    counts = Counter[str](problem.severity for problem in problems)
    return tiles + [(PLURAL[severity].capitalize(), f"{counts[severity]:,}") for severity in SEVERITIES]


def _verdict(problems: Sequence[Problem]) -> str:
    counts = Counter(problem.severity for problem in problems)
    if counts["error"]:
        return f'<p class="verdict error">Training would stop: {_number(counts["error"], "error")}.</p>'
    if counts["warning"]:
        text = f"Training would start. <span>{_number(counts['warning'], 'warning')} to look at.</span>"
        return f'<p class="verdict warning">{text}</p>'
    return '<p class="verdict">Training would start. <span>Nothing was found to be wrong.</span></p>'


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _weights(looked: Iterable[Looked]) -> list[float]:
    return [each.coverage.learnt for each in looked if each.coverage and each.sample.mask.is_given]


def _findings(problems: Sequence[Problem], shots: _Shots) -> str:
    groups: dict[str, list[Problem]] = {}
    for problem in sorted(problems, key=lambda each: SEVERITIES.index(each.severity)):
        groups.setdefault(problem.code, []).append(problem)
    places = {code: place for place, code in enumerate(KINDS)}
    ordered = sorted(groups.values(), key=lambda group: (SEVERITIES.index(group[0].severity), places[group[0].code]))
    overview = "".join(
        f'<li>{_badge(group[0].severity)}<a href="#{group[0].code}">{escape(KINDS[group[0].code].title)}</a>'
        f"<b>{len(group)}</b></li>"
        for group in ordered
    )
    if not overview:
        return ""
    articles = "".join(_group(group, shots) for group in ordered)
    return f'<ul class="overview">{overview}</ul>{articles}'


def _badge(severity: str) -> str:
    return f'<span class="badge {severity}">{severity}</span>'


def _group(problems: Sequence[Problem], shots: _Shots) -> str:
    """Return what is told of one kind of findings, the worst first."""
    severity, code = problems[0].severity, problems[0].code
    remedies = {remedy_of(problem) for problem in problems}
    shared = f'<p class="remedy">{escape(remedies.pop())}</p>' if len(remedies) == 1 else ""
    cases = "".join(_case(problem, shots, has_remedy=not shared) for problem in problems[:MOST_CASES])
    rest = len(problems) - MOST_CASES
    more = f'<p class="more">and {rest} more, which --json lists</p>' if rest > 0 else ""
    return (
        f'<article class="finding" id="{code}"><h3>{_badge(severity)}{escape(KINDS[code].title)} '
        f'<code>{code}</code></h3>{shared or "<p></p>"}<ul class="cases">{cases}</ul>{more}</article>'
    )


def _case(problem: Problem, shots: _Shots, *, has_remedy: bool) -> str:
    remedy = f"<p>{escape(remedy_of(problem))}</p>" if has_remedy else ""
    place = str(problem.path.parent)
    return (
        f"<li>{_shots_of(problem, shots)}<div><h4>{escape(problem.path.name)}</h4>"
        f'<p class="place">{escape(place)}</p><p>{escape(_sentence(reason_of(problem)))}</p>{remedy}</div></li>'
    )


def _sentence(text: str) -> str:
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first.isalpha() else text


def _shots_of(problem: Problem, shots: _Shots) -> str:
    """Return pictures of what a problem is about: as trained where that is known, and files as they are."""
    paths = list(dict.fromkeys((problem.path, *problem.files)))
    most = MOST_OF_FOLDER if problem.path.is_dir() else MOST_SHOTS
    shown: list[str] = []
    seen: set[int] = set()
    for path in paths:
        looked = shots.looked.get(path)
        if looked is not None and problem.code.startswith(("mask-", "label-")) and looked.sample.path != path:
            shown.append(_file_shot(path, shots))
        if looked is not None and looked.thumbnail and id(looked) not in seen:
            seen.add(id(looked))
            shown.append(_shot(looked.thumbnail, f"{looked.sample.path.name} as trained"))
        elif looked is None:
            shown.append(_file_shot(path, shots))
    shown = [each for each in shown if each][:most]
    return f'<div class="shots">{"".join(shown)}</div>' if shown else ""


def _shot(data: bytes, alt: str) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return picture(data, "webp", image.size, alt)


def _file_shot(path: Path, shots: _Shots) -> str:
    """Return a small picture of a file as it is, '' if it is none."""
    if path not in shots.made:
        shots.made[path] = _made_shot(path)
    return shots.made[path]


def _made_shot(path: Path) -> str:
    try:
        with Image.open(path) as file:
            file.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))
            image = file.convert("RGBA" if file.has_transparency_data else "RGB")
    except Exception:  # a file that is shown because something is wrong with it
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _shot(as_webp(image), f"{path.name} as it is")


def _subset_rows(scene: Scene) -> list[dict[str, Any]]:
    rows = []
    for number, config in enumerate(scene.configs):
        for subset in config.subsets:
            own = [each for each in scene.looked if (each.sample.dataset, each.sample.subset) == (number, subset)]
            weights = _weights(own)
            rows.append(
                {
                    "Folder": str(subset.source),
                    "Use": "regularisation" if subset.is_reg else "training",
                    "Images": len(own),
                    "Held back": sum(each.sample.is_validation for each in own),
                    "Repeats": subset.num_repeats,
                    "Masks": _masks_in_words(subset, own),
                    "Learnt": f"{sum(weights) / len(weights):.0%}" if weights else "all",
                    "Resolution": f"{config.resolution[0]}×{config.resolution[1]}",
                    "Batch": config.batch_size,
                }
            )
    if not any(row["Held back"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "Held back"} for row in rows]
    return rows


def _masks_in_words(subset: SubsetConfig, looked: Sequence[Looked]) -> str:
    kinds = Counter(each.sample.mask.kind for each in looked)
    words = [f"{kinds['file']} files"] if subset.conditioning_data_dir else []
    words += [f"{kinds['alpha']} alpha"] if subset.alpha_mask else []
    words += [f"{kinds['own']} of the class"] if kinds["own"] else []
    return ", ".join(words) or "none"


def _sheet(looked: Sequence[Looked], problems: Sequence[Problem]) -> str:
    """Return all pictures, or as many spread over them as a page may hold."""
    shown = looked[:: math.ceil(len(looked) / MOST_PICTURES)] if looked else ()
    told: dict[Path, set[int]] = {}
    for number, problem in enumerate(problems):
        if problem.severity != "note":
            for path in (problem.path, *problem.files):
                told.setdefault(path, set()).add(number)
    parts = [_sheet_figure(each, told) for each in shown if each.thumbnail]
    if not parts:
        return ""
    of_all = f"{len(parts)} of {len(looked)} pictures. " if len(parts) < len(looked) else ""
    legend = f'<p class="legend">{of_all}<span class="swatch"></span> is not learnt; a square is a latent cell.</p>'
    return f'{legend}<div class="sheet">{"".join(parts)}</div>'


def _sheet_figure(looked: Looked, told: Mapping[Path, set[int]]) -> str:
    assert looked.thumbnail is not None
    sample, coverage = looked.sample, looked.coverage
    share = f"{coverage.learnt:.0%} learnt" if coverage and sample.mask.is_given else "no mask"
    size = "{}×{}".format(*sample.transform.target)
    count = len(told.get(sample.path, set()) | (told.get(sample.mask.path, set()) if sample.mask.path else set()))
    found = f" · <em>{_number(count, 'finding')}</em>" if count else ""
    held = " · held back" if sample.is_validation else ""
    return (
        f"<figure>{_shot(looked.thumbnail, sample.path.name)}<figcaption><b>{escape(sample.path.name)}</b>"
        f"{size} · {share}{held}{found}</figcaption></figure>"
    )


def title_of(scene: Scene, config: str | None) -> str:
    """Return what the page is called: the config's name, or else that of the first folder."""
    return Path(config).name if config else scene.configs[0].subsets[0].source.name
