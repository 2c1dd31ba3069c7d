"""Errors that are the user's to mend: one line each, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's options, data or files: says what, the value, where, and what to do."""


class OptionError(UserError):
    """An option or a key of a config file is unknown, has a wrong value, or contradicts another."""


class DataError(UserError):
    """An image, mask, caption or dataset config cannot be used."""


class CheckpointError(UserError):
    """A model or LoRA file cannot be used."""


def did_you_mean(word: str, choices: Iterable[str], *, least: float = 0.6) -> str:
    """Return ' Did you mean X?' for the nearest of choices, or '' if none is alike by least, from 0 to 1."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=least)
    return f" Did you mean {near[0]}?" if near else ""
