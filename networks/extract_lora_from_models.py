"""Make a LoRA from the difference of two models.

python networks/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --dim 16
    --save_to difference.safetensors
"""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)

ADVICE = {  # by what a model is, if it is not what the options say
    "sd_v1": "Leave out --v2 and --sdxl.",
    "sd_v2": "Add --v2, and leave out --sdxl.",
    "sdxl_base_v1-0": "Add --sdxl, and leave out --v2.",
    "sd3": "A LoRA can be extracted from models of Stable Diffusion 1.x, 2.x and SDXL.",
}


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What is compared, and how the difference is kept."""

    model_org: str | None = option(None, "The original model, a single file.", is_path=True)
    model_tuned: str | None = option(None, "The trained model, a single file.", is_path=True)
    save_to: str | None = option(None, "File to write: .safetensors, .ckpt, .pt or .pth.", is_path=True)
    v2: bool = option(False, "The models are Stable Diffusion 2.x.")
    sdxl: bool = option(False, "The models are SDXL.")
    v_parameterization: bool = option(False, "The models predict velocity; written into the file's description.")
    load_precision: str | None = option(
        None,
        "Number format that weights are rounded to before they are compared; unset: none.",
        choices=command_line.PRECISIONS,
    )
    save_precision: str | None = option(
        None, "Number format of the file; unset: float.", choices=command_line.PRECISIONS
    )
    dim: int = option(4, "Rank of linear layers and 1x1 convolutions.", bounds=Bounds(min=1))
    conv_dim: int | None = option(
        None, "Rank of larger convolutions; unset: the resnets of the U-Net are left out.", bounds=Bounds(min=1)
    )
    device: str | None = option(None, "Where to compute, such as cuda; unset: the CPU.")
    clamp_quantile: float = option(
        1.0,
        "Values beyond this quantile of all magnitudes of a module are cut to it; 1 cuts none.",
        bounds=Bounds(above=0, max=1),
    )
    min_diff: float = option(
        0.01, "The text encoder is left out if none of its weights differs by more.", bounds=Bounds(min=0)
    )
    no_metadata: bool = option(False, "Leave out of the file what it was made from.")
    load_original_model_to: str | None = option(
        None, "Has no effect, which a line says: models are read weight by weight, none is loaded. See --device."
    )
    load_tuned_model_to: str | None = option(None, "As --load_original_model_to.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if self.v2 and self.sdxl:
            raise OptionError("--v2 and --sdxl are for different models. Give one of them.")


def work(argv: Sequence[str]) -> None:
    """Extract as the arguments say. Raises: UserError."""
    options = command_line.read(
        argv,
        prog="extract_lora_from_models.py",
        description="Make a LoRA from the difference of two models.",
        group=ExtractOptions,
    )
    original = command_line.check_input(options.model_org, "--model_org")
    tuned = command_line.check_input(options.model_tuned, "--model_tuned")
    save_to = command_line.check_output(options.save_to)

    import torch

    from library.models.checkpoint import open_tensors
    from networks import extraction
    from networks.checkpoint_places import KINDS
    from networks.lora_file import write_lora

    device, load_dtype = command_line.device_of(options.device), command_line.dtype_of(options.load_precision)
    for name in ("load_original_model_to", "load_tuned_model_to"):
        if getattr(options, name) is not None:
            log.warning("--%s has no effect: models are read weight by weight, and --device is for the maths", name)
    kind = KINDS["sdxl_base_v1-0" if options.sdxl else "sd_v2" if options.v2 else "sd_v1"]
    models = extraction.pair(open_tensors(original), open_tensors(tuned), kind, ADVICE, load_dtype)
    settings = extraction.Extraction(options.dim, options.conv_dim, options.min_diff, options.clamp_quantile, device)
    modules = extraction.extract(models, settings)
    saved = command_line.dtype_of(options.save_precision) or torch.float32
    header = extraction.header(
        kind, settings, save_to, is_v=options.v_parameterization, with_modelspec=not options.no_metadata
    )
    write_lora(save_to, modules, saved, header)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
