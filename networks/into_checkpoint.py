"""LoRA files added to the weights of a checkpoint, tensor by tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from library.errors import CheckpointError
from library.models import streaming
from library.models.checkpoint import TensorSource, open_tensors
from library.models.layout import lora_names
from library.whole_file import whole_file
from networks import files
from networks.block_weights import BlockWeights
from networks.checkpoint_places import SD2, SD3, SDXL, Kind, Place, places, sd3_version
from networks.files import StoredModule
from networks.lora_file import AdapterFile, merged_from, modelspec_of
from networks.rotation import StoredRotation

log = logging.getLogger(__name__)

V_PREDICTION = "v_pred"  # an empty tensor in SDXL models that predict velocity


@dataclass(frozen=True)
class Addition:
    """One module of a file, to be merged into a weight."""

    place: Place
    module: StoredModule | StoredRotation
    ratio: float


@dataclass(frozen=True)
class Share:
    """A LoRA file and how much of it is added."""

    lora: AdapterFile
    ratio: float
    weights: BlockWeights | None = None  # of its blocks, beside the ratio

    def ratio_of(self, name: str) -> float:
        """Return how much of a module is added."""
        return self.ratio * (self.weights.of(name) if self.weights else 1.0)


@dataclass(frozen=True)
class Target:
    """The checkpoint that is merged into."""

    path: Path  # .safetensors or .ckpt, in the original layout
    kind: Kind
    advice: Mapping[str, str]  # what to do where it is of another kind, by that kind's version


@dataclass(frozen=True)
class Output:
    """The file that is written, and its number formats."""

    path: Path  # .safetensors, or torch's own format, which holds no metadata
    work: torch.dtype  # weights that change are rounded to it before and after the sum
    saved: torch.dtype  # of floating tensors; others stay what they are
    with_metadata: bool  # describe the file in its header


def plan(file: TensorSource, target: Target, shares: Sequence[Share]) -> dict[str, list[Addition]]:
    """Return for each tensor of the checkpoint what is to be added, in the order of the files.

    Modules that the checkpoint does not have are named in a warning.

    Raises: CheckpointError where a LoRA is for another model.
    """
    found = places(file, target.kind, target.advice)
    check_modules(shares, target.kind, file.path, found)
    return assigned(shares, found)


def check_modules(shares: Sequence[Share], kind: Kind, model: Path, known: Container[str]) -> None:
    """Name the modules of files that a model does not have in a warning.

    Args:
        shares: the files.
        kind: of the model.
        model: its file, for messages.
        known: the names of its modules.

    Raises: CheckpointError where a file is for another model.
    """
    for share in shares:
        lora = share.lora
        family = lora_names.family_of(lora.modules)
        if family not in {kind.lora_family, None}:
            raise CheckpointError(
                f"{lora.path}: is for {lora_names.TITLES[str(family)]}, and {model} is {kind.title}. "
                "Give a file for that model."
            )
        surplus = [name for name in lora.modules if name not in known]
        if len(surplus) == len(lora.modules):
            raise CheckpointError(
                f"{lora.path}: none of its modules belongs to {model} (it has {surplus[0]}). Is it for another model?"
            )
        files.warn_of_names(lora.path, "modules that the model does not have, left out", surplus)


def assigned(shares: Sequence[Share], found: Mapping[str, Place]) -> dict[str, list[Addition]]:
    """Return what is to be added to each tensor of a file, in the order of the shares.

    Args:
        shares: modules that are not found are passed over.
        found: where the weights stand in the file, by module.

    Raises: CheckpointError where a module does not fit its weight.
    """
    additions: dict[str, list[Addition]] = {}
    for share in shares:
        for name, module in share.lora.modules.items():
            if name in found:
                place = found[name]
                _check_shape(share.lora.path, name, module, place)
                additions.setdefault(place.key, []).append(Addition(place, module, share.ratio_of(name)))
    return additions


def _check_shape(origin: Path, name: str, module: StoredModule | StoredRotation, place: Place) -> None:
    if isinstance(module, StoredRotation):
        num_blocks, size, _ = module.blocks.shape
        if num_blocks * size != place.shape[0]:
            raise CheckpointError(
                f"{origin}: {name} rotates {num_blocks * size} outputs, the model's layer has {place.shape[0]}. "
                "Is it for another model?"
            )
        return
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
        result = each.module.merged(part, each.ratio)
        if each.place.third is None:
            total = result
        else:
            total = total if is_own else total.clone()
            each.place.part(total).copy_(result)
        is_own = True
    return total


def merge(target: Target, shares: Sequence[Share], output: Output) -> None:
    """Write a checkpoint with LoRA files added; what they do not touch is kept.

    Raises: CheckpointError.
    """
    file = open_tensors(target.path)
    additions = plan(file, target, shares)
    header = header_for(file, target.kind, shares, output.path) if output.with_metadata else {}
    write(file, additions, output, header)


def write(
    file: TensorSource, additions: Mapping[str, Sequence[Addition]], output: Output, header: Mapping[str, str]
) -> None:
    """Write a file with additions to its tensors, tensor by tensor; those without any are kept.

    Args:
        file: what is added to.
        additions: by tensor.
        output: the file to write, and its number formats.
        header: metadata, none where output wants none; torch's own format does not hold it.

    Raises: CheckpointError where numbers do not fit the format, or it cannot be written.
    """
    model = file.path
    log.info("%s: %d of %d tensors change", model, len(additions), len(file.shapes))

    def make(name: str) -> Tensor:
        tensor = file.read(name)
        if not tensor.is_floating_point():
            return tensor
        if name not in additions:
            return tensor.to(output.saved)
        merged = added(tensor.to(output.work), additions[name]).to(output.work).to(output.saved)
        if not _is_finite(merged):
            reason = (
                "does not fit the number format after merging. Use float or bf16 for both precisions."
                if _is_finite(tensor)
                else "holds numbers that are infinite or none at all (NaN). The model is damaged."
            )
            raise CheckpointError(f"{model}: {name} {reason}")
        return merged

    if output.path.suffix == ".safetensors":
        streaming.write(output.path, _layout(file, output.saved), make, header, "merge")
    else:
        _write_pickled(output.path, {name: make(name) for name in file.shapes})
    log.info("%s: written", output.path)


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


def header_for(file: TensorSource, kind: Kind, shares: Sequence[Share], save_to: Path) -> dict[str, str]:
    """Return the modelspec.* metadata of a merged checkpoint."""
    own = files.header_of(file.path)
    says = own.get("modelspec.prediction_type")
    if says is None and kind is SD2:
        log.warning("%s does not say how it predicts; the merged file is labelled as v-prediction", file.path)
    is_v = says == "v" if says else kind is SD2 or V_PREDICTION in file.shapes
    version = sd3_version(file) if kind is SD3 else kind.version + ("_v" if is_v and kind is not SDXL else "")
    titles = merged_from([(file.path, own), *((share.lora.path, share.lora.metadata) for share in shares)])
    prediction = "v_prediction" if is_v else "epsilon"
    return modelspec_of(version, save_to, titles, is_lora=False, prediction=prediction)
