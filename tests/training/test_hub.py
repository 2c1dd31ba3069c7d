"""Uploads reach the hub as they were asked for, and one that fails costs nothing but a line."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import SHA, TOKEN, FakeHub, connected
from huggingface_hub import constants

from library.errors import CheckpointError
from library.options.hub import HubOptions
from library.options.saving import SavingOptions
from library.training.hub import Uploads, download_state, remove_abandoned, start

NAME = "jane/my-lora"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub of this test's own."""
    with connected(tmp_path / "hf") as hub:
        yield hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with a saved file and a saved state."""
    folder = tmp_path / "out"
    (folder / "lora-state").mkdir(parents=True)
    (folder / "lora.safetensors").write_bytes(b"weights")
    (folder / "lora-state" / "train_state.json").write_bytes(b"{}")
    (folder / "lora-state" / "optimizer.pt").write_bytes(b"moments")
    return folder


def begin(out: Path, token: str | None = TOKEN, **more: object) -> Uploads:
    """Begin to upload what is saved in out."""
    options = HubOptions(huggingface_repo_id=NAME, huggingface_token=token, **more)
    uploads = start(options, SavingOptions(output_dir=str(out), output_name="lora"))
    assert uploads is not None
    return uploads


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    """Return this project's warnings."""
    return [
        each.getMessage()
        for each in log.records
        if each.levelno >= logging.WARNING and each.name == "library.training.hub"
    ]


def test_without_a_repository_nothing_is_uploaded():
    assert start(HubOptions(), SavingOptions()) is None


# the repository


@pytest.mark.parametrize(("visibility", "is_private"), [(None, True), ("private", True), ("public", False)])
def test_a_repository_that_is_not_there_is_made_and_is_private_unless_public_is_wanted(
    hub, out, visibility, is_private
):
    begin(out, huggingface_repo_visibility=visibility)
    assert hub.repositories[f"models/{NAME}"].is_private == is_private


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_a_repository_of_each_type_is_made_and_filled(hub, out, repo_type):
    begin(out, huggingface_repo_type=repo_type).add(out / "lora.safetensors")
    assert hub.files(NAME, repo_type) == {"lora.safetensors": b"weights"}


def test_a_repository_that_is_there_is_taken_and_named_with_what_is_in_the_folder(hub, out, caplog):
    caplog.set_level(logging.INFO)
    hub.add(NAME, is_private=False).files["loras/old.safetensors"] = b"old"
    begin(out, huggingface_path_in_repo="/loras/")
    assert f"go to {hub.url}/{NAME}, which is there (public), into loras, which has 1 entries" in caplog.text
    assert "POST /api/repos/create" not in hub.requests
    caplog.clear()
    begin(out, huggingface_path_in_repo="elsewhere")
    assert "into the new folder elsewhere" in caplog.text


def test_the_visibility_of_a_repository_that_is_there_stays_with_a_warning(hub, out, caplog):
    hub.add(NAME, is_private=True)
    begin(out, huggingface_repo_visibility="public")
    assert warnings_of(caplog) == [f"--huggingface_repo_visibility public has no effect: {NAME} is there, and private"]
    assert hub.repositories[f"models/{NAME}"].is_private


# uploads


@pytest.mark.parametrize(("folder", "prefix"), [(None, ""), ("loras/new", "loras/new/")])
def test_a_file_goes_into_the_folder_under_its_own_name(hub, out, folder, prefix):
    begin(out, huggingface_path_in_repo=folder).add(out / "lora.safetensors")
    assert hub.files(NAME) == {f"{prefix}lora.safetensors": b"weights"}


