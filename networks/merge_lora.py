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
from library.errors import OptionError  # noqa: E402
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from networks import command_line  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What is merged, and how."""

    sd_model: str | None = option(
        None, "Model file to merge into; unset: the LoRA files are merged with each other.", is_path=True
    )
    models: tuple[str, ...] | None = option(None, "LoRA files.", is_path=True)
    ratios: tuple[float, ...] | None = option(None, "A factor for each of --models.")
    save_to: str | None = option(None, "File to write: .safetensors, .ckpt, .pt or .pth.", is_path=True)
    v2: bool = option(False, "The model is Stable Diffusion 2.x.")
    precision: str = option(
        "float",
        "Number format that what is merged is rounded to before and after; sums are always made in float.",
        choices=command_line.PRECISIONS,
    )
    save_precision: str | None = option(
        None, "Number format of the file; unset: that of --precision.", choices=command_line.PRECISIONS
    )
    concat: bool = option(
        False,
        "Merge LoRA files with each other by putting their ranks side by side. Without it a module gets the lowest "
        "rank that holds the sum. Both are exact.",
    )
    shuffle: bool = option(False, "Put the ranks of each merged LoRA module into another order.")
    no_metadata: bool = option(False, "Leave out of the file what it was merged from.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        for name in ("concat", "shuffle"):
            if self.sd_model is not None and getattr(self, name):
                raise OptionError(f"--{name} is for merging LoRA files with each other. Leave out it or --sd_model.")


def work(argv: Sequence[str]) -> None:
    """Merge as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="merge_lora.py",
        description="Merge LoRA files into a model, or with each other.",
        group=MergeOptions,
        refused={"lbws": "it belongs to svd_merge_lora.py"},
    )
    given = command_line.check_models(options.models, options.ratios)
    save_to = command_line.check_output(options.save_to)
    model = command_line.check_input(options.sd_model, "--sd_model") if options.sd_model is not None else None

    from networks import combining, into_checkpoint
    from networks.lora_file import merged_header, open_lora, write_lora

    work_dtype = command_line.dtype_of(options.precision)
    saved = command_line.dtype_of(options.save_precision) or work_dtype
    loras = [(open_lora(path, work_dtype), ratio) for path, ratio in given]
    if model is not None:
        precisions = into_checkpoint.Precisions(work_dtype, saved)
        with_metadata = not options.no_metadata
        into_checkpoint.merge(model, loras, save_to, options.v2, precisions, with_metadata=with_metadata)
        return
    terms = combining.terms_of((lora, ratio, None) for lora, ratio in loras)
    modules = combining.merge(terms, concat=options.concat, shuffle=options.shuffle)
    modules = combining.rounded(modules, work_dtype)
    sources = [lora for lora, _ in loras]
    header = merged_header(modules, sources, save_to, with_modelspec=not options.no_metadata)
    write_lora(save_to, modules, saved, header)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
