"""How a run ends other than by its last step: a broken loss, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from end_to_end.training_runs import (
    ROOT,
    Family,
    arguments,
    environment,
    metadata_of,
    save,
    subset,
    tensors_of,
    write_toml,
)
from safetensors.torch import save_file

from networks.network import LoraNetwork

TIMEOUT_S = 240  # for a process of its own on a busy machine; a free one takes about 10 s


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Write a config of two masked images: one batch of two an epoch."""
    return write_toml(tmp_path / "d.toml", subset(pictures.cutouts, alpha_mask=True))


# ---- a broken loss ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_images(
    family: Family, plain_run, config, tmp_path, capsys
):
    broken = {name: torch.full_like(tensor, 1e30) for name, tensor in plain_run.tensors.items()}
    save_file(broken, tmp_path / "broken.safetensors")
    more = ("--network_weights", tmp_path / "broken.safetensors", "--save_every_n_steps", 1)
    assert family.run(*arguments(family, tmp_path, config, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 1: the loss is not a finite number for ")
    assert "cutout0.png" in error
    assert "cutout1.png" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_saved_after_a_loss_that_is_no_number(family: Family, config, tmp_path, capsys):
    """The rate is absurd: step 1 is fine, its update ruins the weights, step 2 shows it."""
    more = ("--learning_rate", "1e30", "--max_train_steps", 5, "--save_every_n_steps", 1)
    assert family.run(*arguments(family, tmp_path, config, *more)) == 2
    assert "error: step 2: the loss is not a finite number" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora-step00000001.safetensors"]


# ---- a picture that fails on the way -------------------------------------------------------------------------------


def test_what_was_learnt_before_a_picture_failed_is_saved(family: Family, tmp_path, capsys):
    """Damage in the middle of a file shows when it is decoded, here at its first draw of an epoch."""
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = save(tmp_path / "images", f"i{number}", pixels, "a cat")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    config = write_toml(tmp_path / "d.toml", subset(tmp_path / "images"), batch_size=1)
    argv = arguments(family, tmp_path, config, "--max_train_steps", 4, "--save_state", seed=3)
    assert family.run(*argv) == 2
    assert "i3.png" in capsys.readouterr().err.splitlines()[-1]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert file.name.startswith("lora-step0000000")
    assert int(metadata_of(file)["ss_steps"]) in {1, 2, 3}
    assert (tmp_path / "out" / f"{file.stem}-state").is_dir()


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="process groups and SIGINT are POSIX")
def test_ctrl_c_saves_whole_files_and_leaves_no_other(family: Family, config, tmp_path):
    """As in a terminal: the whole process group gets the signal, loader processes included."""
    more = ("--max_train_steps", 100_000, "--save_every_n_steps", 2, "--max_data_loader_n_workers", 2)
    argv = arguments(family, tmp_path, config, *more)
    command = [sys.executable, str(ROOT / f"{family.script}.py"), *argv]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path), start_new_session=True
    ) as process:
        try:
            wait_for(tmp_path / "out" / "lora-step00000002.safetensors", process)
            os.killpg(process.pid, signal.SIGINT)
            _, messages = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 130, messages
    assert messages.splitlines()[-1] == "interrupted"
    assert "Traceback" not in messages
    assert messages.count("stopping after this step") == 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())  # a temporary file would be among them
    assert [name for name in names if not name.startswith("lora-step")] == []
    last = tmp_path / "out" / names[-1]
    assert metadata_of(last)["ss_steps"] == str(int(last.stem.removeprefix("lora-step")))
    for name in names:
        assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "out" / name).values())


def test_ctrl_c_while_the_result_is_written_loses_nothing(family: Family, config, tmp_path, monkeypatch):
    save_weights = LoraNetwork.save_weights

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        save_weights(*arguments)

    monkeypatch.setattr(LoraNetwork, "save_weights", interrupted)
    assert family.run(*arguments(family, tmp_path, config)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.safetensors"]


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Wait until a file appears or the process ends."""
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"{file.name} was not saved within {TIMEOUT_S} s"
        time.sleep(0.05)
