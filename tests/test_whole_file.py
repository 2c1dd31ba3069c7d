"""Files are whole or not there, and others may read them."""

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.whole_file import (
    fitting_name,
    flush_to_disk,
    remove_folder,
    stand_in,
    whole_file,
    whole_folder,
)


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


def folder_with(path: Path, text: str) -> Path:
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "config.json").write_text(text)
    return path


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "cat", "old")
    (path / "left over").touch()
    with whole_folder(path) as partial:
        folder_with(partial / "more", "new")
        assert (path / "unet" / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()] == [
        "more/unet/config.json"
    ]


def test_a_writer_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "cat", "old")

    def fail() -> None:
        with whole_folder(path) as partial:
            folder_with(partial / "more", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "unet" / "config.json").read_text() == "old"


def test_what_a_kill_between_the_two_renames_left_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "cat"
    folder_with(stand_in(path), "old")
    with whole_folder(path) as partial:
        assert (path / "unet" / "config.json").read_text() == "old"
        folder_with(partial / "more", "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_never_makes_way_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cat").write_text("mine")
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "cat"):
        pass
    assert (tmp_path / "cat").read_text() == "mine"


def test_a_removed_folder_leaves_nothing(tmp_path: Path) -> None:
    remove_folder(folder_with(tmp_path / "cat", "old"))
    assert list(tmp_path.iterdir()) == []
