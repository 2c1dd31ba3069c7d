"""Checks of captions: without text, garbled, or naming what the masks leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from library.dataset import mask_captions
from library.dataset.problems import Problem, listed
from library.dataset.scan import Sample
from library.inspection.kinds import found
from library.inspection.scene import Scene

MASKED = ("file", "alpha")  # kinds of masks of files
OVERLAID = re.compile(  # what people paint out of pictures
    r"\b(watermarks?|signatures?|signed|logos?|user ?names?|artist name|subtitles?|speech bubbles?|time ?stamps?"
    r"|web address|mosaic censoring|censored|letterboxed)\b",
    re.IGNORECASE,
)
WHOLE = re.compile(r"(\w+ )?(text|border|frame)", re.IGNORECASE)  # only as a tag: a sentence may speak of others
BACKGROUND = re.compile(r"(\w+ )?background", re.IGNORECASE)
GARBLED = re.compile("\ufffd|Ã[\u0080-\u00bf©¤¶¼ŸŒž]|â€|ã‚|ãƒ|ï»¿")  # UTF-8 that was read as Latin-1 or cp1252
MOST_WORDS = 5  # of a tag: more are a sentence, which mask_drop_tags would leave out whole
BLACK = 0.05  # weight of a border that is masked out


def blank(scene: Scene) -> Iterator[Problem]:
    """Yield images whose caption file holds nothing but white space."""
    for sample in _each(scene):
        if not "".join(sample.captions).strip() and sample.subset.metadata_file is None:
            file = sample.path.with_name(sample.path.stem + sample.subset.caption_extension)
            if file.is_file():
                reason = f"its caption {file.name} holds nothing but white space."
                joint = "caption files hold nothing but white space"
                yield found("caption-empty", sample.path, reason, severity="warning", files=(file,), joint=joint)


def garbled(scene: Scene) -> Iterator[Problem]:
    """Yield captions with the traces of a wrong encoding."""
    for sample in _each(scene):
        match = GARBLED.search("\n".join(sample.captions))
        if match:
            near = "\n".join(sample.captions)[max(0, match.start() - 10) : match.end() + 10]
            reason = f'its caption has garbled letters, near "{near}".'
            yield found("caption-garbled", sample.path, reason, joint="captions have garbled letters")


def naming_what_is_masked(scene: Scene) -> Iterator[Problem]:
    """Yield captions of masked images that name what is usually masked out."""
    for sample in _each(scene):
        if sample.mask.kind in MASKED:
            tags = [tag for tag in _tags(sample) if OVERLAID.search(tag) or WHOLE.fullmatch(tag)]
            yield from _naming(sample, tags)


def naming_the_background(scene: Scene) -> Iterator[Problem]:
    """Yield captions that name the background where the border of the picture is masked out."""
    told: set[Path] = set()
    for looked in scene.looked:
        coverage, sample = looked.coverage, looked.sample
        is_left_out = coverage is not None and coverage.frame < BLACK and 0 < coverage.judged < 1
        if is_left_out and sample.mask.kind in MASKED and sample.path not in told:
            told.add(sample.path)
            yield from _naming(sample, [tag for tag in _tags(sample) if BACKGROUND.fullmatch(tag)])


def _naming(sample: Sample, tags: list[str]) -> Iterator[Problem]:
    dropped = mask_captions.left_out(sample)
    tags = [tag for tag in dict.fromkeys(tags) if tag.casefold() not in dropped]
    if not tags:
        return
    short = [tag for tag in tags if len(tag.split()) <= MOST_WORDS]
    quoted = ", ".join(f'"{tag}"' for tag in short)
    remedy = f"Set mask_drop_tags = [{quoted}] in the subset, or take it out." if short else "Take it out of the text."
    named = short + [match[0] for tag in tags if tag not in short and (match := OVERLAID.search(tag))]
    reason = f'its caption names "{listed(named)}", which is learnt nowhere if the mask leaves it out.'
    joint = "captions of masked images name what masks leave out, like watermarks"
    yield found("caption-names-masked", sample.path, reason, remedy=remedy, joint=joint)


def _tags(sample: Sample) -> list[str]:
    lines = "\n".join(sample.captions).split("\n")
    return [tag.strip() for line in lines for tag in line.split(sample.subset.caption_separator)]


def _each(scene: Scene) -> Iterator[Sample]:
    """Yield the samples of files, each image once."""
    seen = set()
    for sample in scene.of_files:
        if sample.path not in seen:
            seen.add(sample.path)
            yield sample
