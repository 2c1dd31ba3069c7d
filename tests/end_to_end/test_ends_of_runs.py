"""How a run ends other than by its last step: a broken loss, Ctrl-C; and runs of several processes."""

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
    events_of,
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
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in plain_run.tensors.items()}
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


# ---- several processes -----------------------------------------------------------------------------------------


def launch(family: Family, num_processes: int, argv: list[str], folder: Path) -> str:
    """Train with several processes on the CPU, which must end well; return their messages."""
    several = ["--standalone", "--nproc_per_node", str(num_processes)]  # accelerate launch starts them on GPUs only
    command = [sys.executable, "-m", "torch.distributed.run", *several, str(ROOT / f"{family.script}.py"), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(folder), timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_two_processes_train_together_and_one_of_them_writes(family: Family, pictures, tmp_path):
    """Three batches of two an epoch: the second process begins again to keep step with the first."""
    for i in range(2):
        save(tmp_path / "images", f"more{i}", torch.full((64, 64, 3), 40 * i, dtype=torch.uint8).numpy(), "more")
    config = write_toml(
        tmp_path / "d.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks),
        subset(pictures.cutouts, alpha_mask=True),
        subset(tmp_path / "images"),
    )
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    cache = ("--cache_latents", "--cache_latents_to_disk", "--cache_dir", tmp_path / "cache")
    previews = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_epochs", 1)
    more = (*cache, *previews, "--max_train_epochs", 2, "--save_every_n_epochs", 1, "--report")
    messages = launch(family, 2, arguments(family, tmp_path, config, *more), tmp_path)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["lora-000001.safetensors", "lora.safetensors"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    assert len(events_of(tmp_path / "logs").Scalars("loss/current")) == 4
    assert messages.count("saved ") == 2
    assert messages.count(" masks: ") == 1
    assert len(list((out / "sample").iterdir())) == 4
    assert metadata_of(out / "lora.safetensors")["ss_num_batches_per_epoch"] == "2"
    assert any(tensor.any() for name, tensor in tensors_of(out / "lora.safetensors").items() if "lora_up" in name)


def test_two_processes_may_leave_weights_out_of_a_step(family: Family, config, tmp_path):
    """--clip_skip leaves out the last layer of the text encoder at every step, module dropout other modules each."""
    more = ("--clip_skip", 2, "--network_args", "module_dropout=0.3", "--max_train_steps", 3)
    launch(family, 2, arguments(family, tmp_path, config, *more), tmp_path)
    trained = tensors_of(tmp_path / "out" / "lora.safetensors")
    assert not trained["lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight"].any()
    assert trained["lora_te_text_model_encoder_layers_10_mlp_fc1.lora_up.weight"].any()
