"""--config_file: option values in TOML, read and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.errors import OptionError
from library.options.declare import declared
from library.options.groups import GROUPS
from library.options.toml import read_toml
from library.options.values import Declared


def path_of(given: str) -> Path:
    """Return the config file's path; the ending .toml may be left out."""
    return Path(given if given.endswith(".toml") else f"{given}.toml")


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the file's values by option name, sections flattened, and warnings about keys that stand there twice.

    Raises: OptionError for a file that is missing or is not TOML.
    """
    if not path.is_file():
        raise OptionError(f"--config_file: there is no file {path}. Check the path.")
    values: dict[str, Any] = {}
    warnings = []
    secret = {each.name for group in GROUPS.values() for each in declared(group) if each.is_secret}
    for name, value in _flattened(read_toml(path)):
        if name in values and values[name] != value:
            shown = "the last one" if name in secret else f"the last value, {value!r},"
            warnings.append(f"{path}: {name} is given twice; {shown} is used")
        values[name] = value
    return values, warnings


def write(path: Path, values: Mapping[str, Any], known: Mapping[str, Declared]) -> None:
    """Write the values that differ from the defaults to a new TOML file, a section for each group; secrets stay out.

    Args:
        path: of the file.
        values: of options, by name.
        known: every option as the script has it, by name.

    Raises: OptionError when the file exists or cannot be written.
    """
    lines: list[str] = []
    for title, group in GROUPS.items():
        rows = [
            f"{each.name} = {_toml(values[each.name])}"
            for each in declared(group)
            if each.name in values and values[each.name] != known[each.name].default and not each.is_secret
        ]
        if rows:
            lines += [f"[{title}]", *rows, ""]
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write("\n".join(lines))
    except FileExistsError:
        raise OptionError(
            f"--output_config: {path} exists and is not overwritten. Delete it, or choose another --config_file."
        ) from None
    except OSError as error:
        raise OptionError(f"--output_config: {path} cannot be written: {error.strerror}.") from None


def _flattened(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value)
        else:
            yield key, value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON text is a TOML basic string
