"""Merge LoRA files into an SD3 or SD3.5 model, or with each other.

python networks/sd3_merge_lora.py --sd_model sd3.5_medium.safetensors --models a.safetensors b.safetensors
    --ratios 0.8 0.5 --save_precision fp16 --save_to merged.safetensors
    --clip_l clip_l.safetensors --clip_l_save_to merged_clip_l.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import CheckpointError, OptionError  # noqa: E402
from library.options.declare import option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from networks import command_line, merge_command  # noqa: E402

if TYPE_CHECKING:
    from networks.into_sd3 import TextFile

ADVICE = {  # by what the model is, if it is not SD3
    "sd_v1": "Merge into it with networks/merge_lora.py.",
    "sd_v2": "Merge into it with networks/merge_lora.py --v2.",
    "sdxl_base_v1-0": "Merge into it with networks/sdxl_merge_lora.py.",
}
TEXTS = ("clip_l", "clip_g", "t5xxl")


@dataclass(frozen=True, kw_only=True)
class Sd3MergeOptions(merge_command.MergeBasics):
    """What is merged, and how."""

    clip_l: str | None = option(None, "File of CLIP-L, where it is not in --sd_model.", is_path=True)
    clip_l_save_to: str | None = option(None, "File to write CLIP-L to.", is_path=True)
    clip_g: str | None = option(None, "File of CLIP-G, where it is not in --sd_model.", is_path=True)
    clip_g_save_to: str | None = option(None, "File to write CLIP-G to.", is_path=True)
    t5xxl: str | None = option(None, "File of T5-XXL, where it is not in --sd_model.", is_path=True)
    t5xxl_save_to: str | None = option(None, "File to write T5-XXL to.", is_path=True)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for name in TEXTS:
            path, save_to = getattr(self, name), getattr(self, f"{name}_save_to")
            if (path is None) != (save_to is None):
                missing = f"--{name}" if path is None else f"--{name}_save_to"
                raise OptionError(f"{missing} is missing: --{name} and --{name}_save_to belong together.")
            if path is not None and self.sd_model is None:
                raise OptionError(f"--{name} needs --sd_model: without a model, LoRA files are merged with each other.")
        outputs = [self.save_to, *(getattr(self, f"{name}_save_to") for name in TEXTS)]
        given = [path for path in outputs if path is not None]
        for path in given:
            if given.count(path) > 1:
                raise OptionError(f"{path} is to be written twice. Give each output a file of its own.")


def text_files(options: Sd3MergeOptions) -> list[TextFile]:
    """Return the text encoders' own files. Raises: OptionError where one is not there or cannot be written."""
    from networks.into_sd3 import TextFile

    found = []
    for name in TEXTS:
        path, save_to = getattr(options, name), getattr(options, f"{name}_save_to")
        if path is not None:
            source = command_line.check_input(path, f"--{name}")
            found.append(TextFile(name, source, command_line.check_output(save_to, f"--{name}_save_to")))
    return found


def merge(options: Sd3MergeOptions) -> None:
    """Merge LoRA files into a model, or with each other, and write the result. Raises: UserError."""
    given = command_line.check_models(options.models, options.ratios)
    save_to = command_line.check_output(options.save_to)
    model = command_line.check_input(options.sd_model, "--sd_model") if options.sd_model is not None else None
    texts = text_files(options)

    from library.models.layout import lora_names
    from networks import into_checkpoint, into_sd3, split_qkv
    from networks.lora_file import open_lora

    work_dtype = command_line.dtype_of(options.precision)
    loras = [open_lora(path, work_dtype) for path, _ in given]
    for lora in loras:
        family = lora_names.family_of(lora.modules)
        if family not in {lora_names.SD3, None}:
            raise CheckpointError(f"{lora.path}: is for {lora_names.TITLES[str(family)]}, not for SD3.")
        split_qkv.warn_of_weak(lora.modules, lora.path)
    if model is None:
        merge_command.merge_with_each_other(options, loras, [None] * len(loras), save_to)
        return
    saved = command_line.dtype_of(options.save_precision) or work_dtype
    shares = [into_checkpoint.Share(lora, ratio) for lora, (_, ratio) in zip(loras, given, strict=True)]
    output = into_checkpoint.Output(save_to, work_dtype, saved, with_metadata=not options.no_metadata)
    into_sd3.merge(model, texts, shares, output, ADVICE)


def work(argv: Sequence[str]) -> None:
    """Merge as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="sd3_merge_lora.py",
        description="Merge LoRA files into an SD3 or SD3.5 model, or with each other.",
        group=Sd3MergeOptions,
        refused={
            "v2": "models of Stable Diffusion 2.x are merged by merge_lora.py",
            "lbws": "there are no lists of weights for SD3's blocks",
        },
    )
    merge(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