def test_a_state_arrives_whole_in_one_commit(hub, out):
    begin(out).add(out / "lora-state")
    (commit,) = hub.repositories[f"models/{NAME}"].commits
    assert commit == {"lora-state/optimizer.pt": b"moments", "lora-state/train_state.json": b"{}"}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_models_folder_arrives_with_its_folders(hub, out, is_async):
    (out / "lora" / "unet").mkdir(parents=True)
    (out / "lora" / "model_index.json").write_bytes(b"{}")
    (out / "lora" / "unet" / "config.json").write_bytes(b"{ }")
    uploads = begin(out, async_upload=is_async)
    uploads.add(out / "lora")
    uploads.finish()
    assert hub.files(NAME) == {"lora/model_index.json": b"{}", "lora/unet/config.json": b"{ }"}


def test_uploads_beside_training_keep_their_order_and_are_waited_for(hub, out, caplog):
    caplog.set_level(logging.INFO)
    hub.delay_s = 0.2
    uploads = begin(out, async_upload=True)
    for number in range(3):
        (out / f"lora-step{number:08d}.safetensors").write_bytes(b"%d" % number)
        uploads.add(out / f"lora-step{number:08d}.safetensors")
    assert len(hub.files(NAME)) < 3  # add does not wait
    uploads.finish()
    assert hub.repositories[f"models/{NAME}"].commits == [
        {f"lora-step{number:08d}.safetensors": b"%d" % number} for number in range(3)
    ]
    assert "waiting for" in caplog.text
    assert f"uploads: 3 of 3 arrived at {hub.url}/{NAME}" in caplog.text


def test_a_file_that_is_replaced_and_rotated_away_before_its_upload_arrives_as_it_was_saved(hub, out):
    hub.delay_s = 0.2
    uploads = begin(out, async_upload=True)
    uploads.add(out / "lora-state")  # keeps the worker busy
    uploads.add(out / "lora.safetensors")
    (out / "new").write_bytes(b"later weights")
    (out / "new").replace(out / "lora.safetensors")
    uploads.add(out / "lora.safetensors")
    (out / "lora.safetensors").unlink()
    uploads.finish()
    sent = [list(commit.values()) for commit in hub.repositories[f"models/{NAME}"].commits]
    assert sent == [[b"moments", b"{}"], [b"weights"], [b"later weights"]]
    assert sorted(path.name for path in out.iterdir()) == ["lora-state"]  # nothing is left waiting


