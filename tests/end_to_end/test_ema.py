"""--ema_decay: the average beside each file, and training that does not notice."""

from pathlib import Path

import pytest
import torch
from end_to_end.training_runs import (
    SD15,
    arguments,
    differing,
    launch,
    subset,
    tensors_of,
    write_toml,
)

EMA = ("--ema_decay", 0.999, "--save_ema")


@pytest.fixture
def config(pictures, tmp_path):
    return write_toml(tmp_path / "dataset.toml", subset(pictures.photos))


def check_average(out: Path) -> None:
    """Compare the average of three steps with the sum written out over the files of each step."""
    files = [tensors_of(out / f"lora{mark}.safetensors") for mark in ("-step00000001", "-step00000002", "")]
    kept = tensors_of(out / "lora_ema.safetensors")
    assert differing(kept, files[-1])
    a, b = 2 / 11, 3 / 12  # 0.1 and these: what each step leaves of the average before it
    shares = [0.1 * a * b, 0.9 * a * b, (1 - a) * b, 1 - b]
    for name, value in kept.items():
        # the weights before the training: none in lora_up; lora_down does not learn in the first step, for that reason
        start = torch.zeros_like(value) if "lora_up" in name else files[0][name]
        terms = [start, *(file[name] for file in files)]
        expected = sum(share * term.double() for share, term in zip(shares, terms, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)


def test_each_saved_file_has_the_average_beside_it(config, train) -> None:
    """The run itself is bit for bit the one without (--ema_decay, --save_ema)."""
    more = ("--max_train_steps", 3, "--save_every_n_steps", 1)
    plain = train(config, *more, name="plain")
    run = train(config, *more, *EMA, name="average")
    marks = ["-step00000001", "-step00000002", ""]
    assert run.names() == sorted(f"lora{mark}{ema}.safetensors" for mark in marks for ema in ("", "_ema"))
    assert all(
        differing(tensors_of(plain.folder / "out" / name), tensors_of(run.folder / "out" / name)) == []
        for name in plain.names()
    )
    check_average(run.folder / "out")


def test_a_resumed_run_has_the_average_of_the_whole_one(config, train) -> None:
    more = ("--max_train_steps", 4, *EMA)
    whole = train(config, *more, "--save_every_n_steps", 2, "--save_state", name="whole")
    again = train(config, *more, "--resume", whole.folder / "out" / "lora-step00000002-state", name="again")
    name = "lora_ema.safetensors"
    assert differing(tensors_of(whole.folder / "out" / name), tensors_of(again.folder / "out" / name)) == []
    assert differing(whole.tensors, again.tensors) == []


def test_a_state_from_before_is_resumed_with_a_word(config, train, caplog) -> None:
    half = train(config, "--save_every_n_steps", 1, "--save_state", name="half")
    state = half.folder / "out" / "lora-step00000001-state"
    again = train(config, *EMA, "--resume", state, name="again")
    assert "was saved without --ema_decay" in caplog.text
    assert differing(half.tensors, again.tensors) == []
    assert "lora_ema.safetensors" in again.names()


def test_a_state_with_an_average_is_resumed_without_it(config, train) -> None:
    half = train(config, *EMA, "--save_every_n_steps", 1, "--save_state", name="half")
    again = train(config, "--resume", half.folder / "out" / "lora-step00000001-state", name="again")
    assert differing(half.tensors, again.tensors) == []
    assert again.names() == ["lora.safetensors"]


def test_older_averages_go_with_their_files(config, train) -> None:
    run = train(config, *EMA, "--max_train_steps", 4, "--save_every_n_steps", 1, "--save_last_n_steps", 1)
    assert run.names("*step*") == sorted(
        f"lora-step0000000{step}{mark}.safetensors" for step in (2, 3) for mark in ("", "_ema")
    )


def test_the_average_is_saved_in_the_format_that_is_asked_for(config, train) -> None:
    """Of weights in bf16 the average is finer than they are."""
    run = train(config, *EMA, "--mixed_precision", "bf16", "--full_bf16", "--save_precision", "float")
    kept = tensors_of(run.folder / "out" / "lora_ema.safetensors")
    learnt = [value for name, value in kept.items() if "lora_up" in name]
    assert all(value.dtype == torch.float32 for value in learnt)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in learnt)


@pytest.mark.slow
def test_of_several_processes_one_keeps_the_average(config, tmp_path: Path) -> None:
    more = ("--max_train_steps", 3, "--save_every_n_steps", 1)
    launch(SD15, 2, arguments(SD15, tmp_path, config, *EMA, *more), tmp_path)
    check_average(tmp_path / "out")
