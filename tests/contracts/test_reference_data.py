"""The table of the reference data names every file and who reads it."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS / "data"
ROWS = re.findall(r"^\| (`.+?) \| .+ \| (`.+?) \|$", (DATA / "README.md").read_text("utf-8"), re.MULTILINE)
PATTERNS = [name for files, _ in ROWS for name in re.findall(r"`(.+?)`", files)]
READERS = sorted({name for _, readers in ROWS for name in re.findall(r"`(.+?)`", readers)})


def test_every_file_has_its_row() -> None:
    files = [path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [name for name in files if name != "README.md" and not any(fnmatch(name, p) for p in PATTERNS)] == []


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_row_has_its_files(pattern: str) -> None:
    assert list(DATA.glob(pattern))


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_is_a_test(reader: str) -> None:
    assert (TESTS / reader).is_file()