def test_where_the_disk_has_no_links_a_copy_waits(hub, out, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    hub.delay_s = 0.1
    uploads = begin(out, async_upload=True)
    uploads.add(out / "lora-state")
    uploads.finish()
    assert hub.files(NAME)["lora-state/optimizer.pt"] == b"moments"


def test_what_a_killed_run_left_waiting_is_removed_and_that_of_other_names_stays(out):
    own = [
        ".lora.safetensors.a1b2.upload",
        ".lora-000002.safetensors.a1b2.upload",
        ".lora-step00000001-state.x_y.upload",
        ".lora-step00000001.a1b2.upload",
    ]
    others = [".lora2.safetensors.a1b2.upload", ".lora-more-state.a1b2.upload"]
    for name in (*own, *others):
        (out / name).mkdir()
    remove_abandoned(out, "lora")
    assert sorted(path.name for path in out.glob(".*")) == sorted(others)


# failures


def test_a_wrong_token_is_one_line_for_each_upload_and_never_an_error(hub, out, caplog):
    uploads = begin(out, token="hf_WrongAndStillSecret")
    uploads.add(out / "lora.safetensors")
    uploads.finish()
    at_start, at_upload = warnings_of(caplog)
    assert at_start.startswith(f"--huggingface_repo_id {NAME}: ")
    assert "401" in at_start
    assert "Training goes on" in at_start
    assert at_upload.startswith(f"lora.safetensors was not uploaded to {NAME}: ")
    assert "\n" not in at_start + at_upload
    assert "StillSecret" not in caplog.text


def test_after_an_upload_that_the_hub_fails_the_next_one_arrives(hub, out, caplog):
    caplog.set_level(logging.INFO)
    uploads = begin(out)
    hub.failing_commits = 1
    uploads.add(out / "lora.safetensors")
    assert "500" in warnings_of(caplog)[0]
    uploads.add(out / "lora-state")
    uploads.finish()
    assert sorted(hub.files(NAME)) == ["lora-state/optimizer.pt", "lora-state/train_state.json"]
    assert "uploads: 1 of 2 arrived" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_hub_that_cannot_be_reached_is_a_warning(hub, out, caplog, monkeypatch, is_async):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    uploads = begin(out, async_upload=is_async)
    uploads.add(out / "lora.safetensors")
    uploads.finish()
    assert [line.partition(":")[0] for line in warnings_of(caplog)] == [
        f"--huggingface_repo_id {NAME}",
        f"lora.safetensors was not uploaded to {NAME}",
    ]


def test_a_repository_is_made_as_soon_as_the_hub_can_be_reached(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    uploads = begin(out)
    uploads._api.endpoint = hub.url
    uploads.add(out / "lora.safetensors")
    assert hub.files(NAME) == {"lora.safetensors": b"weights"}


def test_offline_is_one_warning_at_the_start_and_nothing_afterwards(hub, out, caplog, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    uploads = begin(out)
    uploads.add(out / "lora.safetensors")
    uploads.finish()
    assert warnings_of(caplog) == [
        "--huggingface_repo_id: nothing is uploaded, because HF_HUB_OFFLINE is set; files are saved here"
    ]
    assert hub.requests == []


def test_a_file_that_is_gone_before_it_can_be_uploaded_is_one_line(hub, out, caplog):
    for is_async in (False, True):
        caplog.clear()
        uploads = begin(out, async_upload=is_async)
        uploads.add(out / "never-saved.safetensors")
        uploads.finish()
        assert len(warnings_of(caplog)) == 1
    assert not list(out.glob(".*"))


def test_ctrl_c_while_waiting_leaves_the_rest_out(hub, out, caplog, monkeypatch):
    uploads = begin(out, async_upload=True)
    hub.delay_s = 1.0
    uploads.add(out / "lora.safetensors")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert uploads._worker is not None
    monkeypatch.setattr(uploads._worker, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uploads.finish()
    assert warnings_of(caplog) == ["uploads: left out 1"]


def test_without_a_token_the_login_of_huggingface_hub_is_used(hub, out):
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN, encoding="utf-8")
    begin(out, token=None).add(out / "lora.safetensors")
    assert hub.files(NAME) == {"lora.safetensors": b"weights"}


# downloads


def test_a_state_is_downloaded_with_its_files_and_no_others(hub):
    hub.add(NAME).files.update(
        {"runs/a-state/train_state.json": b"{}", "runs/a-state/optimizer.pt": b"m", "runs/b-state/optimizer.pt": b"n"}
    )
    folder = download_state(f"{NAME}/runs/a-state", TOKEN)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "train_state.json": b"{}",
        "optimizer.pt": b"m",
    }
    assert not any("b-state" in request for request in hub.requests)


def test_revision_and_repository_type_are_asked_for(hub):
    hub.add(NAME, repo_type="dataset").files["s/train_state.json"] = b"{}"
    assert download_state(f"{NAME}/s:better:dataset", TOKEN).name == "s"
    assert f"GET /api/datasets/{NAME}/revision/better" in hub.requests
    assert f"GET /datasets/{NAME}/resolve/{SHA}/s/train_state.json" in hub.requests


@pytest.mark.parametrize(
    ("place", "token", "told"),
    [
        (f"{NAME}/none-state", TOKEN, f"{NAME} has no none-state/train_state.json"),
        ("jane/none/x", TOKEN, "404"),
        (f"{NAME}/a-state", "hf_WrongAndStillSecret", "401"),
    ],
)
def test_a_state_that_cannot_be_downloaded_is_one_line(hub, place, token, told):
    hub.add(NAME).files["a-state/train_state.json"] = b"{}"
    with pytest.raises(CheckpointError) as caught:
        download_state(place, token)
    assert str(caught.value).startswith(f"--resume {place}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "StillSecret" not in str(caught.value)


def test_a_state_cannot_be_downloaded_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        download_state(f"{NAME}/a-state", TOKEN)
