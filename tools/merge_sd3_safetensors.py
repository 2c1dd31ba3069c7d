"""Put the parts of an SD3 or SD3.5 model into one file: denoiser, VAE and text encoders.

python tools/merge_sd3_safetensors.py --dit sd3.5_medium.safetensors --vae vae.safetensors --clip_l clip_l.safetensors
    --clip_g clip_g.safetensors --t5xxl t5xxl_fp16.safetensors --output sd3.5_medium_whole.safetensors

Tensors are copied one by one, so memory for one of them is enough.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import CheckpointError, OptionError  # noqa: E402
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from networks import command_line  # noqa: E402

if TYPE_CHECKING:
    import torch

    from library.models.checkpoint import TensorSource

log = logging.getLogger(__name__)

TEXTS = ("clip_l", "clip_g", "t5xxl")
VAE_SIGN = "encoder.down.0.block.0.conv1.weight"
VAE_LATENTS = "decoder.conv_in.weight"  # (out, channels of latents, 3, 3)
LATENT_CHANNELS = 16
NESTED = "text_model."


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What goes into the file."""

    dit: str | None = option(None, "File of the denoiser; may hold other parts, which are kept.", is_path=True)
    vae: str | None = option(None, "File of the VAE.", is_path=True)
    clip_l: str | None = option(None, "File of CLIP-L.", is_path=True)
    clip_g: str | None = option(None, "File of CLIP-G.", is_path=True)
    t5xxl: str | None = option(None, "File of T5-XXL.", is_path=True)
    output: str = option("merged_model.safetensors", "File to write.", is_path=True)
    save_precision: str | None = option(
        None, "Number format of the file; unset: each tensor keeps its own.", choices=command_line.PRECISIONS
    )
    device: str | None = option(None, "Has no effect: tensors are copied, nothing is computed.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if Path(self.output).suffix != ".safetensors":
            raise OptionError(f"--output {self.output}: the ending must be .safetensors.")


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the new file is."""

    file: TensorSource
    name: str


def pack(options: PackOptions) -> None:
    """Write the file. Raises: UserError."""
    given = {name: getattr(options, name) for name in ("dit", "vae", *TEXTS)}
    paths = {name: command_line.check_input(path, f"--{name}") for name, path in given.items() if path is not None}
    if "dit" not in paths:
        raise OptionError("--dit is missing. Give the file of the denoiser.")
    output = command_line.check_output(options.output, "--output")
    if options.device is not None:
        log.warning("--device has no effect: tensors are copied, nothing is computed")

    from library.models import streaming
    from library.models.checkpoint import open_tensors
    from library.models.scaled import unscaled
    from networks import files

    dtype = command_line.dtype_of(options.save_precision)
    # In another format weights need no factors any more, which some float8 files hold beside them.
    opened: Callable[[Path], TensorSource] = (
        open_tensors if dtype is None else lambda path: unscaled(open_tensors(path))
    )
    tensors = collected({name: opened(path) for name, path in paths.items()})

    def make(name: str) -> torch.Tensor:
        stored = tensors[name]
        tensor = stored.file.read(stored.name)
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    layout = {}
    for name, stored in tensors.items():
        tensor = stored.file.read(stored.name)  # mapped: nothing is read of it yet
        is_cast = dtype is not None and tensor.is_floating_point()
        layout[name] = (dtype if is_cast and dtype is not None else tensor.dtype, tuple(tensor.shape))
    streaming.write(output, layout, make, files.header_of(paths["dit"]), "pack")
    log.info("%s: written, %d tensors", output, len(layout))


def collected(parts: Mapping[str, TensorSource]) -> dict[str, Stored]:
    """Return every tensor of the new file by its name there.

    Args:
        parts: the files, by option.

    Raises: CheckpointError where one does not hold what its option says, or they do not fit together.
    """
    from library.models.layout import mmdit, vae
    from library.models.sd3_files import EMBEDDED
    from networks.checkpoint_places import SD3, places

    places(parts["dit"], SD3)
    kept = (mmdit.PREFIX, vae.PREFIX, "text_encoders.")
    tensors = {
        name if name.startswith(kept) else mmdit.PREFIX + name: Stored(parts["dit"], name)
        for name in parts["dit"].shapes
    }
    for part in (name for name in ("vae", *TEXTS) if name in parts):
        start = vae.PREFIX if part == "vae" else EMBEDDED[part]
        own = _vae_names(parts[part]) if part == "vae" else _text_names(parts[part], part)
        inside = vae.PREFIX if part == "vae" else f"text_encoders.{part}."
        replaced = [name for name in tensors if name.startswith(inside)]
        if replaced:
            log.info("--%s replaces what %s holds of it", part, parts["dit"].path)
        tensors = {name: stored for name, stored in tensors.items() if not name.startswith(inside)}
        tensors |= {start + name: Stored(parts[part], stored) for name, stored in own.items()}
    _check_clips(parts, tensors)
    return tensors


def _vae_names(file: TensorSource) -> dict[str, str]:
    """Return the file's name of each tensor of the VAE, by its name in the original layout."""
    from library.models.layout import vae

    prefix = vae.PREFIX if any(name.startswith(vae.PREFIX) for name in file.shapes) else ""
    if prefix + VAE_SIGN not in file.shapes:
        what = (
            "a VAE in diffusers' layout" if "encoder.down_blocks.0.resnets.0.conv1.weight" in file.shapes else "no VAE"
        )
        raise CheckpointError(f"--vae {file.path}: is {what}. Give a VAE in the original layout ({VAE_SIGN}).")
    channels = file.shapes.get(prefix + VAE_LATENTS, (0, 0))[1]
    if channels != LATENT_CHANNELS:
        raise CheckpointError(
            f"--vae {file.path}: makes latents of {channels} channels, SD3's have {LATENT_CHANNELS}. "
            "It is another model's VAE."
        )
    return {name.removeprefix(prefix): name for name in file.shapes if name.startswith(prefix)}


def _text_names(file: TensorSource, encoder: str) -> dict[str, str]:
    """Return the file's name of each tensor of a text encoder, by its name in transformers' layout."""
    from library.models.sd3_files import EMBEDDED, SIGNS, TITLES

    for start in (EMBEDDED[encoder], ""):
        for sign in SIGNS[encoder]:
            if start + sign in file.shapes:
                nested = NESTED if encoder != "t5xxl" and not sign.startswith(NESTED) else ""
                names = [name.removeprefix(start) for name in file.shapes if name.startswith(start)]
                return {_nested(name, nested): start + name for name in names}
    raise CheckpointError(f"--{encoder} {file.path}: holds no {TITLES[encoder]} text encoder. Give the file of one.")


def _nested(name: str, level: str) -> str:
    return name if name.startswith(("text_projection", "logit_scale")) else level + name


def _check_clips(parts: Mapping[str, TensorSource], tensors: Mapping[str, Stored]) -> None:
    """Raise CheckpointError where the widths show that CLIP-L and CLIP-G are not those of the denoiser."""
    from library.models.layout import mmdit
    from library.models.sd3_files import EMBEDDED

    def width(name: str) -> int | None:
        stored = tensors.get(name)
        return None if stored is None else stored.file.shapes[stored.name][1]

    ends = "text_model.embeddings.token_embedding.weight"
    small, large = (width(EMBEDDED[name] + ends) for name in TEXTS[:2])
    wanted = width(f"{mmdit.PREFIX}y_embedder.mlp.0.weight")
    if small is None or large is None:
        return
    if small > large:
        raise CheckpointError("--clip_l and --clip_g: the first is wider than the second. They seem to be swapped.")
    if small + large != wanted:
        raise CheckpointError(
            f"{parts['dit'].path}: takes text of width {wanted}, not CLIP-L of {small} and CLIP-G of {large}. "
            "Give the model's own."
        )


def work(argv: Sequence[str]) -> None:
    """Pack as the arguments say. Raises: UserError."""
    pack(
        command_line.read(
            argv,
            prog="merge_sd3_safetensors.py",
            description="Put the parts of an SD3 or SD3.5 model into one file.",
            group=PackOptions,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(work, lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
