"""TensorBoard and wandb, through accelerate."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from library.errors import OptionError
from library.options.toml import read_toml

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.options.logging import LoggingOptions
    from library.training.metrics import LossRecord, ValidationRecord

log = logging.getLogger(__name__)


def wanted(options: LoggingOptions) -> tuple[str, ...]:
    """Return the tracker names the options ask for: --logging_dir alone means TensorBoard.

    Raises: OptionError where a tracker's package is missing.
    """
    if options.log_with is None:
        names: tuple[str, ...] = ("tensorboard",) if options.logging_dir else ()
    else:
        names = ("tensorboard", "wandb") if options.log_with == "all" else (options.log_with,)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"--log_with {options.log_with}: {name} is not installed. Run: pip install {name}")
    return names


def log_dir(options: LoggingOptions) -> Path | None:
    """Return the time-stamped folder of this run's logs, or None without --logging_dir."""
    if not options.logging_dir:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


@dataclass
class Trackers:
    """Sends a run's numbers and pictures to the trackers that are open; does nothing where none is."""

    accelerator: Accelerator
    names: tuple[str, ...]

    def open(self, options: LoggingOptions, config: Mapping[str, Any]) -> None:
        """Start the trackers.

        Args:
            options: names the project, the run, and a TOML of init_kwargs.
            config: shown as the run's configuration; only with --log_config.
        """
        if not self.names:
            return
        settings: dict[str, Any] = {}
        if options.log_tracker_config:
            settings = read_toml(Path(options.log_tracker_config))
        elif options.wandb_run_name:
            settings = {"wandb": {"name": options.wandb_run_name}}
        if options.wandb_api_key and "wandb" in self.names:
            import wandb

            wandb.login(key=options.wandb_api_key)
        self.accelerator.init_trackers(
            options.log_tracker_name or "network_train",
            config=dict(config) if options.log_config else None,
            init_kwargs=settings,
        )

    def log_step(self, record: LossRecord, average: float) -> None:
        """Log one optimizer step's losses and learning rates."""
        if not self.names:
            return
        values = {"loss/current": record.loss, "loss/average": average} | record.extras
        values |= {f"lr/{name}": rate for name, rate in record.learning_rates.items()}
        self.accelerator.log(values, step=record.step)

    def log_epoch(self, epoch: int, step: int, average: float) -> None:
        """Log an epoch's mean loss: over epochs in TensorBoard, over steps in wandb, which drops what goes back."""
        self._log_by_epoch({"loss/epoch_average": average}, epoch, step)

    def log_validation(self, record: ValidationRecord, *, is_step_due: bool, is_epoch_due: bool) -> None:
        """Log the loss on held-back images under the names of what made it due: a number of steps, an epoch's end."""
        if self.names and is_step_due:
            self.accelerator.log(_named("step", record), step=record.step)
        if is_epoch_due:
            self._log_by_epoch(_named("epoch", record), record.epoch, record.step)

    def _log_by_epoch(self, values: dict[str, float], epoch: int, step: int) -> None:
        for tracker in self.accelerator.trackers if self.names else ():
            is_by_epoch = tracker.name == "tensorboard"
            told = values if is_by_epoch else {**values, "epoch": float(epoch)}
            tracker.log(told, step=epoch if is_by_epoch else step)

    def log_images(self, paths: list[Path], step: int) -> None:
        """Send preview pictures to the trackers; those of all processes."""
        if not self.names:
            return
        paths = sorted(gather_object(paths), key=lambda path: path.name)
        import numpy as np
        from PIL import Image

        for tracker in self.accelerator.trackers:
            for index, path in enumerate(paths):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"sample_{index}": pixels}, step=step, **layout)


def _named(reason: str, record: ValidationRecord) -> dict[str, float]:
    names = f"loss/validation/{reason}_average", f"loss/validation/{reason}_divergence"
    return dict(zip(names, (record.loss, record.divergence), strict=True))
