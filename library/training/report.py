"""The report of a run: one HTML file that needs nothing else, neither a network nor scripts."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from library.pages.parts import document, heading, pairs, picture, scrolled, table
from library.training import report_masks
from library.training.charts import loss_chart, rate_chart, smoothed
from library.training.model_hashes import file_hashes
from library.training.saving import FINAL_NAME, saved_file, size_of

if TYPE_CHECKING:
    from library.metadata import DatasetFacts
    from library.options.groups import Options
    from library.options.saving import SavingOptions
    from library.training.report_masks import Figures, Shares
    from library.training.sampling import Sample

log = logging.getLogger(__name__)

MAX_PICTURES = 60  # of all prompts together; each prompt shows its first, its last, and some between
MAX_PER_PROMPT = 12
FEW = 3  # pictures in a row that are shown larger
SAMPLE_SIDE, SHEET_SIDE = 512, 1600  # pixels; larger pictures are shrunk
SMALL_BYTES = 60_000  # a PNG below this goes in as it is


@dataclass(frozen=True)
class ReportData:
    """What a run has to tell."""

    title: str
    losses: Sequence[tuple[int, float, float]]  # (optimizer step, loss, learning rate)
    samples: Sequence[Sample] = ()
    mask_line: str | None = None  # "masks: 58 of 60 images (57 files, 1 alpha), mean weight 0.43, 2 unmasked"
    mask_sheet: Path | None = None  # a picture of what the masks let through
    dataset: Sequence[Mapping[str, Any]] = ()  # rows of one table, as dataset_rows makes them
    options: Mapping[str, Any] = field(default_factory=dict)  # as changed_options makes them: no secrets
    files: Sequence[Path] = ()  # saved networks
    seconds: float | None = None  # of the training, from its first step
    step_s: float | None = None
    images_per_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # base model, device, versions
    is_complete: bool = True  # False: stopped by Ctrl-C
    validations: Sequence[tuple[int, float]] = ()  # (optimizer step, loss on the images held back)
    mask_shares: Shares = ()  # of the masked images, or of some of them
    mask_figures: Figures = ()  # of the steps with masked images
    validation_figures: Figures = ()  # of images held back that have masks


def report_path(options: SavingOptions) -> Path:
    """Return where the report goes: beside the model, name-report.html."""
    return Path(options.output_dir or ".") / f"{options.output_name or FINAL_NAME}-report.html"


def write_report(path: Path, data: ReportData) -> Path:
    """Write the report; return its path. Pictures that are gone are named in it."""
    sections = [
        ("Samples", _samples(data.samples)),
        ("Loss", _loss(data.losses, data.validations)),
        ("Loss inside and outside of the masks", report_masks.curves(data.mask_figures, data.validation_figures)),
        ("Masks", _masks(data.mask_line, data.mask_sheet, data.mask_shares)),
        ("Dataset", table(data.dataset)),
        ("Files", table(_file_rows(data.files))),
        ("Options that differ from their defaults", pairs(data.options)),
        ("Run", pairs(data.facts)),
    ]
    page = document(f"{data.title} – training report", _header(data), sections)
    with saved_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may not be UTF-8
    log.info("report: %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


def changed_options(options: Options) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name, without those that are secret."""
    from library.options.declare import declared
    from library.options.groups import GROUPS

    values = {}
    for group, kind in GROUPS.items():
        for option in declared(kind):
            value = getattr(getattr(options, group), option.name)
            if not option.is_secret and value != option.default:
                values[option.name] = value
    return values


def dataset_rows(facts: DatasetFacts) -> list[dict[str, Any]]:
    """Return a table of the training data, one row a subset."""
    rows = []
    for number, entry in enumerate(facts.datasets, start=1):
        resolution = entry.get("resolution") or ("?", "?")
        buckets = (entry.get("bucket_info") or {}).get("buckets") or {}
        for subset in entry.get("subsets", ()):
            rows.append(
                {
                    "Dataset": number,
                    "Folder": subset.get("metadata_file") or subset.get("image_dir") or "",
                    "Images": subset.get("img_count"),
                    "Repeats": subset.get("num_repeats"),
                    "Use": "regularisation" if subset.get("is_reg") else "training",
                    "Resolution": f"{resolution[0]}×{resolution[1]}",
                    "Buckets": len(buckets) or "off",
                    "Batch size": entry.get("batch_size_per_device"),
                }
            )
    return rows


def _header(data: ReportData) -> str:
    state = "Training report" if data.is_complete else "Training report – stopped before its end"
    tiles = []
    if data.losses:
        points = smoothed([(float(step), loss) for step, loss, _ in data.losses])
        tiles += [
            ("Steps", f"{data.losses[-1][0]:,}"),
            ("Loss, smoothed", f"{points[0][1]:.3g} → {points[-1][1]:.3g}"),
        ]
    if data.validations:
        first, last = data.validations[0][1], data.validations[-1][1]
        tiles.append(("Validation loss", f"{first:.3g} → {last:.3g}"))
    tiles += report_masks.tiles(data.mask_figures)
    if data.seconds is not None:
        tiles.append(("Time", duration(data.seconds)))
    if data.step_s is not None:
        tiles.append(("A step", f"{data.step_s:.2f} s" if data.step_s >= 1 else f"{data.step_s * 1000:.0f} ms"))
    if data.images_per_s is not None:
        tiles.append(("Images a second", f"{data.images_per_s:.3g}"))
    return heading(f"{state} · {time.strftime('%Y-%m-%d %H:%M')}", data.title, tiles)


