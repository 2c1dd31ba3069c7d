"""A disk that is too small for a run is told when the run starts."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.options.saving import SavingOptions
from library.training import disk_space
from library.training.saving import Saver
from library.training.states import StateSaver

WEIGHTS = {"x": torch.zeros(1000)}  # 4000 bytes; a state has 12000


def needed(folder: Path, monkeypatch, caplog, *, free: int, dtype=None, steps_done=0, **options: Any) -> str:
    """Return what is told of a run of 100 steps, 10 an epoch, with so many bytes free."""
    saving = SavingOptions(output_dir=str(folder), **options)
    saver = Saver(saving, lambda path, metadata: None, lambda step, epoch: {}, 10)
    run = SimpleNamespace(
        trainee=SimpleNamespace(weights=lambda: WEIGHTS),
        saver=saver,
        average=None,
        states=StateSaver(saving, saver, lambda folder, step, epoch: None, True),
        plan=SimpleNamespace(steps_per_epoch=10),
        max_train_steps=100,
        num_epochs=10,
        steps_done=steps_done,
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    caplog.clear()
    disk_space.warn_if_short(run, dtype)  # type: ignore[arg-type]
    return caplog.text


@pytest.mark.parametrize(
    ("options", "num_bytes"),
    [
        ({}, 4000),
        ({"dtype": torch.float16}, 2000),
        ({"save_every_n_steps": 10}, 10 * 4000),  # the last step's is the final one
        ({"save_every_n_steps": 10, "steps_done": 50}, 5 * 4000),
        ({"save_every_n_epochs": 2}, 5 * 4000),
        ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, 4 * 4000),
        ({"save_state_on_train_end": True}, 4000 + 12000),
        ({"save_every_n_epochs": 5, "save_state": True}, 2 * 4000 + 2 * 12000),
    ],
)
def test_all_that_the_run_will_leave_is_counted(options, num_bytes, tmp_path: Path, monkeypatch, caplog) -> None:
    assert needed(tmp_path, monkeypatch, caplog, free=num_bytes, **options) == ""
    assert "Make room" in needed(tmp_path, monkeypatch, caplog, free=num_bytes - 1, **options)


def test_the_warning_says_how_much_there_is_and_is_needed(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(WEIGHTS, "x", torch.zeros(10_000_000))
    told = needed(tmp_path, monkeypatch, caplog, free=33_000_000)
    assert f"--output_dir {tmp_path}: 33 MB are free there, and this run writes about 40 MB (1 file)" in told
