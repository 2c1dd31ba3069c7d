"""Curves and pictures reach TensorBoard and wandb; keys and the command line do not."""

import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from end_to_end.training_runs import events_of
from PIL import Image

from library.errors import OptionError
from library.options.logging import LoggingOptions
from library.training.metrics import LossRecord, MaskFigures, ValidationRecord
from library.training.trackers import Trackers, log_dir, plain, settings, wanted

KEY = "wandb" + "S3cr3t" * 7  # 40 characters and more, as wandb wants them
CONFIG = {"learning_rate": 1e-4, "network_args": ("conv_dim=4", "conv_alpha=1"), "seed": None, "masked_loss": True}


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep wandb off the network and out of the user's folders."""
    for name in ("WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-own"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def opened(tmp_path: Path, *, config: dict[str, Any] | None = None, **options: Any) -> Trackers:
    """Start the trackers that the options ask for, with logs below tmp_path/logs."""
    given = LoggingOptions(logging_dir=str(tmp_path / "logs"), **options)
    names = wanted(given)
    AcceleratorState._reset_state()
    accelerator = Accelerator(log_with=list(names), project_dir=log_dir(given))
    trackers = Trackers(accelerator, names)
    trackers.open(given, CONFIG if config is None else config, accelerator.project_dir)
    return trackers


def step(number: int) -> LossRecord:
    """Return what is measured in a step: a loss of a tenth of its number."""
    return LossRecord(number, 1, number / 10, {"unet": 1e-4}, {}, False)


def tell(trackers: Trackers, tmp_path: Path) -> None:
    """Tell of two steps, a validation, an epoch's end and a picture."""
    for number in (1, 2):
        trackers.log_step(step(number), average=0.15)
    trackers.log_validation(ValidationRecord(2, 1, 0.5, 0.4), is_step_due=True, is_epoch_due=True)
    picture = tmp_path / "lora_e000001_00_x.png"
    Image.fromarray(np.full((16, 24, 3), (255, 0, 0), np.uint8)).save(picture)
    trackers.log_images([picture], step=2)
    trackers.log_epoch(1, 2, average=0.15)
    trackers.accelerator.end_training()


def wandb_records(folder: Path) -> list[Any]:
    """Return what stands in the file of the one wandb run below folder: blocks of 32 KiB as LevelDB logs have them."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes on after the run's end
    (file,) = folder.rglob("run-*.wandb")
    data, records, whole = file.read_bytes(), [], b""
    place = 7  # behind the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of the block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """Return what wandb was told, by step."""
    history: dict[int, dict[str, Any]] = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            told = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.setdefault(told["_step"], {}).update(told)
    return history


# TensorBoard


def test_tensorboard_gets_curves_over_steps_and_epochs_and_pictures(tmp_path):
    tell(opened(tmp_path), tmp_path)
    events = events_of(tmp_path / "logs")
    assert [(each.step, round(each.value, 6)) for each in events.Scalars("loss/current")] == [(1, 0.1), (2, 0.2)]
    assert {tag: events.Scalars(tag)[-1].step for tag in ("loss/epoch_average", "loss/validation/epoch_average")} == {
        "loss/epoch_average": 1,
        "loss/validation/epoch_average": 1,
    }
    assert events.Scalars("loss/validation/step_average")[0].step == 2
    assert events.Images("sample_0")[0].width == 24


def test_losses_inside_and_outside_of_masks_are_curves_beside_the_loss(tmp_path):
    trackers = opened(tmp_path)
    figures = MaskFigures(inside=0.25, outside=0.5, share=0.125, drift=None)
    trackers.log_step(replace(step(1), figures=figures), average=0.1, masked={"inside": 0.25, "outside": 0.5})
    trackers.log_step(replace(step(2), figures=MaskFigures(None, 0.75, 0.5, drift=2.0)), average=0.1)
    record = ValidationRecord(2, 1, 0.5, 0.4, figures)
    trackers.log_validation(record, is_step_due=True, is_epoch_due=False)
    trackers.accelerator.end_training()
    events = events_of(tmp_path / "logs")
    found = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["loss/inside"] == [(1, 0.25)]
    assert found["loss/outside"] == [(1, 0.5), (2, 0.75)]
    assert found["mask/share"] == [(1, 0.125), (2, 0.5)]
    assert found["loss/drift_outside"] == [(2, 2.0)]
    assert (found["loss/inside_average"], found["loss/outside_average"]) == ([(1, 0.25)], [(1, 0.5)])
    names = ("loss/validation/step_inside", "loss/validation/step_outside")
    assert [found[name] for name in names] == [[(2, 0.25)], [(2, 0.5)]]


def test_the_folder_of_the_logs_has_prefix_and_date_and_then_the_projects_name(tmp_path):
    tell(opened(tmp_path, log_prefix="zunda-", log_tracker_name="loras"), tmp_path)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("zunda-20")
    assert [path.name for path in folder.iterdir()] == ["loras"]


def test_log_config_sends_options_of_every_kind(tmp_path):
    trackers = opened(tmp_path, log_config=True)
    trackers.accelerator.end_training()
    (told,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "network_args: conv_dim=4 conv_alpha=1" in told.read_text(encoding="utf-8")


def test_a_configuration_is_told_in_plain_values():
    assert plain(CONFIG) == {"learning_rate": 1e-4, "network_args": "conv_dim=4 conv_alpha=1", "masked_loss": True}


# wandb

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@needs_wandb
def test_wandb_gets_curves_pictures_and_validation_by_step(tmp_path):
    tell(opened(tmp_path, log_with="wandb"), tmp_path)
    history = wandb_history(tmp_path / "logs")
    assert [history[number]["loss/current"] for number in (1, 2)] == [0.1, 0.2]
    assert history[2]["loss/validation/epoch_divergence"] == pytest.approx(0.1)
    assert history[2]["loss/epoch_average"] == 0.15
    assert (history[2]["global_step"], history[2]["epoch"]) == (2, 1)
    assert history[1]["lr/unet"] == 1e-4
    (picture,) = (tmp_path / "logs").rglob("media/images/*.png")
    with Image.open(picture) as image:
        assert (image.size, image.getpixel((0, 0))) == ((24, 16), (255, 0, 0))


@needs_wandb
def test_all_means_both(tmp_path):
    tell(opened(tmp_path, log_with="all"), tmp_path)
    assert len(events_of(tmp_path / "logs").Scalars("loss/current")) == 2
    assert len(wandb_history(tmp_path / "logs")) == 2


@needs_wandb
def test_project_run_name_and_options_reach_wandb(tmp_path):
    trackers = opened(
        tmp_path,
        log_with="wandb",
        wandb_run_name="red one",
        log_tracker_name="loras",
        log_config=True,
        wandb_api_key=KEY,
    )
    trackers.accelerator.end_training()
    records = wandb_records(tmp_path / "logs")
    (run,) = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("loras", "red one")
    updates = {item.key: item.value_json for each in records for item in each.config.update}
    updates |= {item.key: item.value_json for item in run.config.update}
    assert json.loads(updates["network_args"]) == "conv_dim=4 conv_alpha=1"


@needs_wandb
def test_a_file_of_settings_replaces_the_name_of_the_run(tmp_path):
    file = tmp_path / "tracker.toml"
    file.write_text('[wandb]\nname = "from the file"\ntags = ["masked"]\n', encoding="utf-8")
    trackers = opened(tmp_path, log_with="wandb", wandb_run_name="red one", log_tracker_config=str(file))
    trackers.accelerator.end_training()
    (run,) = [each.run for each in wandb_records(tmp_path / "logs") if each.WhichOneof("record_type") == "run"]
    assert (run.display_name, list(run.tags)) == ("from the file", ["masked"])


@needs_wandb
def test_neither_key_nor_command_line_is_in_any_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--wandb_api_key", KEY, "--train_data_dir", "/secret/place"])
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trackers = opened(tmp_path, log_with="all", wandb_api_key=KEY, log_config=True)
    tell(trackers, tmp_path)
    assert sys.argv[1] == "--wandb_api_key"  # hidden only while wandb looked
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes() or b"/secret/place" in path.read_bytes()] == []
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err


@needs_wandb
def test_a_key_that_cannot_be_one_is_refused_in_one_line_without_being_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(OptionError) as caught:
        opened(tmp_path, log_with="wandb", wandb_api_key="too-short")
    assert str(caught.value).startswith("--log_with: wandb cannot be started: ")
    assert "\n" not in str(caught.value)
    assert "too-short" not in str(caught.value)


# what goes wrong


def test_a_setting_that_a_tracker_does_not_have_is_one_line(tmp_path):
    file = tmp_path / "tracker.toml"
    file.write_text("[tensorboard]\nflush_seconds = 3\n", encoding="utf-8")
    with pytest.raises(OptionError, match=r"tensorboard cannot be started: TypeError: .*flush_seconds"):
        opened(tmp_path, log_tracker_config=str(file))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("wandb = 3", r"\[wandb\] must be a section"),
        ("[wandbb]\nname = 'x'", r"\[wandbb\] is no tracker.* Did you mean wandb\?"),
        ("[wandb", "is not valid TOML"),
    ],
)
def test_a_file_of_settings_that_does_not_fit_is_refused(tmp_path, text, told):
    file = tmp_path / "tracker.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError, match=told):
        settings(LoggingOptions(log_tracker_config=str(file)), ("wandb",))


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "logs").write_text("in the way", encoding="utf-8")
    with pytest.raises(OptionError, match=r"tensorboard cannot be started: .*Error"):
        opened(tmp_path)


def test_a_tracker_that_fails_is_given_up_with_one_warning_and_the_others_go_on(tmp_path, caplog):
    trackers = opened(tmp_path)
    (tensorboard,) = trackers.accelerator.trackers
    told = []

    class Full:
        name = "full"

        def log(self, *_: object, **__: object) -> None:
            told.append(1)
            raise OSError("No space left on device")

    trackers.accelerator.trackers.insert(0, Full())
    tell(trackers, tmp_path)
    assert told == [1]
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == ["full failed and gets no more curves (OSError: No space left on device); training goes on"]
    assert len(events_of(tmp_path / "logs").Scalars("loss/current")) == 2
    assert tensorboard.name == "tensorboard"


def test_what_a_failed_run_told_is_kept(tmp_path):
    trackers = opened(tmp_path)
    trackers.log_step(step(1), average=0.1)
    trackers.abandon()
    assert len(events_of(tmp_path / "logs").Scalars("loss/current")) == 1


@needs_wandb
def test_wandb_hears_that_a_run_failed(tmp_path):
    trackers = opened(tmp_path, log_with="wandb")
    trackers.log_step(step(1), average=0.1)
    trackers.abandon()
    (ended,) = [each.exit for each in wandb_records(tmp_path / "logs") if each.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 1