def _samples(samples: Sequence[Sample]) -> str:
    """Return the previews, a row a prompt, in the order of time."""
    indices = sorted({sample.index for sample in samples})
    per_prompt = max(2, min(MAX_PER_PROMPT, MAX_PICTURES // max(len(indices), 1)))
    parts = []
    for index in indices:
        row = sorted((sample for sample in samples if sample.index == index), key=lambda sample: sample.step)
        shown = spread(row, per_prompt)
        prompt = row[0].prompt
        details = [f"{prompt.width}×{prompt.height}", f"{prompt.sample_steps} steps", f"guidance {prompt.scale:g}"]
        details += [f"seed {prompt.seed}"] if prompt.seed is not None else []
        details += [f"without: {prompt.negative_prompt}"] if prompt.negative_prompt else []
        details += [f"{len(shown)} of {len(row)} pictures"] if len(shown) < len(row) else []
        few = f' few" style="--count:{len(shown)}"' if len(shown) <= FEW else '"'
        figures = "".join(_sample_figure(sample) for sample in shown)
        parts.append(
            f'<article><h3>{escape(prompt.prompt) or "(empty prompt)"}</h3><p class="quiet">'
            f'{escape(" · ".join(details))}</p><div class="strip{few}>{figures}</div></article>'
        )
    return "".join(parts)


def _sample_figure(sample: Sample) -> str:
    when = f"step {sample.step:,}" if sample.step else "before training"
    if sample.epoch:
        when = f"epoch {sample.epoch}, {when}"
    drawn = _picture(sample.path, SAMPLE_SIDE, f"{sample.prompt.prompt} – {when}")
    return f"<figure>{drawn}<figcaption>{escape(when)}</figcaption></figure>"


def _loss(losses: Sequence[tuple[int, float, float]], validations: Sequence[tuple[int, float]]) -> str:
    if not losses:
        return ""
    rates = rate_chart([(step, rate) for step, _, rate in losses])
    held_back = ' <span class="key validation"></span>images held back' if validations else ""
    return (
        '<p class="legend"><span class="key smooth"></span>smoothed <span class="key raw"></span>each step'
        f"{held_back}</p>"
        + scrolled(loss_chart([(step, loss) for step, loss, _ in losses], validations) + rates, "curves")
    )


def _masks(line: str | None, sheet: Path | None, shares: Shares) -> str:
    text = (f"<p>{escape(line)}</p>" if line else "") + report_masks.share_bars(shares)
    if sheet is None:
        return text
    drawn = _picture(sheet, SHEET_SIDE, "Contact sheet: each training picture with its mask")
    return f'{text}<figure class="sheet">{drawn}<figcaption>What the masks let through.</figcaption></figure>'


def _picture(path: Path, max_side: int, alt: str) -> str:
    """Return an img element that holds the picture itself; large ones are shrunk and compressed."""
    try:
        data, kind, size = embedded(path, max_side)
    except (OSError, UnidentifiedImageError) as error:
        log.warning("report: %s cannot be shown: %s", path, error)
        return f'<p class="quiet">{escape(path.name)} is gone</p>'
    return picture(data, kind, size, alt)


def embedded(path: Path, max_side: int) -> tuple[bytes, str, tuple[int, int]]:
    """Return a picture's bytes for the report, "png" or "webp", and its size; at most max_side pixels long."""
    with Image.open(path) as image:
        if image.format == "PNG" and max(image.size) <= max_side and path.stat().st_size <= SMALL_BYTES:
            return path.read_bytes(), "png", image.size
        shrunk = image.convert("RGB")
    shrunk.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, "WEBP", quality=82)
    return buffer.getvalue(), "webp", shrunk.size


def _file_rows(files: Iterable[Path]) -> list[dict[str, Any]]:
    rows = []
    for path in files:
        try:
            digest = "(a folder)" if path.is_dir() else file_hashes(path)[1]
            rows.append({"File": path.name, "MB": round(size_of(path) / 1e6, 2), "SHA-256": digest})
        except OSError as error:
            log.warning("report: %s is left out: %s", path, error.strerror)
    return rows


def spread(row: Sequence[Sample], count: int) -> list[Sample]:
    """Return count of the row, evenly spaced, the first and the last among them; all if there are fewer."""
    if len(row) <= count:
        return list(row)
    return [row[round(position * (len(row) - 1) / (count - 1))] for position in range(count)]


def duration(seconds: float) -> str:
    """Return a time as people say it: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
