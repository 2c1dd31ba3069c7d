"""Reads key=value arguments, as --optimizer_args and --lr_scheduler_args take them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

from library.errors import OptionError, did_you_mean


def parse_literals(pairs: Iterable[str] | None, option: str) -> dict[str, Any]:
    """Return {"betas": (0.9, 0.99)} for ["betas=(0.9,0.99)"]: each value is a Python literal.

    Args:
        pairs: texts of the form key=value, split at the first equals sign; None is no argument.
        option: their option, for messages.

    Raises: OptionError for a text without a key or an equals sign, a repeated key, and a value that is no literal.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier():
            raise OptionError(f"{option} {pair}: write key=value, without spaces around the equals sign.")
        if key in parsed:
            raise OptionError(f"{option} gives {key} twice; leave one out.")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            meant = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(text.lower(), repr(text))
            raise OptionError(
                f"{option} {pair}: {text or 'nothing'} is not a number, True, False, None, (a, b) or a quoted text. "
                f'Did you mean "{key}={meant}"?'
            ) from None
    return parsed


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], option: str, owner: str) -> None:
    """Refuse an argument that its owner does not take.

    Args:
        given: parsed arguments.
        known: names that the owner takes.
        option: "--optimizer_args".
        owner: "AdamW", for the message.

    Raises: OptionError that lists the known names.
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no arguments"
            raise OptionError(f"{option} {key}: {owner} {takes}.{did_you_mean(key, known)}")
