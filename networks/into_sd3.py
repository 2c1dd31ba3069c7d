"""LoRA files added to an SD3 model: to its file, and to those of text encoders that are kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource, open_tensors
from library.models.scaled import unscaled
from library.models.sd3_files import TITLES
from library.models.sd3_text import ENCODERS
from networks import files, into_checkpoint
from networks.checkpoint_places import SD3, SD3_TEXT, Place, places, sd3_text_places
from networks.into_checkpoint import Output, Share


@dataclass(frozen=True)
class TextFile:
    """A text encoder in a file of its own."""

    encoder: str  # of ENCODERS
    path: Path
    save_to: Path


@dataclass(frozen=True)
class Job:
    """A file that is merged into."""

    file: TensorSource
    places: Mapping[str, Place]  # of its weights, by module
    save_to: Path


def merge(
    model: Path, texts: Sequence[TextFile], shares: Sequence[Share], output: Output, advice: Mapping[str, str]
) -> None:
    """Write an SD3 model, and its text encoders' own files, with LoRA files added.

    A text encoder that is in the model's file and in one of its own is changed in both.

    Args:
        model: a single file, in the original layout.
        texts: the files of text encoders.
        shares: what is added.
        output: the model's file to write, and the number formats of all.
        advice: what to do where the model is of another kind, by that kind's version.

    Raises: CheckpointError, before anything is written where files do not fit together.
    """
    jobs = [_model_job(model, output.path, advice), *(_text_job(text) for text in texts)]
    known = {name for job in jobs for name in job.places}
    _check_texts(texts, shares)
    _advise_missing(model, shares, known)
    into_checkpoint.check_modules(shares, SD3, model, known)
    planned = [into_checkpoint.assigned(shares, job.places) for job in jobs]
    for job, additions in zip(jobs, planned, strict=True):
        header = {}
        if output.with_metadata and job is jobs[0]:
            header = into_checkpoint.header_for(job.file, SD3, shares, output.path)
        elif output.with_metadata:
            header = files.header_of(job.file.path)
        into_checkpoint.write(job.file, additions, replace(output, path=job.save_to), header)


def _model_job(model: Path, save_to: Path, advice: Mapping[str, str]) -> Job:
    file = unscaled(open_tensors(model))
    return Job(file, places(file, SD3, advice), save_to)


def _text_job(text: TextFile) -> Job:
    file = unscaled(open_tensors(text.path))
    if any("joint_blocks." in name for name in file.shapes):
        raise CheckpointError(f"--{text.encoder} {text.path}: is a whole model. Give the file of a text encoder alone.")
    found = sd3_text_places(file, text.encoder)
    if not found:
        raise CheckpointError(
            f"--{text.encoder} {text.path}: holds no {TITLES[text.encoder]} text encoder. Give the file of one."
        )
    return Job(file, found, text.save_to)


def _check_texts(texts: Sequence[TextFile], shares: Sequence[Share]) -> None:
    for text in texts:
        start = SD3_TEXT[text.encoder]
        if not any(name.startswith(start) for share in shares for name in share.lora.modules):
            raise CheckpointError(
                f"--{text.encoder}: none of --models adapts {TITLES[text.encoder]}, so {text.save_to} would be a copy. "
                f"Leave out --{text.encoder} and --{text.encoder}_save_to."
            )


def _advise_missing(model: Path, shares: Sequence[Share], known: set[str]) -> None:
    """Name the options for text encoders that a file adapts and nothing holds, in the warning's words."""
    for encoder in ENCODERS:
        start = SD3_TEXT[encoder]
        if any(name.startswith(start) for name in known):
            continue
        for share in shares:
            missing = [f"--{encoder}" for name in share.lora.modules if name.startswith(start)][:1]
            files.warn_of_names(
                share.lora.path,
                f"text encoder that {model} does not hold, so its part is left out; give it with",
                missing,
            )
