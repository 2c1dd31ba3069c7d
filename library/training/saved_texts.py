"""Text encoders written at the end of a run, with what was trained on them in their weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import OptionError
from library.models.family import Parts
from library.training.saving import saved_file
from networks.lora_file import open_adapter

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from library.options import Options

log = logging.getLogger(__name__)

OWN_MODULES = "networks."  # whose files can be merged tensor by tensor


def check(options: Options, family: ModelFamily) -> None:
    """Raise OptionError where text encoders are to be saved that a foreign network changes in its own way."""
    module = options.network.network_module or ""
    if family.saved_texts and not options.network.network_train_unet_only and not module.startswith(OWN_MODULES):
        raise OptionError(
            f"--save_clip and --save_t5xxl cannot merge what {module} trains into text encoders. "
            "Leave them out, or add --network_train_unet_only."
        )


@torch.no_grad()
def save(options: Options, family: ModelFamily, denoiser: nn.Module, trained: Path, dtype: torch.dtype) -> list[Path]:
    """Return the files of the text encoders that the family is to save, none where it is to save none.

    The text encoders are loaded anew, so that it does not matter where those of the run are, or whether they are still
    there; the files of --base_weights and the trained network are merged into them.

    Args:
        options: what the run was asked to do.
        family: loads the text encoders and names their tensors.
        denoiser: of the run.
        trained: the network's file; those of the text encoders stand beside it.
        dtype: of what is written.

    Raises: UserError when the disk is full.
    """
    if not family.saved_texts:
        return []
    checkpoint = options.model.pretrained_model_name_or_path or ""
    text_encoders = family.load_text_encoders(checkpoint, dtype)
    targets = {
        target.name: target.module
        for target in family.lora_targets(Parts(denoiser, text_encoders, None))
        if target.group == "text_encoder"
    }
    for file, multiplier in _merged(options, trained):
        for name, stored in open_adapter(file).modules.items():
            if name in targets:
                weight = targets[name].weight
                assert isinstance(weight, torch.Tensor)
                weight.copy_(stored.merged(weight, multiplier))
    written = []
    for name, tensors in family.text_tensors(text_encoders).items():
        path = trained.with_name(f"{trained.stem}_{name}.safetensors")
        with saved_file(path) as partial:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, {"format": "pt"})
        log.info("saved %s (%.1f MB)", path, path.stat().st_size / 1e6)
        written.append(path)
    return written


def _merged(options: Options, trained: Path) -> Iterator[tuple[Path, float]]:
    multipliers: Sequence[float] = options.network.base_weights_multiplier or ()
    for index, file in enumerate(options.network.base_weights or ()):
        yield Path(file), multipliers[index] if index < len(multipliers) else 1.0
    yield trained, 1.0
