"""Options of messages, curves and trackers."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What a run tells, and to whom."""

    console_log_level: str | None = option(
        None,
        "Least important messages that are shown; unset is INFO.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option(
        None, "Write messages to this file, which is emptied first, instead of the terminal.", is_path=True
    )
    console_log_simple: bool = option(False, "Write messages to the standard output instead of the standard error.")
    logging_dir: str | None = option(
        None, "Folder for the trackers' files; given alone it means TensorBoard.", is_path=True
    )
    log_with: str | None = option(
        None, "Where curves go; tensorboard and all need --logging_dir.", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = option(None, "Text before the date in the name of the run's folder in --logging_dir.")
    log_tracker_name: str | None = option(
        None, "Name of the project in the tracker; unset is network_train, or dreambooth with train_db."
    )
    log_tracker_config: str | None = option(
        None, "TOML file of settings for the trackers, a section each; replaces --wandb_run_name.", is_path=True
    )
    wandb_run_name: str | None = option(None, "Name of the run in wandb.")
    wandb_api_key: str | None = option(None, "Key to log in to wandb with.", is_secret=True)
    log_config: bool = option(False, "Send the options to the trackers, without paths and secrets.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if self.log_with in ("tensorboard", "all") and not self.logging_dir:
            raise OptionError(f"--log_with {self.log_with} needs a folder to write to. Add --logging_dir=FOLDER.")
