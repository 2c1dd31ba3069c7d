"""A run that is stopped at any step and resumed is bit for bit the run that was not."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from end_to_end.training_runs import (
    Trained,
    arguments,
    differing,
    environment,
    save,
    subset,
    tensors_of,
    write_toml,
)


@pytest.fixture
def config(pictures, tmp_path):
    """Write a config in which chance has a say, of five draws an epoch: steps end in the middle of epochs."""
    chance = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "flip_aug": True, "token_warmup_step": 5}
    for i in range(3):
        save(tmp_path / "images", f"i{i}", np.random.default_rng(i).integers(0, 256, (64, 64, 4), dtype=np.uint8),
             "a cat, one, two, three")  # fmt: skip
    return write_toml(
        tmp_path / "chance.toml",
        subset(tmp_path / "images", alpha_mask=True, **chance),
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks, random_placement=True, **chance),
        batch_size=1,
    )


def state(run: Trained, step: int) -> Path:
    return run.folder / "out" / f"lora-step{step:08d}-state"


LONG = (
    "--gradient_accumulation_steps",
    2,
    "--network_dropout",
    0.1,
    "--lr_scheduler",
    "cosine",
    "--max_train_steps",
    7,
)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(train, config):
    whole = train(config, *LONG, "--save_every_n_steps", 1, "--save_state", name="whole")
    for step, workers in ((1, 0), (4, 2)):  # within an epoch of three steps, and within the next
        resumed = train(
            config, *LONG, "--resume", state(whole, step), "--max_data_loader_n_workers", workers, name=f"from {step}"
        )
        assert not differing(whole.tensors, resumed.tensors)
        assert resumed.losses == whole.losses[step:]
        assert resumed.metadata["ss_steps"] == "7"
        assert resumed.metadata["ss_epoch"] == whole.metadata["ss_epoch"]


@pytest.mark.parametrize(
    "optimizer", [("AdamW8bit",), ("Prodigy", "--learning_rate", 1), ("AdamWScheduleFree",), ("Adafactor",)],
    ids=lambda each: each[0],
)  # fmt: skip
def test_every_kind_of_optimizer_goes_on_from_its_own_state(train, config, optimizer):
    kind = ("--optimizer_type", *optimizer, "--max_train_steps", 4)
    whole = train(config, *kind, "--save_every_n_steps", 2, "--save_state", name="whole")
    resumed = train(config, *kind, "--resume", state(whole, 2), name="resumed")
    assert not differing(whole.tensors, resumed.tensors)
    assert resumed.losses == whole.losses[2:]


def test_the_seed_of_the_state_counts_where_none_is_given(train, config):
    whole = train(config, "--max_train_steps", 3, "--save_every_n_steps", 1, "--save_state", name="whole", seed=5)
    resumed = train(config, "--max_train_steps", 3, "--resume", state(whole, 1), name="resumed", seed=None)
    assert not differing(whole.tensors, resumed.tensors)


def test_states_are_rotated_like_files_and_the_last_one_is_of_the_end(train, config):
    keep = ("--save_every_n_steps", 1, "--save_last_n_steps", 3, "--save_last_n_steps_state", 1)
    run = train(config, "--max_train_steps", 5, "--save_state", *keep)
    made = sorted(path.name for path in (run.folder / "out").iterdir() if path.name.startswith("lora"))
    files = [f"lora-step0000000{step}.safetensors" for step in (1, 2, 3, 4)]
    assert made == sorted(
        [*files, "lora-step00000003-state", "lora-step00000004-state", "lora-state", "lora.safetensors"]
    )
    manifest = json.loads((run.folder / "out" / "lora-state" / "train_state.json").read_text())
    assert (manifest["current_step"], manifest["current_epoch"]) == (5, 1)


def test_a_state_at_the_end_alone_prolongs_a_run(train, config):
    short = train(config, "--max_train_steps", 2, "--save_state_on_train_end", name="short")
    longer = train(config, "--max_train_steps", 4, "--resume", short.folder / "out" / "lora-state", name="longer")
    at_once = train(config, "--max_train_steps", 4, name="at once")
    assert not differing(longer.tensors, at_once.tensors)


def test_what_a_kill_between_two_renames_leaves_can_be_resumed(train, config):
    whole = train(config, "--max_train_steps", 3, "--save_every_n_steps", 1, "--save_state", name="whole")
    folder = state(whole, 1)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    resumed = train(config, "--max_train_steps", 3, "--resume", folder, name="resumed")
    assert not differing(whole.tensors, resumed.tensors)


def test_what_has_changed_since_the_state_is_said(train, config, pictures, caplog):
    whole = train(config, "--max_train_steps", 2, "--save_state", name="whole")
    folder = whole.folder / "out" / "lora-state"
    other = write_toml(whole.folder / "other.toml", subset(pictures.cutouts, alpha_mask=True))
    with caplog.at_level(logging.WARNING):
        train(other, "--max_train_steps", 3, "--resume", folder, "--min_timestep", 5, "--learning_rate", 0.5, name="b")
    said = caplog.text
    assert "the dataset has changed (5 images then, 2 now)" in said
    assert "--min_timestep was not given, is 5" in said
    assert "--learning_rate was" in said
    assert "is 0.5 (the state's counts)" in said


def test_a_first_step_moves_the_place_in_the_data_but_not_the_weights(train, config):
    late = train(config, "--max_train_steps", 4, "--initial_step", 2, name="late")
    assert len(late.losses) == 2
    epoch = train(config, "--max_train_steps", 7, "--initial_epoch", 2, name="epoch")
    assert len(epoch.losses) == 2, "an epoch has five steps"
    assert differing(late.tensors, epoch.tensors)


def refusal(family, capsys, *argv: object) -> str:
    assert family.run(*argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_state_that_cannot_be_continued_is_refused_in_one_line(train, config, family, tmp_path, capsys):
    whole = train(config, "--max_train_steps", 2, "--save_state", name="whole")
    folder = whole.folder / "out" / "lora-state"
    again = [*whole.argv, "--resume"]
    assert "there is no such folder" in refusal(family, capsys, *again, tmp_path / "nowhere")
    assert "Raise --max_train_steps" in refusal(family, capsys, *again, folder)
    wider = ("--max_train_steps", 3, "--network_dim", 16)
    other = ("--max_train_steps", 3, "--optimizer_type", "Lion")
    assert "the optimizer AdamW, and this run has Lion" in refusal(family, capsys, *again, folder, *other)
    assert "Resume with the same network options" in refusal(family, capsys, *again, folder, *wider)
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    (foreign / "train_state.json").write_text('{"current_epoch": 1, "current_step": 2}')
    assert "state of another program" in refusal(family, capsys, *again, foreign)
    (foreign / "train_state.json").unlink()
    assert "no whole state" in refusal(family, capsys, *again, foreign)


def test_a_damaged_state_is_refused_in_one_line(train, config, family, tmp_path, capsys):
    whole = train(config, "--max_train_steps", 2, "--save_state", name="whole")
    for name in ("network.safetensors", "optimizer.pt", "train_state.json"):
        damaged = tmp_path / f"damaged {name}"
        shutil.copytree(whole.folder / "out" / "lora-state", damaged)
        content = (damaged / name).read_bytes()
        for rest in (b"", content[: len(content) // 2], b"no state at all"):
            (damaged / name).write_bytes(rest)
            line = refusal(family, capsys, *whole.argv, "--resume", damaged, "--max_train_steps", 3)
            assert line.startswith(f"error: --resume {damaged}: ")


def test_a_new_schedule_counts_after_a_resume_and_a_new_rate_does_not(train, config):
    short = train(config, "--max_train_steps", 2, "--save_state", name="short")
    resume = ("--resume", short.folder / "out" / "lora-state", "--max_train_steps", 4)
    rates = train(config, *resume, "--lr_scheduler", "linear", "--learning_rate", 0.5, name="b").curve("lr/unet")
    assert rates == pytest.approx([0.25e-3, 0])  # as they are after steps 3 and 4


def test_a_state_holds_the_weights_as_trained_not_as_saved(train, config):
    run = train(config, "--max_train_steps", 2, "--save_state", "--save_precision", "fp16")
    stored = tensors_of(run.folder / "out" / "lora-state" / "network.safetensors")
    assert {str(tensor.dtype) for name, tensor in stored.items() if "lora_up" in name} == {"torch.float32"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(train, family, config, tmp_path, kills):
    steps = ("--max_train_steps", 10 * kills, "--save_every_n_steps", 1, "--save_last_n_steps", 2, "--save_state")
    whole = train(config, "--max_train_steps", 10 * kills, name="whole")
    argv = arguments(family, tmp_path / "killed", config, *steps)
    script = Path(__file__).with_name("killed_runs.py")
    command = [
        sys.executable,
        script,
        kills,
        1,
        family.script,
        family.place,
        tmp_path / "killed" / "out",
        "--",
        *argv,
    ]
    done = subprocess.run(
        [str(word) for word in command], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["ended 0"], done.stdout + done.stderr[-3000:]
    begun = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("killed")]
    assert begun == sorted(begun), "a kill loses no state"
    assert begun[-1] > 0, "some kills came after a state was saved"
    assert not differing(whole.tensors, Trained(tmp_path / "killed", tuple(argv)).tensors)


def test_what_a_killed_run_left_half_is_removed_by_the_next(train, config):
    run = train(config, "--max_train_steps", 1, name="run")
    left = [run.folder / "out" / name for name in (".lora-step00000003-state.4711.part", ".lora-000002-state.gone")]
    for folder in left:
        (folder / "some").mkdir(parents=True)
    others = [
        run.folder / "out" / name
        for name in (
            ".dog-step00000003-state.4711.part",
            ".lora-dog-step00000003-state.4711.part",
            ".lora2-state.7.part",
        )
    ]
    for other in others:
        other.mkdir()
    train(config, "--max_train_steps", 1, "--save_state", name="run")
    assert not any(folder.exists() for folder in left)
    assert all(other.exists() for other in others), "of other runs, which may be writing them"
