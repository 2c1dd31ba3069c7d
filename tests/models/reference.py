"""The reference's numbers that the tests of models use."""

import gzip
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data"


def read(name: str) -> Any:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


def base_keys(architecture: str) -> dict[str, list[int]]:
    return read(f"models/base_keys_{architecture}.json.gz")["required"]
