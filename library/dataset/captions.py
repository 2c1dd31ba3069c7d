"""Captions: how they are read, and what is made of one each time that its image is drawn."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.dataset.problems import FileError

if TYPE_CHECKING:
    from library.dataset.config import SubsetConfig

WILDCARD = re.compile(r"\{([^{}]+)\}")
OPENING, CLOSING = "\ue000", "\ue001"  # stand in for {{ and }} while wildcards are drawn; private, so in no caption
EDGE = "\ue002"  # between a caption and its prefix and suffix while tags are left out, which it may hold beside them
NO_TAGS: frozenset[str] = frozenset()


def read(image: Path, subset: SubsetConfig) -> tuple[str, ...] | None:
    """Return the caption lines of an image, one unless wildcards are on; None if it has no caption file.

    The file is the image's name with the caption extension, or that without its last four parts at underscores,
    which is how a face's place is written into a file name.

    Raises: FileError if the file is empty or not UTF-8.
    """
    parts = image.stem.split("_")
    stems = [image.stem, "_".join(parts[:-4])] if len(parts) >= 5 else [image.stem]
    for stem in stems:
        path = image.with_name(stem + subset.caption_extension)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            reason = f"{path}: is not UTF-8 (at byte {error.start})."
            raise FileError("caption-encoding", reason, "Save the caption as UTF-8.") from None
        except OSError as error:
            message = f"{path}: cannot be read ({error.strerror or error})."
            raise FileError("caption-unreadable", message) from None
        if not text:
            raise FileError("caption-empty", f"{path}: is empty.", "Write a caption, or delete the file.")
        lines = [line.strip() for line in text.split("\n")]
        if subset.enable_wildcard:
            return tuple(line for line in lines if line) or ("",)
        return (lines[0],)
    return None


def compose(
    lines: Sequence[str],
    subset: SubsetConfig,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_train_steps: int,
    left_out: frozenset[str] = NO_TAGS,
) -> str:
    """Return the caption of one draw, after prefix, dropout, wildcards, shuffling and tag dropout.

    Tags are left out at the very end, so that the same draws give the same order with them and without.

    Args:
        lines: as read; one of them is drawn if there are several.
        subset: says what is done.
        rng: the draw's own generator; asked for dropout, line, wildcards, order, tags in that order, each only if used.
        epoch: from 1.
        step: optimizer steps done before this one.
        max_train_steps: what token_warmup_step below 1 is a share of.
        left_out: tags that the caption does not have, case-folded.
    """
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return ""
    if subset.caption_dropout_every_n_epochs > 0 and epoch % subset.caption_dropout_every_n_epochs == 0:
        return ""
    caption = _with_ends(rng.choice(lines) if len(lines) > 1 else lines[0], subset, EDGE if left_out else "")
    if subset.enable_wildcard:
        caption = _draw_wildcards(caption, rng)
    return _finished(caption, subset, rng, step, max_train_steps, left_out)


def every(lines: Sequence[str], subset: SubsetConfig, left_out: frozenset[str] = NO_TAGS) -> Iterator[str]:
    """Yield each caption that `compose` can return, some perhaps twice; their number can be very large.

    Args:
        lines: as read.
        subset: must not ask for what has no end: shuffled tags, a warm-up or dropout of tags.
        left_out: as `compose` takes them.
    """
    if subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0:
        yield ""
    for line in lines:
        caption = _with_ends(line, subset, EDGE if left_out else "")
        for drawn in _every_wildcard(caption) if subset.enable_wildcard else [caption]:
            yield _finished(drawn, subset, random.Random(0), step=0, max_train_steps=1, left_out=left_out)


def preview(lines: Sequence[str], subset: SubsetConfig, left_out: frozenset[str] = NO_TAGS) -> str:
    """Return all lines of a caption as far as they do not depend on chance, epoch or step."""
    fixed = replace(
        subset,
        enable_wildcard=False,
        shuffle_caption=False,
        token_warmup_step=0,
        caption_dropout_rate=0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0,
    )
    rng = random.Random(0)
    return "\n".join(
        compose([line], fixed, rng, epoch=1, step=0, max_train_steps=1, left_out=left_out) for line in lines
    )


def _with_ends(line: str, subset: SubsetConfig, edge: str = "") -> str:
    caption = f"{subset.caption_prefix}{edge} {line}" if subset.caption_prefix else line
    return f"{caption}{edge} {subset.caption_suffix}" if subset.caption_suffix else caption


def _draw_wildcards(caption: str, rng: random.Random) -> str:
    """Return caption with each {a|b} replaced by a or b; {{ and }} become single braces."""
    caption = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), _braces_hidden(caption))
    return _braces_shown(caption)


def _every_wildcard(caption: str) -> Iterator[str]:
    """Yield all that `_draw_wildcards` can return."""
    hidden = _braces_hidden(caption)
    for chosen in itertools.product(*(match[1].split("|") for match in WILDCARD.finditer(hidden))):
        words = iter(chosen)
        yield _braces_shown(WILDCARD.sub(lambda _, words=words: next(words), hidden))  # type: ignore[misc]


def _braces_hidden(caption: str) -> str:
    return caption.replace("{{", OPENING).replace("}}", CLOSING)


def _braces_shown(caption: str) -> str:
    return caption.replace(OPENING, "{").replace(CLOSING, "}")


def _finished(
    caption: str,
    subset: SubsetConfig,
    rng: random.Random,
    step: int,
    max_train_steps: int,
    left_out: frozenset[str],
) -> str:
    """Return caption after all that is done to its tags and separators."""
    if _has_tag_work(caption, subset):
        tags = _rearranged(caption, subset, rng, step, max_train_steps)
        if left_out:
            within = _separators(subset)[1:]
            tags = [
                rest.replace(EDGE, "").strip() for tag in tags if (rest := _rest(tag, within, left_out)) is not None
            ]
        caption = ", ".join(tags)  # as sd-scripts: whatever the separator was
    elif left_out:
        caption = without(caption, subset, left_out)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _has_tag_work(caption: str, subset: SubsetConfig) -> bool:
    return (
        subset.shuffle_caption
        or subset.token_warmup_step > 0
        or subset.caption_tag_dropout_rate > 0
        # Not so in sd-scripts, where the mark stays in the prompt unless one of the three above is on.
        or bool(subset.keep_tokens_separator and subset.keep_tokens_separator in caption)
    )


def without(caption: str, subset: SubsetConfig, left_out: frozenset[str]) -> str:
    """Return caption as it is written, less the tags left_out (case-folded) and the separators beside them."""
    rest = _rest(caption, _separators(subset), left_out)
    rest = "" if rest is None else rest.replace(EDGE, "")
    return rest if len(rest) == len(caption.replace(EDGE, "")) else rest.strip()


def tags_of(caption: str, subset: SubsetConfig) -> set[str]:
    """Return all tags that a caption as read can have, case-folded; a wildcard's words count one by one."""
    separators = [*_separators(subset), *("{|}" if subset.enable_wildcard else "")]
    pattern = "|".join(map(re.escape, separators))
    pieces = re.split(pattern, _with_ends(caption, subset, EDGE))
    return {piece.strip().casefold() for piece in pieces} - {""}


