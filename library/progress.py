"""The one progress bar: cache, training and sampling use it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def is_shown() -> bool:
    """Return whether a bar makes sense: a terminal to draw on, and the main process of a run."""
    return sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def progress(
    items: Iterable[Item] | None = None, *, label: str, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm[Item]:
    """Return items wrapped in a bar with rate and remaining time; without items, a bar to be advanced by update()."""
    return tqdm(items, desc=label, total=total, unit=unit, initial=initial, disable=not is_shown(), dynamic_ncols=True)
