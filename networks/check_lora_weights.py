"""Show the mean and the smallest magnitude of each tensor of a LoRA file.

python networks/check_lora_weights.py lora.safetensors
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
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from networks import command_line  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is shown."""

    file: str | None = option(None, "LoRA file.", is_path=True)
    show_all_keys: bool = option(False, "Show every tensor, alphas included.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)


def work(argv: Sequence[str]) -> None:
    """Show what the arguments ask for. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="check_lora_weights.py",
        description="Show the mean and the smallest magnitude of each tensor of a LoRA file.",
        group=CheckOptions,
        positional={"file": "LoRA file."},
        short={"s": "show_all_keys"},
    )
    path = command_line.check_input(options.file, "the file")

    from networks import files

    tensors = files.read_as_named(path)
    shown = [name for name in tensors if options.show_all_keys or "lora_up" in name or "lora_down" in name]
    modules = sum("lora_down" in name for name in tensors)
    sys.stdout.write(f"number of LoRA modules: {modules}\n")
    for name in sorted(shown):
        magnitudes = tensors[name].float().abs()
        shape = "-".join(map(str, magnitudes.shape))
        sys.stdout.write(f"{name},({shape}),{magnitudes.mean().item()},{magnitudes.min().item()}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
