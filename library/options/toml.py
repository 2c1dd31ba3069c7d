"""Reading TOML files, with one line of error when one cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from library.errors import OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file in UTF-8, with or without a byte order mark.

    Raises: OptionError when there is no such file, or its text is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise OptionError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise OptionError(f"{path}: is not text in UTF-8. Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path}: is not valid TOML: {error}.") from None
