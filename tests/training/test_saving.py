"""Which files a run leaves, and that each of them is whole."""

import sys
from pathlib import Path

import pytest
import torch
from full_disk import largest_file
from safetensors.torch import load_file, save_file

from library.errors import OptionError, UserError
from library.options.saving import SavingOptions
from library.training.saving import (
    Companion,
    Saver,
    Write,
    check_output,
    epoch_interval,
    save_dtype,
    saved_file,
    step_to_remove,
)


def saver_of(folder: Path, num_epochs: int = 10, is_main_process: bool = True, **options: object) -> Saver:
    """Return a saver whose files are one small tensor with the metadata it was given."""

    def write(path: Path, metadata: dict[str, str]) -> None:
        save_file({"x": torch.ones(2)}, path, metadata)

    saving = SavingOptions(output_dir=str(folder), **options)
    return Saver(saving, write, lambda step, epoch: {"at": f"{step} {epoch}"}, num_epochs, is_main_process)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata_of(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_files_have_the_documented_names(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, output_name="cat")
    saver.save_epoch(2, step=20)
    saver.save_step(15, epoch=2)
    saver.save_final(100, 10)
    assert names(tmp_path) == ["cat-000002.safetensors", "cat-step00000015.safetensors", "cat.safetensors"]


def test_files_without_a_name_are_called_epoch_at_and_last(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    saver.save_epoch(2, step=20)
    saver.save_step(15, epoch=2)
    saver.save_final(100, 10)
    assert names(tmp_path) == ["at-step00000015.safetensors", "epoch-000002.safetensors", "last.safetensors"]


def test_an_interrupted_run_is_saved_under_its_step(tmp_path: Path) -> None:
    path = saver_of(tmp_path, output_name="cat").save_interrupted(37, epoch=4)
    assert path == tmp_path / "cat-step00000037.safetensors"
    assert load_file(path)["x"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["ckpt", "pt", "safetensors"])
def test_the_suffix_says_the_format(tmp_path: Path, kind: str) -> None:
    assert saver_of(tmp_path, output_name="cat", save_model_as=kind).final_path().name == f"cat.{kind}"


def test_the_epoch_counts_from_one_at_its_end_and_from_zero_within(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    assert metadata_of(saver.save_epoch(2, step=20)) == {"at": "20 2"}
    assert metadata_of(saver.save_step(15, epoch=2)) == {"at": "15 1"}
    assert metadata_of(saver.save_final(100, 10)) == {"at": "100 10"}


def test_epochs_are_due_at_multiples_but_not_at_the_last(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, num_epochs=6, save_every_n_epochs=2)
    assert [epoch for epoch in range(1, 7) if saver.is_epoch_due(epoch)] == [2, 4]


def test_steps_are_due_at_multiples(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, save_every_n_steps=3)
    assert [step for step in range(1, 10) if saver.is_step_due(step)] == [3, 6, 9]


def test_nothing_is_due_when_nothing_was_asked_for(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    assert not any(saver.is_step_due(number) or saver.is_epoch_due(number) for number in range(1, 20))


def test_companions_are_written_told_of_and_removed_with_their_files(tmp_path: Path) -> None:
    def write(value: float) -> Write:
        return lambda path, metadata: save_file({"x": torch.full((2,), value)}, path, metadata)

    told: list[Path] = []
    saving = SavingOptions(
        output_dir=str(tmp_path), output_name="v1.5", save_every_n_epochs=1, save_last_n_epochs=1,
        save_every_n_steps=5, save_last_n_steps=4,
    )  # fmt: skip
    saver = Saver(
        saving, write(1), lambda step, epoch: {"at": str(step)}, 9, True, told.append, [Companion("_ema", write(2))]
    )
    for number in (1, 2):
        saver.save_step(5 * number, number)
        saver.save_epoch(number, 10 * number)
    saver.save_final(25, 9)
    kept = ["v1.5-000002", "v1.5-000002_ema", "v1.5-step00000010", "v1.5-step00000010_ema", "v1.5", "v1.5_ema"]
    assert names(tmp_path) == sorted(f"{name}.safetensors" for name in kept)
    assert len(told) == 10
    assert sorted(saver.saved) == sorted(tmp_path / f"{name}.safetensors" for name in kept)
    assert load_file(tmp_path / "v1.5_ema.safetensors")["x"].tolist() == [2, 2]
    assert metadata_of(tmp_path / "v1.5-000002_ema.safetensors") == {"at": "20"}


@pytest.mark.parametrize(("ratio", "num_epochs", "every"), [(4, 10, 2), (20, 10, 1), (3, 9, 3)])
def test_the_ratio_says_how_many_files_a_run_has(ratio: int, num_epochs: int, every: int) -> None:
    assert epoch_interval(7, ratio, num_epochs) == every


def test_the_last_epochs_are_kept(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, output_name="cat", save_every_n_epochs=2, save_last_n_epochs=2, num_epochs=9)
    for epoch in (2, 4, 6, 8):
        saver.save_epoch(epoch, step=epoch * 10)
    assert names(tmp_path) == ["cat-000006.safetensors", "cat-000008.safetensors"]
    assert [path.name for path in saver.saved] == names(tmp_path)


def test_the_last_steps_are_kept_counted_in_steps(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, output_name="cat", save_every_n_steps=10, save_last_n_steps=30)
    for step in range(10, 60, 10):
        saver.save_step(step, epoch=1)
    assert [int(name[-20:-12]) for name in names(tmp_path)] == [20, 30, 40, 50]


@pytest.mark.parametrize(("step", "keep", "removed"), [(50, 30, 10), (40, 30, 0), (50, 29, 20), (50, 1, 40)])
def test_the_step_to_remove_is_the_last_multiple_that_is_far_enough_back(step: int, keep: int, removed: int) -> None:
    assert step_to_remove(step, 10, keep) == removed


def test_files_of_another_name_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "dog-000001.safetensors").touch()
    saver = saver_of(tmp_path, output_name="cat", save_every_n_epochs=1, save_last_n_epochs=1)
    saver.save_epoch(1, step=10)
    saver.save_epoch(2, step=20)
    assert names(tmp_path) == ["cat-000002.safetensors", "dog-000001.safetensors"]


def test_an_old_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, output_name="cat", save_every_n_epochs=1, save_last_n_epochs=1)
    saver.save_epoch(1, step=10)
    (tmp_path / "cat-000002.safetensors").mkdir()  # a folder stands where the file should go
    with pytest.raises(UserError, match="cat-000002"):
        saver.save_epoch(2, step=20)
    assert load_file(tmp_path / "cat-000001.safetensors")["x"].tolist() == [1, 1]
    assert names(tmp_path) == ["cat-000001.safetensors", "cat-000002.safetensors"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    saver_of(tmp_path, is_main_process=False).save_final(1, 1)
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "cat.txt"
    path.write_text("before")

    def half_write(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), saved_file(path) as partial:
        half_write(partial)
    assert names(tmp_path) == ["cat.txt"]
    assert path.read_text() == "before"


def test_the_temporary_file_has_the_suffix_that_writers_look_at(tmp_path: Path) -> None:
    with saved_file(tmp_path / "cat.safetensors") as partial:
        assert partial.suffix == ".safetensors"
        assert partial.parent == tmp_path
        partial.write_text("whole")
    assert names(tmp_path) == ["cat.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, kind: str) -> None:
    tensors = {"x": torch.ones(50_000)}

    def write(path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata) if kind == "safetensors" else torch.save(tensors, path)

    saving = SavingOptions(output_dir=str(tmp_path), output_name="cat", save_model_as=kind)
    saver = Saver(saving, write, lambda step, epoch: {}, 1)
    with largest_file(10_000), pytest.raises(UserError) as caught:
        saver.save_final(1, 1)
    assert "cannot be saved" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_fault_of_our_own_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), saved_file(tmp_path / "cat.pt"):
        raise RuntimeError("shapes differ")


def test_the_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = check_output(SavingOptions(output_dir=str(tmp_path / "new" / "folder")))
    assert folder.is_dir()
    assert names(folder) == []


def test_a_missing_output_folder_is_asked_for() -> None:
    with pytest.raises(OptionError, match="--output_dir"):
        check_output(SavingOptions())


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir"):
        check_output(SavingOptions(output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("name", ["a/b", "..", " ", "a\\b"])
def test_a_name_with_folders_in_it_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="--output_name"):
        check_output(SavingOptions(output_dir=str(tmp_path), output_name=name))


def test_precisions_map_to_dtypes() -> None:
    assert [save_dtype(name) for name in (None, "float", "fp16", "bf16")] == [
        None,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ]
