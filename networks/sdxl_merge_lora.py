"""Merge LoRA files into an SDXL model, or with each other, with weights for their blocks.

python networks/sdxl_merge_lora.py --sd_model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5
    --save_precision fp16 --save_to merged.safetensors
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
from networks.block_weights import HELP, read_lists  # noqa: E402

ADVICE = {  # by what the model is, if it is no SDXL model
    "sd_v1": "Merge into it with networks/merge_lora.py.",
    "sd_v2": "Merge into it with networks/merge_lora.py --v2.",
    "sd3": "Merge into it with networks/sd3_merge_lora.py.",
}


@dataclass(frozen=True, kw_only=True)
class SdxlMergeOptions(merge_command.MergeBasics):
    """What is merged, and how."""

    lbws: tuple[str, ...] | None = option(None, HELP)


def work(argv: Sequence[str]) -> None:
    """Merge as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="sdxl_merge_lora.py",
        description="Merge LoRA files into an SDXL model, or with each other.",
        group=SdxlMergeOptions,
        refused={"v2": "models that are no SDXL are merged by merge_lora.py"},
    )
    weights = read_lists(options.lbws, len(options.models or ()))
    merge_command.merge(options, "sdxl_base_v1-0", ADVICE, weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
