import json
import os
import time
from dataclasses import replace

import pytest
import torch
from full_disk import largest_file

from library.cache import text
from library.cache.entries import remove_abandoned
from library.cache.text import State, entry_folder, entry_path, fingerprint_of, judge
from library.errors import DataError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KEY = ("a cat",)


def outputs_of(dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    made = {"hidden": torch.randn(77, 8, generator=generator), "pooled": torch.randn(8, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


@pytest.fixture
def wanted():
    return fingerprint_of(KEY, "encoder", torch.float16)


@pytest.fixture
def entry(tmp_path, wanted):
    path = entry_path(tmp_path, KEY)
    text.write(path, outputs_of(), wanted)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_gives_back_what_was_written(dtype, tmp_path):
    outputs = outputs_of(dtype)
    text.write(tmp_path / "e.safetensors", outputs, fingerprint_of(KEY, "encoder", dtype))
    found = text.read(tmp_path / "e.safetensors")
    assert found.keys() == outputs.keys()
    assert all(torch.equal(found[name], outputs[name]) for name in outputs)
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_padding_with_zeros_is_given_back_and_not_stored(tmp_path, wanted):
    padded = torch.zeros(256, 64)
    padded[:5] = 1.0
    padded[2] = 0.0  # within the text: stays
    padded[4, 1:] = 0.0  # not zero throughout: stays
    path = tmp_path / "e.safetensors"
    text.write(path, {"t5": padded, "pooled": torch.zeros(64), "nothing": torch.zeros(9, 64)}, wanted)
    found = text.read(path)
    assert torch.equal(found["t5"], padded)
    assert torch.equal(found["pooled"], torch.zeros(64))
    assert torch.equal(found["nothing"], torch.zeros(9, 64))
    assert path.stat().st_size < (5 + 1 + 1) * 64 * 4 + 1000


def test_an_entry_takes_little_more_than_its_numbers(entry):
    assert entry.stat().st_size < (77 * 8 + 8) * 2 + 700


def test_an_entry_is_named_by_its_text_alone(tmp_path):
    assert entry_path(tmp_path, ("a cat",)) == entry_path(tmp_path, ("a cat",))
    others = [("a dog",), ("", "a cat"), ("a cat", ""), ("a", "cat"), ("a\ncat",), ("ein Kätzchen",), ('a", "cat',)]
    assert len({entry_path(tmp_path, key).name for key in [KEY, *others]}) == 8
    assert entry_folder(tmp_path, "sd") != entry_folder(tmp_path, "sdxl")


def test_a_whole_entry_of_the_same_text_and_encoder_is_fresh(entry, wanted):
    assert judge(entry, wanted) == State.FRESH


@pytest.mark.parametrize(
    "other",
    [
        fingerprint_of(KEY, "another", torch.float16),
        fingerprint_of(KEY, "encoder", torch.bfloat16),
        fingerprint_of(("another",), "encoder", torch.float16),
    ],
    ids=["encoder", "dtype", "text"],
)
def test_an_entry_of_something_else_is_stale(other, entry):
    assert judge(entry, other) == State.STALE


def test_an_entry_of_another_format_is_stale(entry, wanted):
    assert judge(entry, replace(wanted, format=text.FORMAT + 1)) == State.STALE


def test_a_missing_entry_is_missing(tmp_path, wanted):
    assert judge(tmp_path / "none.safetensors", wanted) == State.MISSING


@pytest.mark.parametrize("length", [0, 4, 7, 100, -1])
def test_a_cut_entry_is_damaged_and_reading_it_is_an_error_that_names_it(length, entry, wanted):
    entry.write_bytes(entry.read_bytes()[:length])
    assert judge(entry, wanted) == State.DAMAGED
    with pytest.raises(DataError, match=entry.name):
        text.read(entry)


@pytest.mark.parametrize("content", [b"no entry at all", b"\xff" * 200, (2).to_bytes(8, "little") + b"{}"])
def test_something_else_in_an_entrys_place_is_damaged(content, entry, wanted):
    entry.write_bytes(content)
    assert judge(entry, wanted) == State.DAMAGED
    with pytest.raises(DataError, match="cannot be used"):
        text.read(entry)


def test_an_entry_whose_header_lost_its_fingerprint_is_damaged(entry, wanted):
    from safetensors.torch import save_file

    save_file({"hidden": torch.zeros(2, 2)}, entry, metadata={"other": "1"})
    assert judge(entry, wanted) == State.DAMAGED
    with pytest.raises(DataError, match="cannot be used"):
        text.read(entry)


def test_a_failed_write_leaves_the_entry_as_it_was(entry, wanted):
    before = entry.read_bytes()
    with largest_file(100), pytest.raises(DataError, match="--cache_dir"):
        text.write(entry, outputs_of(), wanted)
    assert entry.read_bytes() == before
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_what_a_killed_run_left_half_written_is_no_entry_and_is_removed_after_an_hour(entry, wanted):
    half = entry.with_name(f".{entry.stem}.1234.part.safetensors")
    half.write_bytes(entry.read_bytes()[:50])
    remove_abandoned(entry.parent)
    assert half.exists()  # may still be in the making
    os.utime(half, (time.time() - 4000,) * 2)
    remove_abandoned(entry.parent)
    assert not half.exists()
    assert judge(entry, wanted) == State.FRESH


def test_the_header_says_what_the_entry_was_made_from(entry):
    from safetensors import safe_open

    with safe_open(entry, "pt") as opened:
        written = json.loads(opened.metadata()["fingerprint"])
    assert written == {"text": text.digest(KEY), "encoder": "encoder", "dtype": "F16", "format": text.FORMAT}
