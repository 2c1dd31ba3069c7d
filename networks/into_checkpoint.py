"""LoRA files added to the weights of a checkpoint, tensor by tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource, open_tensors
from library.whole_file import whole_file
from networks import files, merging, streaming
from networks.checkpoint_places import Place, places
from networks.files import StoredModule
from networks.lora_file import LoraFile, header_of, merged_from, modelspec_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Addition:
    """One module of a LoRA, to be added to a weight."""

    place: Place
    module: StoredModule
    scale: float  # ratio * alpha / rank


def plan(file: TensorSource, loras: Sequence[tuple[LoraFile, float]], v2: bool) -> dict[str, list[Addition]]:
    """Return for each tensor of the checkpoint what is to be added, in the order of the files.

    Modules that the checkpoint does not have are named in a warning.

    Raises: CheckpointError where a LoRA is for another model.
    """
    found = places(file, v2)
    additions: dict[str, list[Addition]] = {}
    for lora, ratio in loras:
        surplus = [name for name in lora.modules if name not in found]
        if len(surplus) == len(lora.modules):
            raise CheckpointError(
                f"{lora.path}: none of its modules belongs to {file.path} (it has {surplus[0]}). "
                "Is it for another model?"
            )
        files.warn_of_names(lora.path, "modules that the model does not have, left out", surplus)
        for name, module in lora.modules.items():
            if name not in found:
                continue
            place = found[name]
            _check_shape(lora.path, name, module, place)
            scale = ratio * module.alpha / module.rank
            additions.setdefault(place.key, []).append(Addition(place, module, scale))
    return additions


def _check_shape(origin: Path, name: str, module: StoredModule, place: Place) -> None:
    inner = tuple(module.down.shape[1:])
    fits = math.prod(inner) == math.prod(place.shape[1:]) and inner[0] == place.shape[1]
    if module.up.shape[0] != place.shape[0] or not fits:
        raise CheckpointError(
            f"{origin}: {name} adapts a layer of {module.up.shape[0]} x {' x '.join(map(str, inner))}, the model's is "
            f"{' x '.join(map(str, place.shape))}. Is it for another model?"
        )


def added(tensor: Tensor, additions: Sequence[Addition]) -> Tensor:
    """Return a checkpoint's tensor with the additions, computed in float32, in float32."""
    total = tensor.float()
    is_own = False  # it may be the file's mapped pages, or the caller's
    for each in additions:
        part = each.place.part(total)
        result = merging.merged(part, each.module.down, each.module.up, each.scale)
        if each.place.third is None:
            total = result
        else:
            total = total if is_own else total.clone()
            each.place.part(total).copy_(result)
        is_own = True
    return total


@dataclass(frozen=True)
class Precisions:
    """The number formats of a merge."""

    work: torch.dtype  # weights that change are rounded to it before and after the sum
    saved: torch.dtype


def merge(
    model: Path,
    loras: Sequence[tuple[LoraFile, float]],
    save_to: Path,
    v2: bool,
    precisions: Precisions,
    *,
    with_metadata: bool,
) -> None:
    """Write a checkpoint with LoRA files added; what they do not touch is kept.

    Args:
        model: .safetensors or .ckpt, in the original layout.
        loras: with their ratios.
        save_to: .safetensors, or torch's own format, which holds no metadata.
        v2: the model is SD 2.x.
        precisions: floating tensors are written in the second, others stay what they are.
        with_metadata: describe the file in its header.

    Raises: CheckpointError.
    """
    file = open_tensors(model)
    additions = plan(file, loras, v2)
    log.info("%s: %d of %d tensors change", model, len(additions), len(file.shapes))

    def make(name: str) -> Tensor:
        tensor = file.read(name)
        if not tensor.is_floating_point():
            return tensor
        if name not in additions:
            return tensor.to(precisions.saved)
        merged = added(tensor.to(precisions.work), additions[name]).to(precisions.work).to(precisions.saved)
        if not _is_finite(merged):
            reason = (
                "does not fit the number format after merging. Use float or bf16 for both precisions."
                if _is_finite(tensor)
                else "holds numbers that are infinite or none at all (NaN). The model is damaged."
            )
            raise CheckpointError(f"{model}: {name} {reason}")
        return merged

    if save_to.suffix == ".safetensors":
        header = header_for(model, loras, save_to, v2) if with_metadata else {}
        streaming.write(save_to, _layout(file, precisions.saved), make, header, "merge")
    else:
        _write_pickled(save_to, {name: make(name) for name in file.shapes})
    log.info("%s: written", save_to)


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(limit.isfinite()) for limit in torch.aminmax(tensor))  # NaN shows in both


def _layout(file: TensorSource, saved: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout = {}
    for name, shape in file.shapes.items():
        tensor = file.read(name)  # mapped: nothing is read of it yet
        layout[name] = (saved if tensor.is_floating_point() else tensor.dtype, shape)
    return layout


def _write_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        with whole_file(path) as partial:
            torch.save({"state_dict": dict(tensors)}, partial)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error


def header_for(model: Path, loras: Sequence[tuple[LoraFile, float]], save_to: Path, v2: bool) -> dict[str, str]:
    """Return the modelspec.* metadata of a merged checkpoint."""
    own = header_of(model)
    says = own.get("modelspec.prediction_type")
    if says is None and v2:
        log.warning("%s does not say how it predicts; the merged file is labelled as v-prediction", model)
    is_v = says == "v" if says else v2
    version = ("sd_v2" if v2 else "sd_v1") + ("_v" if is_v else "")
    titles = merged_from([(model, own), *((lora.path, lora.metadata) for lora, _ in loras)])
    return modelspec_of(version, save_to, titles, is_lora=False)
