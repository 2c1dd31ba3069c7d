"""Reading TOML files, with one line of error when one cannot be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from library.errors import OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BACKSLASHES = "Between double quotes \\ begins a special character: write paths with /, or between single quotes."


def has_control_character(path: str) -> bool:
    """Return whether a path holds what none should: a backslash before n or t gave it in TOML."""
    return any(character < " " for character in path)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file in UTF-8, with or without a byte order mark.

    Raises: OptionError when there is no such file, or its text is not TOML.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise OptionError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise OptionError(f"{path}: is not text in UTF-8. Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path}: is not valid TOML: {error}.{_hint(error, text)}") from None


def _hint(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Return what to do about a Windows path between double quotes, nothing about other errors."""
    place = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    if place is None or not 0 < int(place[1]) <= len(lines) or "\\" not in lines[int(place[1]) - 1]:
        return ""
    return " " + BACKSLASHES
