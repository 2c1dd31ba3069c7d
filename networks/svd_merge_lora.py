"""Merge LoRA files of any ranks into one of a chosen rank, the best there is of that rank.

python networks/svd_merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --new_rank 16
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
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from library.options.values import Bounds  # noqa: E402
from networks import command_line  # noqa: E402
from networks.block_weights import HELP, check_family, read_lists  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class SvdMergeOptions:
    """What is merged, and how."""

    models: tuple[str, ...] | None = option(None, "LoRA files.", is_path=True)
    ratios: tuple[float, ...] | None = option(None, "A factor for each of --models.")
    lbws: tuple[str, ...] | None = option(None, HELP)
    save_to: str | None = option(None, "File to write: .safetensors, .ckpt, .pt or .pth.", is_path=True)
    new_rank: int = option(4, "Rank of linear layers and 1x1 convolutions.", bounds=Bounds(min=1))
    new_conv_rank: int | None = option(
        None, "Rank of larger convolutions; unset: that of --new_rank.", bounds=Bounds(min=1)
    )
    precision: str = option(
        "float",
        "Number format that what is merged is rounded to before and after; sums are always made in float.",
        choices=command_line.PRECISIONS,
    )
    save_precision: str | None = option(
        None, "Number format of the file; unset: that of --precision.", choices=command_line.PRECISIONS
    )
    device: str | None = option(None, "Where to compute, such as cuda; unset: the CPU.")
    no_metadata: bool = option(False, "Leave out of the file what it was merged from.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)


def work(argv: Sequence[str]) -> None:
    """Merge as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="svd_merge_lora.py",
        description="Merge LoRA files of any ranks into one of a chosen rank.",
        group=SvdMergeOptions,
    )
    given = command_line.check_models(options.models, options.ratios)
    save_to = command_line.check_output(options.save_to)
    weights = read_lists(options.lbws, len(given))

    from networks import combining
    from networks.lora_file import merged_header, open_lora, write_lora

    device = command_line.device_of(options.device)
    work_dtype = command_line.dtype_of(options.precision)
    loras = [(open_lora(path, work_dtype), ratio) for path, ratio in given]
    for lora, _ in loras:
        check_family(weights, list(lora.modules), lora.path)
    terms = combining.terms_of((lora, ratio, own) for (lora, ratio), own in zip(loras, weights, strict=True))
    conv_rank = options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    modules = combining.rounded(combining.merge_by_svd(terms, options.new_rank, conv_rank, device), work_dtype)
    sources = [lora for lora, _ in loras]
    header = merged_header(modules, sources, save_to, with_modelspec=not options.no_metadata)
    write_lora(save_to, modules, command_line.dtype_of(options.save_precision) or work_dtype, header)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