def _separators(subset: SubsetConfig) -> tuple[str, ...]:
    """Return what stands between tags, the outermost first."""
    inner = (subset.secondary_separator, subset.keep_tokens_separator, EDGE)
    return (subset.caption_separator, *(each for each in inner if each))


def _rest(text: str, separators: Sequence[str], left_out: frozenset[str]) -> str | None:
    """Return what is left of text without the tags left_out, None if nothing is."""
    if not separators:
        return None if text.strip().casefold() in left_out else text
    parts = text.split(separators[0])
    kept = [rest for part in parts if (rest := _rest(part, separators[1:], left_out)) is not None]
    is_empty = len(kept) < len(parts) and not any(part.replace(EDGE, "").strip() for part in kept)
    return None if is_empty else separators[0].join(kept)


def _rearranged(caption: str, subset: SubsetConfig, rng: random.Random, step: int, max_train_steps: int) -> list[str]:
    """Return the tags of caption: the fixed first ones, what is left of the others, and the fixed tail."""
    fixed, flexible, tail = _parts(caption, subset)
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if step < warmup:
        num_more = math.floor(step * ((len(flexible) - subset.token_warmup_min) / warmup))
        flexible = flexible[: num_more + subset.token_warmup_min]
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if subset.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= subset.caption_tag_dropout_rate]
    return fixed + flexible + tail


def _parts(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """Return the fixed tags, the flexible ones, and the fixed tail."""

    def tags(text: str) -> list[str]:
        return [tag.strip() for tag in text.strip().split(subset.caption_separator)]

    mark = subset.keep_tokens_separator
    if not mark or mark not in caption:
        all_tags = tags(caption)
        return all_tags[: subset.keep_tokens], all_tags[subset.keep_tokens :], []
    fixed, _, rest = caption.partition(mark)
    flexible, _, tail = rest.partition(mark)
    first, middle, last = ([tag for tag in tags(part) if tag.strip(f" {EDGE}")] for part in (fixed, flexible, tail))
    return first, middle, last
