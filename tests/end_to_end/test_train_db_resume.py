"""Full fine-tuning that is stopped and resumed, or killed, is bit for bit the run that was not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.train_db_runs import DB, METHOD, TEXT, UNET, db_arguments, train_db
from end_to_end.training_runs import Trained, differing, environment, subset, tensors_of, write_toml

STEPS = 4
STATES = ("--max_train_steps", STEPS, "--save_every_n_steps", 1, "--save_state")

BF16 = ("--mixed_precision", "bf16", "--full_bf16")
EMA = ("--ema_decay", 0.999, "--save_ema")
FUSED = ("--optimizer_type", "Adafactor", "--fused_backward_pass", "--max_grad_norm", 0)
EVERYTHING = (*BF16, *EMA, *FUSED, "--stop_text_encoder_training", 2)


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Write a config of four masked images in which chance has a say."""
    chance = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "flip_aug": True}
    return write_toml(
        tmp_path / "d.toml",
        subset(pictures.photos, conditioning_data_dir=pictures.photo_masks, **chance),
        subset(pictures.cutouts, alpha_mask=True, **chance),
    )


def state(run: Trained, step: int) -> Path:
    return run.folder / "out" / f"lora-step{step:08d}-state"


def model_of(run: Trained, step: int, mark: str = "") -> dict:
    return tensors_of(run.folder / "out" / f"lora-step{step:08d}{mark}.safetensors")


def moved(one: dict, other: dict, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in differing(one, other))


@pytest.mark.parametrize(
    "more",
    [
        EMA,
        BF16,
        pytest.param(
            EVERYTHING,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["average", "rounded by chance", "all at once"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(more, config, tmp_path):
    whole = train_db(tmp_path / "whole", config, *STATES, *more)
    resumed = train_db(tmp_path / "resumed", config, *STATES, *more, "--resume", state(whole, 2))
    assert resumed.names() == [
        name for name in whole.names() if "step00000001" not in name and "step00000002" not in name
    ]
    assert [
        name
        for name in resumed.names()
        if differing(tensors_of(whole.folder / "out" / name), tensors_of(resumed.folder / "out" / name))
    ] == []
    assert resumed.losses == whole.losses[2:]
    assert moved(model_of(whole, 2), whole.tensors, UNET)


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["before the state", "with the state", "after the state"])
def test_a_text_encoder_stops_where_it_would_have_without_the_interruption(stop, config, tmp_path):
    more = (*STATES, "--stop_text_encoder_training", stop)
    whole = train_db(tmp_path / "whole", config, *more)
    resumed = train_db(tmp_path / "resumed", config, *more, "--resume", state(whole, 2))
    assert not differing(whole.tensors, resumed.tensors)
    assert resumed.losses == whole.losses[2:]
    assert moved(model_of(whole, 2), resumed.tensors, TEXT) == (stop > 2)
    assert not moved(model_of(whole, stop), resumed.tensors, TEXT)
    assert moved(model_of(whole, 3), resumed.tensors, UNET)


@pytest.mark.parametrize("optimizer", ["Adafactor", "AdamW8bit"])
def test_a_fused_backward_pass_gives_the_losses_of_the_plain_one(optimizer, config, tmp_path):
    more = ("--optimizer_type", optimizer, "--max_grad_norm", 0, "--max_train_steps", STEPS)
    plain = train_db(tmp_path / "plain", config, *more)
    fused = train_db(tmp_path / "fused", config, *more, "--fused_backward_pass")
    assert fused.losses == plain.losses
    assert not differing(plain.tensors, fused.tensors)
    assert len(set(plain.losses)) == STEPS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
@pytest.mark.parametrize("kind", [(), pytest.param(("--save_model_as", "diffusers"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_saves_leaves_whole_models_and_ends_as_if_it_had_not_been(kind, kills, config, tmp_path):
    steps = ("--max_train_steps", 3 * kills, *kind)
    whole = train_db(tmp_path / "whole", config, *steps)
    more = ("--save_every_n_steps", 1, "--save_last_n_steps", 2, "--save_state")
    argv = db_arguments(tmp_path / "killed", config, *steps, *more)
    out = tmp_path / "killed" / "out"
    script = Path(__file__).with_name("killed_while_saving.py")
    command = [sys.executable, script, kills, 1, DB.script, DB.place, METHOD, out, "--", *argv]
    done = subprocess.run(
        [str(word) for word in command], env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["ended 0"], done.stdout + done.stderr[-3000:]
    assert done.stdout.count("half written") >= kills // 2, done.stdout
    for name in [path.relative_to(whole.folder / "out") for path in (whole.folder / "out").rglob("*.safetensors")]:
        assert not differing(tensors_of(whole.folder / "out" / name), tensors_of(out / name))
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "what was left half is removed"
