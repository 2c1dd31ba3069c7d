"""What is wrong with a dataset, collected so that all of it can be told at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import DataError

log = logging.getLogger(__name__)

MOST_NAMES = 10  # in one message

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Joint:
    """How several problems of one kind are told in one line: '<count> <what>: <names>. <remedy>'."""

    what: str
    name: str  # this problem's entry in the list of names
    remedy: str = ""


class FileError(DataError):
    """A file that cannot be used, with the kind of its fault."""

    def __init__(self, code: str, reason: str, remedy: str = "") -> None:
        """Take the code, see Problem.code, what is wrong, naming the file, and what to do."""
        super().__init__(f"{reason} {remedy}".rstrip())
        self.code, self.remedy = code, remedy


@dataclass(frozen=True)
class Problem:
    """Something about a dataset: an error stops training, a warning does not, a note is told only by the inspection."""

    severity: Severity
    path: Path
    message: str  # one line
    joint: Joint | None = None
    code: str = "other"  # its kind, which library/inspection/kinds.py explains
    remedy: str = ""  # what to do, if that is not what the kind says
    files: tuple[Path, ...] = ()  # others that it is about: of a mask its image, of a copy the original


def raise_errors(problems: Sequence[Problem]) -> None:
    """Raise a DataError of one line for the first kind of error among problems; do nothing if there is none."""
    messages = joint_messages([problem for problem in problems if problem.severity == "error"])
    if messages:
        others = f" ({len(messages) - 1} more: tools/check_dataset.py lists them)" if messages[1:] else ""
        raise DataError(messages[0] + others)


def log_warnings(problems: Sequence[Problem]) -> None:
    """Log a line for each kind of warning among problems."""
    for message in joint_messages([problem for problem in problems if problem.severity == "warning"]):
        log.warning("%s", message)


def joint_messages(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each problem, but only one for all that are alike."""
    alike: dict[str | int, list[Problem]] = {}
    for number, problem in enumerate(problems):
        alike.setdefault(problem.joint.what if problem.joint else number, []).append(problem)
    messages = []
    for group in alike.values():
        names = [problem.joint.name for problem in group if problem.joint]
        first = group[0].joint
        if first is None or len(group) == 1:
            messages.append(group[0].message)
        else:
            messages.append(f"{len(group)} {first.what}: {listed(names)}. {first.remedy}".rstrip())
    return messages


def listed(names: Sequence[str]) -> str:
    """Return the first names with commas between them, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
