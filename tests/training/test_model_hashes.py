"""The base model's hashes."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from library.training.model_hashes import BackgroundHash, default_cache_file, file_hashes, remembered_hashes

CONTENT = bytes(range(256)) * 4500  # 1.15 MB: the 64 KiB at 1 MiB are inside
WHOLE = hashlib.sha256(CONTENT).hexdigest()
SHORT = hashlib.sha256(CONTENT[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def test_both_hashes_are_those_of_the_definition(model: Path) -> None:
    assert file_hashes(model) == (SHORT, WHOLE)


def test_a_small_file_has_the_short_hash_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    assert file_hashes(tmp_path / "small")[0] == "e3b0c442"


def test_the_metadata_has_both_hashes_under_their_keys(model: Path) -> None:
    assert BackgroundHash.of_model(str(model)).metadata() == {"ss_sd_model_hash": SHORT, "ss_new_sd_model_hash": WHOLE}
    assert BackgroundHash.of_vae(str(model)).metadata() == {"ss_vae_hash": SHORT, "ss_new_vae_hash": WHOLE}


def test_a_folder_has_a_word_in_place_of_hashes_and_a_hub_id_none(tmp_path: Path) -> None:
    assert set(BackgroundHash.of_model(str(tmp_path)).metadata().values()) == {"IsADirectory"}
    assert BackgroundHash.of_model("someone/some-model").metadata() == {}
    assert BackgroundHash.of_vae(None).metadata() == {}


def test_the_start_does_not_wait_for_the_hash(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(400 << 20)  # a hole: large to hash, nothing on the disk
    hashing = BackgroundHash.of_model(str(large))
    assert hashing.is_running
    assert hashing.metadata()["ss_sd_model_hash"] == hashlib.sha256(bytes(0x10000)).hexdigest()[:8]
    assert not hashing.is_running


def test_hashes_are_remembered_until_the_file_changes(model: Path, tmp_path: Path) -> None:
    cache_file = tmp_path / "cache" / "hashes.json"
    remembered_hashes(model, cache_file)
    entries = json.loads(cache_file.read_text())
    (key,) = entries
    cache_file.write_text(json.dumps({key: ["short", "whole"]}))
    assert remembered_hashes(model, cache_file) == ("short", "whole")  # not read again
    status = model.stat()
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert remembered_hashes(model, cache_file) == (SHORT, WHOLE)


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 1}', "\x00"])
def test_a_damaged_cache_file_costs_only_time(model: Path, tmp_path: Path, damage: str) -> None:
    cache_file = tmp_path / "hashes.json"
    cache_file.write_text(damage)
    assert remembered_hashes(model, cache_file) == (SHORT, WHOLE)
    assert list(json.loads(cache_file.read_text()).values())[-1] == [SHORT, WHOLE]


def test_a_cache_folder_that_cannot_be_made_is_ignored(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert remembered_hashes(model, tmp_path / "file" / "hashes.json") == (SHORT, WHOLE)


def test_a_model_that_vanishes_leaves_a_warning_and_no_hash(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashing = BackgroundHash(None, "a", "b", None)
    model.unlink()
    hashing._work(model, None)
    assert hashing.metadata() == {}
    assert "left out of the metadata" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has another place for it")
def test_the_cache_file_follows_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / "masked-diffusion-training" / "model_hashes.json"
