"""What merge_lora.py, sdxl_merge_lora.py and sd3_merge_lora.py share: their options, and the merge that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import OptionError
from library.options.declare import check_values, option
from networks import command_line
from networks.block_weights import BlockWeights, check_family

if TYPE_CHECKING:
    from networks.lora_file import LoraFile


@dataclass(frozen=True, kw_only=True)
class MergeBasics:
    """What is merged, and how, for models of every kind."""

    sd_model: str | None = option(
        None, "Model file to merge into; unset: the LoRA files are merged with each other.", is_path=True
    )
    models: tuple[str, ...] | None = option(None, "LoRA files.", is_path=True)
    ratios: tuple[float, ...] | None = option(None, "A factor for each of --models.")
    save_to: str | None = option(None, "File to write: .safetensors, .ckpt, .pt or .pth.", is_path=True)
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


def merge(
    options: MergeBasics, version: str, advice: Mapping[str, str], weights: Sequence[BlockWeights | None] | None = None
) -> None:
    """Merge LoRA files into a model, or with each other, and write the result.

    Args:
        options: what and how.
        version: of the model that is merged into, a key of `checkpoint_places.KINDS`.
        advice: what to do where it is of another kind, by that kind's version.
        weights: of the blocks, for each of --models; None: none.

    Raises: UserError.
    """
    given = command_line.check_models(options.models, options.ratios)
    save_to = command_line.check_output(options.save_to)
    model = command_line.check_input(options.sd_model, "--sd_model") if options.sd_model is not None else None

    from networks import into_checkpoint
    from networks.checkpoint_places import KINDS
    from networks.lora_file import open_adapter, open_lora

    work_dtype = command_line.dtype_of(options.precision)
    saved = command_line.dtype_of(options.save_precision) or work_dtype
    own_weights = weights or [None] * len(given)
    if model is not None:
        target = into_checkpoint.Target(model, KINDS[version], advice)
        output = into_checkpoint.Output(save_to, work_dtype, saved, with_metadata=not options.no_metadata)
        shares = [
            into_checkpoint.Share(open_adapter(path, work_dtype), ratio, own)
            for (path, ratio), own in zip(given, own_weights, strict=True)
        ]
        for share in shares:
            check_family(own_weights, list(share.lora.modules), share.lora.path)
        into_checkpoint.merge(target, shares, output)
        return
    loras = [open_lora(path, work_dtype) for path, _ in given]
    for lora in loras:
        check_family(own_weights, list(lora.modules), lora.path)
    merge_with_each_other(options, loras, own_weights, save_to)


def merge_with_each_other(
    options: MergeBasics, loras: Sequence[LoraFile], weights: Sequence[BlockWeights | None], save_to: Path
) -> None:
    """Merge LoRA files with each other, and write the result.

    Args:
        options: their ratios and how they are merged.
        loras: the files, in the options' format.
        weights: of the blocks, for each of them.
        save_to: the file to write.

    Raises: UserError.
    """
    from networks import combining
    from networks.lora_file import merged_header, write_lora

    work_dtype = command_line.dtype_of(options.precision)
    parts = list(zip(loras, options.ratios or (), weights, strict=True))
    modules = combining.merge(combining.terms_of(parts), concat=options.concat, shuffle=options.shuffle)
    modules = combining.rounded(modules, work_dtype)
    header = merged_header(modules, loras, save_to, with_modelspec=not options.no_metadata)
    write_lora(save_to, modules, command_line.dtype_of(options.save_precision) or work_dtype, header)
