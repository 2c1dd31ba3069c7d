"""The hashes of LoRA files, by which web UIs know them."""

import hashlib
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from library.file_hashes import hashes

DATA = Path(__file__).parent / "data"
TINY = sorted(DATA.glob("*/lora_tiny_*.safetensors"))


def naive_hashes(tensors: dict[str, torch.Tensor], values: dict[str, str]) -> tuple[str, str]:
    """Return the hashes by their definition, over a whole file in memory."""
    kept = {key: value for key, value in values.items() if key.startswith("ss_")}
    blob = safetensors.torch.save(tensors, kept or None)
    (length,) = struct.unpack("<Q", blob[:8])
    part = blob[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(blob[8 + length :]).hexdigest(), hashlib.sha256(part).hexdigest()[:8]


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_hashes_equal_those_that_sd_scripts_wrote(path: Path) -> None:
    with safe_open(path, "pt") as file:
        written = file.metadata()
    found = hashes(safetensors.torch.load_file(path), written)
    assert found == (written["sshs_model_hash"], written["sshs_legacy_hash"])


def test_there_are_reference_files() -> None:
    assert len(TINY) >= 2


@pytest.mark.parametrize("size", [100, 262_000, 262_144, 270_000, 300_000], ids="{} numbers".format)
def test_hashes_equal_the_naive_ones_wherever_a_tensor_meets_the_legacy_window(size: int) -> None:
    torch.manual_seed(0)
    tensors = {
        "b.alpha": torch.tensor(4.0, dtype=torch.bfloat16),
        "a.weight": torch.randn(size),
        "c.weight": torch.randn(40, 30).half(),
        "d.transposed": torch.randn(5, 7).T,
        "e.count": torch.tensor([1, 2, 3]),
    }
    tensors["d.transposed"] = tensors["d.transposed"].contiguous()
    values = {"ss_output_name": 'é "quoted" \\ \n\t\x01 猫', "modelspec.title": "not in the hash"}
    assert hashes(tensors, values) == naive_hashes(tensors, values)


def test_a_transposed_tensor_hashes_as_it_is_written() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert hashes({"x": tensor.T}, {}) == naive_hashes({"x": tensor.T.contiguous()}, {})


def test_the_title_does_not_change_the_hashes() -> None:
    tensors = {"x": torch.ones(3)}
    assert hashes(tensors, {"modelspec.title": "a"}) == hashes(tensors, {"modelspec.title": "b"})
