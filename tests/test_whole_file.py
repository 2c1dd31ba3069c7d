"""Files are whole or not there, and others may read them."""

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.whole_file import fitting_name, flush_to_disk, whole_file


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cat.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with whole_file(path) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "cat.bin"
    with whole_file(path) as partial:
        partial.write_bytes(b"new")
        flush_to_disk(partial)
    assert path.read_bytes() == b"new"


def test_a_safetensors_file_is_as_readable_to_others_as_any_new_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "lora.safetensors") as partial:
        save_file({"a": torch.zeros(1)}, partial)
    (tmp_path / "any").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("lora.safetensors", "any")}
    assert len(modes) == 1


def test_the_temporary_file_has_the_suffix_by_which_writers_choose_the_format(tmp_path: Path) -> None:
    with whole_file(tmp_path / "lora.ckpt") as partial:
        assert partial.suffix == ".ckpt"
        partial.write_bytes(b"")


def test_a_name_that_fits_is_left_alone() -> None:
    assert fitting_name("cat.png", "_64x64.npy") == "cat.png_64x64.npy"


def test_a_long_name_fits_with_its_temporary_mark_and_stays_its_own(tmp_path: Path) -> None:
    names = {fitting_name(f"{'猫' * 83}{number}", ".npy") for number in (1, 2)}
    assert len(names) == 2
    for name in names:
        assert name.startswith("猫" * 50)
        with whole_file(tmp_path / name) as partial:
            partial.write_bytes(b"new")
