"""TensorBoard and wandb, through accelerate."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from library.errors import OptionError, did_you_mean
from library.options.toml import read_toml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.logging import LoggingOptions
    from library.training.metrics import LossRecord, MaskFigures, ValidationRecord

log = logging.getLogger(__name__)

TENSORBOARD, WANDB = "tensorboard", "wandb"


def wanted(options: LoggingOptions) -> tuple[str, ...]:
    """Return the tracker names the options ask for: --logging_dir alone means TensorBoard.

    Raises: OptionError where a tracker's package is missing.
    """
    if options.log_with is None:
        names: tuple[str, ...] = (TENSORBOARD,) if options.logging_dir else ()
    else:
        names = (TENSORBOARD, WANDB) if options.log_with == "all" else (options.log_with,)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"--log_with {options.log_with}: {name} is not installed. Run: pip install {name}")
    return names


def log_dir(options: LoggingOptions) -> Path | None:
    """Return the time-stamped folder of this run's logs, or None without --logging_dir."""
    if not options.logging_dir:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


def settings(options: LoggingOptions, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what each tracker is started with beside the project's name, from --log_tracker_config or its stand-in.

    Raises: OptionError for a file that cannot be read or does not fit the trackers.
    """
    if not options.log_tracker_config:
        return {WANDB: {"name": options.wandb_run_name}} if options.wandb_run_name else {}
    found = read_toml(Path(options.log_tracker_config))
    for name, table in found.items():
        where = f"--log_tracker_config {options.log_tracker_config}: [{name}]"
        if not isinstance(table, dict):
            raise OptionError(f'{where} must be a section of settings, like [wandb] with tags = ["masked"] below it.')
        if name not in (TENSORBOARD, WANDB):
            raise OptionError(f"{where} is no tracker; there are tensorboard and wandb.{did_you_mean(name, names)}")
    return found


@dataclass
class Trackers:
    """Sends a run's numbers and pictures to the trackers that are open; does nothing where none is."""

    accelerator: Accelerator
    names: tuple[str, ...]

    def open(self, options: LoggingOptions, config: Mapping[str, Any], folder: Path | str | None = None) -> None:
        """Start the trackers; to be called before models are loaded, because a wrong key or folder is told here.

        Args:
            options: names the project, the run, and a TOML of settings.
            config: shown as the run's configuration; only with --log_config.
            folder: of this run's logs, for wandb's files; None leaves them where wandb puts them.

        Raises: OptionError when a tracker does not start.
        """
        if not self.names:
            return
        given = settings(options, self.names)
        try:
            if WANDB in self.names:
                given = given | {WANDB: _wandb_settings(given.get(WANDB, {}), options.wandb_api_key, folder)}
            with arguments_hidden():
                self.accelerator.init_trackers(
                    options.log_tracker_name or "network_train",
                    config=plain(config) if options.log_config else None,
                    init_kwargs=given,
                )
        except Exception as error:  # wandb's own, a TypeError for an unknown setting, an OSError of the folder
            text = " ".join(f"{error}".split())
            if options.wandb_api_key:
                text = text.replace(options.wandb_api_key, "***")
            hint = " To log without its server, set WANDB_MODE=offline." if WANDB in self.names else ""
            names = " and ".join(self.names)
            raise OptionError(f"--log_with: {names} cannot be started: {type(error).__name__}: {text}.{hint}") from None

    def abandon(self) -> None:
        """Close the trackers of a run that failed, so that what they were told is kept."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            with suppress(Exception):  # the run's own error is the one to be seen
                if tracker.name == WANDB:
                    tracker.run.finish(exit_code=1)
                else:
                    tracker.finish()
        self.accelerator.trackers.clear()

    def log_step(self, record: LossRecord, average: float, masked: Mapping[str, float] | None = None) -> None:
        """Log one optimizer step's losses and learning rates.

        Args:
            record: of the step.
            average: the mean loss over the last epoch's worth of steps.
            masked: that inside and outside of the masks, where it is measured.
        """
        values = {"loss/current": record.loss, "loss/average": average} | record.extras
        values |= _regions("loss/", record.figures)
        values |= {f"loss/{name}_average": value for name, value in (masked or {}).items()}
        if record.figures is not None:
            values["mask/share"] = record.figures.share
        values |= {f"lr/{name}": rate for name, rate in record.learning_rates.items()}
        self._log(values, record.step)

    def log_epoch(self, epoch: int, step: int, average: float) -> None:
        """Log an epoch's mean loss: over epochs in TensorBoard, over steps in wandb, which drops what goes back."""
        self._log({"loss/epoch_average": average}, step, epoch=epoch)

    def log_validation(self, record: ValidationRecord, *, is_step_due: bool, is_epoch_due: bool) -> None:
        """Log the loss on held-back images under the names of what made it due: a number of steps, an epoch's end."""
        if is_step_due:
            self._log(_named("step", record), record.step)
        if is_epoch_due:
            self._log(_named("epoch", record), record.step, epoch=record.epoch)

    def log_images(self, paths: list[Path], step: int) -> None:
        """Send preview pictures to the trackers; those of all processes."""
        if not self.names:
            return
        paths = sorted(gather_object(paths), key=lambda path: path.name)
        if not self.accelerator.is_main_process:
            return
        import numpy as np
        from PIL import Image

        for index, path in enumerate(paths):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)

            def send(tracker: Any, index: int = index, pixels: Any = pixels) -> None:
                layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
                tracker.log_images({f"sample_{index}": pixels}, step=step, **layout)

            self._tell(send)

    def _log(self, values: dict[str, float], step: int, epoch: int | None = None) -> None:
        """Log values of a step, or of the epoch that it ends."""

        def send(tracker: Any) -> None:
            if tracker.name == TENSORBOARD:
                tracker.log(values, step=step if epoch is None else epoch)
                return
            places = {"global_step": step} | ({} if epoch is None else {"epoch": epoch})  # axes, as sd-scripts has them
            tracker.log({**values, **places}, step=step)

        self._tell(send)

    def _tell(self, send: Callable[[Any], None]) -> None:
        """Tell each tracker; one that fails is closed, and training goes on."""
        for tracker in list(self.accelerator.trackers) if self.names else ():
            try:
                send(tracker)
            except Exception as error:  # a full disk, a server that is gone: a curve is not worth a training
                self.accelerator.trackers.remove(tracker)
                log.warning(
                    "%s failed and gets no more curves (%s: %s); training goes on",
                    *(tracker.name, type(error).__name__, " ".join(str(error).split())),
                )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in values that every tracker takes: lists as text, nothing that is unset."""
    texts = {name: " ".join(map(str, value)) for name, value in config.items() if isinstance(value, list | tuple)}
    return {name: texts.get(name, value) for name, value in config.items() if value is not None}


@contextmanager
def arguments_hidden() -> Iterator[None]:
    """Hide the command line meanwhile: wandb would send it, keys and paths included, to describe the machine."""
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _wandb_settings(given: Mapping[str, Any], key: str | None, folder: Path | str | None) -> dict[str, Any]:
    """Return wandb.init's arguments: those given, the key for this run alone, and the folder of its files."""
    made = dict(given)
    if folder is not None and "dir" not in made:
        Path(folder).mkdir(parents=True, exist_ok=True)  # else wandb takes another place
        made["dir"] = str(folder)
    if key:  # not by wandb.login, which would write it into the user's .netrc
        made["settings"] = {**made.get("settings", {}), "api_key": key}
    return made


def _named(reason: str, record: ValidationRecord) -> dict[str, float]:
    names = f"loss/validation/{reason}_average", f"loss/validation/{reason}_divergence"
    values = dict(zip(names, (record.loss, record.divergence), strict=True))
    return values | _regions(f"loss/validation/{reason}_", record.figures)


def _regions(prefix: str, figures: MaskFigures | None) -> dict[str, float]:
    """Return the losses inside and outside of masks and the drift outside by name, as far as they were measured."""
    if figures is None:
        return {}
    found = {"inside": figures.inside, "outside": figures.outside, "drift_outside": figures.drift}
    return {f"{prefix}{name}": value for name, value in found.items() if value is not None}
