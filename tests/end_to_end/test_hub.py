"""A training whose files go to the hub, and one that goes on from there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from end_to_end.conftest import masks_and_alpha
from end_to_end.training_runs import arguments, differing, tensors_of
from fake_hub import TOKEN, FakeHub, connected

NAME = "jane/my-lora"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub of this test's own."""
    with connected(tmp_path / "hf") as hub:
        yield hub


@pytest.fixture
def config(pictures, tmp_path):
    """The documented mixture of masks."""
    return masks_and_alpha(tmp_path, pictures)


UPLOAD = ("--huggingface_repo_id", NAME, "--huggingface_token", TOKEN)


@pytest.mark.parametrize("more", [(), ("--async_upload",)], ids=["at once", "beside training"])
def test_every_saved_file_and_state_arrives_as_it_was_saved(train, config, hub, more):
    run = train(
        config, *UPLOAD, *more, "--huggingface_path_in_repo", "loras", "--save_every_n_steps", 1, "--save_state",
        "--save_state_to_huggingface", "--save_last_n_steps", 1, "--max_train_steps", 3,
    )  # fmt: skip
    names = [
        f"lora{when}{ending}"
        for when in ("-step00000001", "-step00000002", "")
        for ending in (".safetensors", "-state")
    ]
    sent = [next(iter(commit)).split("/")[1] for commit in hub.repositories[f"models/{NAME}"].commits]
    assert sent == names
    files = hub.files(NAME)
    assert files["loras/lora.safetensors"] == run.file.read_bytes()
    for name in ("train_state.json", "optimizer.pt", "network.safetensors"):
        assert files[f"loras/lora-state/{name}"] == (run.folder / "out" / "lora-state" / name).read_bytes()
    assert not list((run.folder / "out").glob(".*"))


def test_without_save_state_to_huggingface_states_stay_here(train, config, hub):
    train(config, *UPLOAD, "--save_state")
    assert sorted(hub.files(NAME)) == ["lora.safetensors"]


def test_a_run_goes_on_from_a_state_on_the_hub_as_if_it_had_never_stopped(train, config, hub):
    whole = train(
        config, *UPLOAD, "--save_every_n_steps", 1, "--save_state", "--save_state_to_huggingface", name="whole"
    )
    place = f"{NAME}/lora-step00000001-state"
    resumed = train(
        config, "--resume_from_huggingface", "--resume", place, "--huggingface_token", TOKEN, name="resumed"
    )
    assert differing(whole.tensors, resumed.tensors) == []


def test_an_upload_that_fails_costs_the_training_nothing(train, config, hub, plain_run):
    hub.failing_commits = 100
    run = train(config, *UPLOAD, "--async_upload", "--max_train_steps", 4)
    assert differing(tensors_of(run.file), plain_run.tensors) == []
    assert hub.files(NAME) == {}


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (f"{NAME}/none-state", f"{NAME} has no none-state/train_state.json"),
        ("jane/none/x", "404"),
    ],
)
def test_a_state_that_is_not_on_the_hub_is_told_before_a_model_is_loaded(
    family, config, hub, tmp_path, capsys, place, told
):
    hub.add(NAME).files["a-state/train_state.json"] = b"{}"
    argv = arguments(family, tmp_path / "run", config, "--resume", place, "--resume_from_huggingface")
    assert family.run(*argv, "--huggingface_token", TOKEN) == 2
    output = capsys.readouterr().err
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: --resume {place}: ")
    assert told in error
    assert "INFO loaded" not in output


def test_the_token_is_in_nothing_that_a_run_leaves_behind(train, config, hub, tmp_path, capsys):
    log_file = tmp_path / "run.log"
    train(
        config, *UPLOAD, "--save_state", "--save_state_to_huggingface", "--report", "--log_config", "--async_upload",
        "--console_log_file", log_file, "--console_log_level", "DEBUG",
    )  # fmt: skip
    assert TOKEN in hub.tokens  # it was in use
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert log_file in everything
    assert any("tfevents" in path.name for path in everything)
    assert any(path.suffix == ".html" for path in everything)
    assert [path for path in everything if TOKEN.encode() in path.read_bytes()] == []
    assert not [path for path, content in hub.files(NAME).items() if TOKEN.encode() in content]
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
