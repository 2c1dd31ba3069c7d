"""Settings for the whole suite. They stand before any import of torch, because it reads them only then."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that looks something up on the network fails
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost 30 times on a shared machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models of the tests are too small to share out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

for place in (ROOT, Path(__file__).resolve().parent):  # the project itself, and what tests share
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))


LEVEL_AS_FOUND = logging.getLogger().level


@pytest.fixture(autouse=True)
def logging_as_found() -> Iterator[None]:
    """Take back what a whole command sets up, so that one test does not hear of another's messages."""
    yield
    from library.cli import HANDLER  # once ROOT is among the places to import from

    root = logging.getLogger()
    for handler in [each for each in root.handlers if each.name == HANDLER]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(LEVEL_AS_FOUND)
