"""Bring a LoRA file to another rank, losing as little as possible.

python networks/resize_lora.py --model big.safetensors --new_rank 8 --save_to small.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import OptionError  # noqa: E402
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from library.options.values import Bounds  # noqa: E402
from networks import command_line  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """What is resized, and how."""

    model: str | None = option(None, "LoRA file.", is_path=True)
    save_to: str | None = option(None, "File to write: .safetensors, .ckpt, .pt or .pth.", is_path=True)
    new_rank: int = option(
        4, "Rank of linear layers and 1x1 convolutions; with --dynamic_method the largest.", bounds=Bounds(min=1)
    )
    new_conv_rank: int | None = option(
        None, "Rank of larger convolutions; unset: that of --new_rank.", bounds=Bounds(min=1)
    )
    save_precision: str | None = option(
        None, "Number format of the file; unset: float.", choices=command_line.PRECISIONS
    )
    device: str | None = option(None, "Where to compute, such as cuda; unset: the CPU.")
    verbose: bool = option(False, "Tell what each module keeps.")
    dynamic_method: str | None = option(
        None,
        "Choose each module's rank by its singular values: those above the largest / --dynamic_param (sv_ratio), or as "
        "many as make up the share --dynamic_param of the norm (sv_fro) or of their sum (sv_cumulative).",
        choices=("sv_ratio", "sv_fro", "sv_cumulative"),
    )
    dynamic_param: float | None = option(None, "Number for --dynamic_method.", bounds=Bounds(above=0))

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            raise OptionError("--dynamic_method and --dynamic_param belong together: give both, or none.")
        if self.dynamic_param is None:
            return
        if self.dynamic_method == "sv_ratio" and self.dynamic_param < 1:
            raise OptionError(f"--dynamic_param must be at least 1 for sv_ratio, got {self.dynamic_param}.")
        if self.dynamic_method != "sv_ratio" and self.dynamic_param > 1:
            raise OptionError(f"--dynamic_param must be at most 1 for {self.dynamic_method}, got {self.dynamic_param}.")


def work(argv: Sequence[str]) -> None:
    """Resize as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv, prog="resize_lora.py", description="Bring a LoRA file to another rank.", group=ResizeOptions
    )
    model = command_line.check_input(options.model, "--model")
    save_to = command_line.check_output(options.save_to)

    import torch

    from networks import files, resizing
    from networks.lora_file import write_tensors

    conv_rank = options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    device = command_line.device_of(options.device)
    settings = resizing.Resizing(options.new_rank, conv_rank, options.dynamic_method, options.dynamic_param, device)
    done = resizing.resize(files.read_as_named(model), settings, model, options.verbose)
    dtype = command_line.dtype_of(options.save_precision) or torch.float32
    write_tensors(save_to, done.tensors, dtype, resizing.header(files.header_of(model), done, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
