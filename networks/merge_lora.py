"""Merge LoRA files into a model, or with each other.

python networks/merge_lora.py --sd_model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5
    --save_to merged.safetensors
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
from library.options.declare import option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from networks import command_line, merge_command  # noqa: E402

ADVICE = {  # by what the model is, if it is not what the options say
    "sd_v1": "Leave out --v2.",
    "sd_v2": "Add --v2.",
    "sdxl_base_v1-0": "Merge into it with networks/sdxl_merge_lora.py.",
    "sd3": "Merge into it with networks/sd3_merge_lora.py.",
}


@dataclass(frozen=True, kw_only=True)
class MergeOptions(merge_command.MergeBasics):
    """What is merged, and how."""

    v2: bool = option(False, "The model is Stable Diffusion 2.x.")


def work(argv: Sequence[str]) -> None:
    """Merge as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="merge_lora.py",
        description="Merge LoRA files into a model, or with each other.",
        group=MergeOptions,
        refused={"lbws": "it belongs to sdxl_merge_lora.py and svd_merge_lora.py"},
    )
    merge_command.merge(options, "sd_v2" if options.v2 else "sd_v1", ADVICE)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
