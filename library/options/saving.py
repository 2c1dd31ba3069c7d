"""Options of what is written, when, and under which names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options.declare import check_values, option, settle
from library.options.values import Bounds

INTERVALS = (
    "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio", "save_last_n_epochs", "save_last_n_steps",
    "save_last_n_epochs_state", "save_last_n_steps_state",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """Files that a run leaves behind."""

    output_dir: str | None = option(None, "Folder for all that is written; made when missing.", is_path=True)
    output_name: str | None = option(None, "Name of saved files without ending. Unset: epoch, at and last.")
    save_precision: str | None = option(
        None, "Number format of saved weights; unset keeps the trained one.", choices=("float", "fp16", "bf16")
    )
    save_model_as: str | None = option(
        "safetensors",
        "File type of saved weights; only safetensors holds metadata. Networks are ckpt, pt or safetensors; whole "
        "models ckpt, safetensors or a folder: diffusers of pickled, diffusers_safetensors of safetensors files. With "
        "train_db unset is what the base model is.",
        choices=("ckpt", "pt", "safetensors", "diffusers", "diffusers_safetensors"),
    )
    use_safetensors: bool = option(
        False, "Save whole models in safetensors files where --save_model_as is unset or diffusers."
    )
    save_ema: bool = option(
        False, "Beside every saved file, write the average that --ema_decay keeps: name_ema.safetensors."
    )
    save_every_n_epochs: int | None = option(None, "Save after every N-th epoch. 0 is off.", bounds=Bounds(min=0))
    save_every_n_steps: int | None = option(None, "Save after every N-th step. 0 is off.", bounds=Bounds(min=0))
    save_n_epoch_ratio: int | None = option(
        None, "Save about this many times in the run, at ends of epochs. 0 is off.", bounds=Bounds(min=0)
    )
    save_last_n_epochs: int | None = option(
        None, "Of the files saved after epochs, keep those of the last N saves. 0 keeps all.", bounds=Bounds(min=0)
    )
    save_last_n_steps: int | None = option(
        None, "Of the files saved after steps, keep those of the last N steps. 0 keeps all.", bounds=Bounds(min=0)
    )
    save_state: bool = option(
        False, "Beside every saved file, and at the end, write a folder with which --resume continues the run exactly."
    )
    save_state_on_train_end: bool = option(False, "Write that folder at the end of the run only.")
    save_last_n_epochs_state: int | None = option(
        None, "As --save_last_n_epochs, for states. Unset or 0: as for files.", bounds=Bounds(min=0)
    )
    save_last_n_steps_state: int | None = option(
        None, "As --save_last_n_steps, for states. Unset or 0: as for files.", bounds=Bounds(min=0)
    )
    resume: str | None = option(
        None, "Continue the run whose state is in this folder, as if it had never stopped.", is_path=True
    )
    no_metadata: bool = option(False, "Leave out of saved files how they were trained.")
    training_comment: str | None = option(None, "Text for the metadata of saved files (ss_training_comment).")
    report: bool = option(False, "Write a report of the run as one HTML file beside the model.")

    def __post_init__(self) -> None:
        """Check the values; an interval of 0 is none."""
        check_values(self)
        for name in INTERVALS:
            if getattr(self, name) == 0:
                settle(self, name, None)

    def model_form(self, base_model: str) -> str:
        """Return what saved whole models are: ckpt, safetensors, diffusers or diffusers_safetensors.

        Args:
            base_model: path of the model that is trained; what is no file counts as a diffusers folder.
        """
        if self.save_model_as == "diffusers" and self.use_safetensors:
            return "diffusers_safetensors"
        if self.save_model_as is not None:
            return self.save_model_as
        path = Path(base_model)
        if not path.is_file():
            return "diffusers_safetensors"
        return "safetensors" if self.use_safetensors or path.suffix == ".safetensors" else "ckpt"
