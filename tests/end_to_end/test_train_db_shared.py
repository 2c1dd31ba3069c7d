"""Full fine-tuning with several processes: as one would with the larger batch, also where weights are shared out."""

import re
from pathlib import Path

import pytest
from end_to_end import test_sharing
from end_to_end.test_several_processes import uneven
from end_to_end.test_sharing import FSDP
from end_to_end.train_db_runs import DB, TEXT, db_arguments, train_db
from end_to_end.training_runs import differing, events_of, launch, tensors_of

STEPS = ("--optimizer_type", "SGD", "--learning_rate", 0.1, "--save_every_n_steps", 1)
STOP = ("--stop_text_encoder_training", 2)
SHIFT = (
    1e-3  # of the distance of one step: sums in another order, of which each further step makes a hundred times more
)

FIRST = "lora-step00000001.safetensors"


config = test_sharing.config  # a fixture: four masked images


def shared(folder: Path, config: Path, *more: object, variables: dict[str, str] = FSDP) -> str:
    """Train with two processes that share out what is trained; return what they said."""
    done = test_sharing.launch(DB, db_arguments(folder, config, *more), folder, variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def files_of(folder: Path) -> dict[str, dict]:
    return {path.name: tensors_of(path) for path in sorted((folder / "out").glob("*.safetensors"))}


def check_alike(one: dict, other: dict, start: dict) -> None:
    """Compare two models trained from one start: equal but for rounding, where the training has moved them."""
    assert one.keys() == other.keys()
    moved, apart = distance(one, start), distance(one, other)
    assert moved > 0
    assert apart < SHIFT * moved, (apart, moved)


def distance(one: dict, other: dict) -> float:
    """Return the root of the summed squares of all differences between two models."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def curve(folder: Path) -> list[float]:
    return [event.value for event in events_of(folder / "logs").Scalars("loss/current")]


@pytest.mark.slow
@pytest.mark.parametrize("more", [STOP, ("--gradient_accumulation_steps", 2, "--clip_skip", 2)])
def test_two_processes_train_as_one_with_twice_the_batch(more, pictures, tmp_path):
    """Text encoders that stop leave fewer weights to exchange gradients of."""
    steps = ("--max_train_epochs", 2, "--prior_loss_weight", 0.5, *STEPS, *more)
    two, one = tmp_path / "two", tmp_path / "one"
    messages = launch(DB, 2, db_arguments(two, uneven(pictures, tmp_path, 2), *steps), two)
    assert "2 process(es)" in messages
    assert messages.count("saved ") == len(files_of(two)), "one of them writes"
    run = train_db(one, uneven(pictures, tmp_path, 4), *steps)
    start = tensors_of(DB.checkpoint())
    check_alike(*(files_of(folder)[FIRST] for folder in (one, two)), start)
    assert curve(two) == pytest.approx(run.losses, rel=1e-3)
    at_stop, at_end = (files_of(two)[name] for name in ("lora-step00000002.safetensors", "lora.safetensors"))
    assert any(name.startswith(TEXT) for name in differing(start, at_stop))
    assert any(name.startswith(TEXT) for name in differing(at_stop, at_end)) == (more != STOP)


@pytest.mark.slow
def test_weights_that_are_shared_out_are_saved_whole_and_as_without_it(config, tmp_path):
    """With validation and pictures between the steps, text encoders that stop, and a copy of the untrained model."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    more = ("--max_train_steps", 4, *STEPS, *STOP, "--sample_prompts", tmp_path / "prompts.txt")
    more += ("--sample_every_n_steps", 2, "--validation_split", 0.3, "--validate_every_n_steps", 2)
    more += ("--mask_prior_weight", 0.5, "--mask_prior_every", 2)
    launch(DB, 2, db_arguments(tmp_path / "plain", config, *more), tmp_path / "plain")
    said = shared(tmp_path / "shared", config, *more)
    plain, other = files_of(tmp_path / "plain"), files_of(tmp_path / "shared")
    assert [tensors.keys() for tensors in plain.values()] == [tensors.keys() for tensors in other.values()]
    check_alike(plain[FIRST], other[FIRST], tensors_of(DB.checkpoint()))
    after_stop = differing(other["lora-step00000002.safetensors"], other["lora.safetensors"])
    assert after_stop
    assert not [name for name in after_stop if name.startswith(TEXT)]
    assert curve(tmp_path / "shared") == pytest.approx(curve(tmp_path / "plain"), rel=1e-2)
    blocks = re.search(r"FSDP gathers (\d+) blocks one at a time", said)
    assert blocks, said[-2000:]
    assert int(blocks.group(1)) > 12, "layers of the text encoder and blocks of the U-Net"
    assert len(list((tmp_path / "shared" / "out" / "sample").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_shares_weights_out_goes_on_from_its_state(config, tmp_path):
    """And the state is that of any run: one process can go on from it."""
    steps = ("--max_train_steps", 3, "--optimizer_type", "AdamW", "--save_every_n_steps", 1)
    shared(tmp_path / "whole", config, *steps, "--save_state")
    state = tmp_path / "whole" / "out" / "lora-step00000002-state"
    shared(tmp_path / "resumed", config, *steps, "--resume", state)
    whole, resumed = files_of(tmp_path / "whole"), files_of(tmp_path / "resumed")
    assert not differing(whole["lora.safetensors"], resumed["lora.safetensors"])
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")[2:]
    launch(DB, 2, db_arguments(tmp_path / "plain", config, *steps, "--resume", state), tmp_path / "plain")
    plain = files_of(tmp_path / "plain")["lora.safetensors"]
    check_alike(plain, whole["lora.safetensors"], whole["lora-step00000002.safetensors"])
