"""LoRA files for the commands: read whole and checked, written with what other tools look for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from library import metadata
from library.errors import CheckpointError
from library.models.layout import lora_names
from library.options.metadata import MetadataOptions
from networks import files
from networks.files import ALPHA, DOWN, UP, StoredModule
from networks.rotation import BLOCKS, StoredRotation, rotations_in

log = logging.getLogger(__name__)

OTHER_MATHS = (".lora_mid.weight", ".dora_scale")  # names that mean that the update is not up @ down alone
DYNAMIC = "Dynamic"
OFT_UNET = "oft_unet_"  # in files of networks.oft, where a LoRA has lora_unet_


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file of any kind that can be merged into a model."""

    path: Path
    modules: Mapping[str, StoredModule | StoredRotation]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class LoraFile(AdapterFile):
    """A LoRA file's content."""

    modules: Mapping[str, StoredModule]


def open_adapter(path: Path, dtype: torch.dtype = torch.float32) -> AdapterFile:
    """Return a file of networks.lora or networks.oft, its tensors rounded to dtype; modules named as in a LoRA.

    Raises: CheckpointError for a file of another kind, or one that holds numbers that are none.
    """
    tensors = files.read(path)
    if not any(name.endswith(BLOCKS) for name in tensors):
        return _lora_of(tensors, path, dtype)
    modules = {}
    for name, rotation in rotations_in(tensors, str(path)).items():
        if not rotation.blocks.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers that are infinite or none at all (NaN).")
        named = name.replace(OFT_UNET, lora_names.UNET, 1) if name.startswith(OFT_UNET) else name
        modules[named] = StoredRotation(rotation.blocks.to(dtype), rotation.alpha)
    return AdapterFile(path, modules, files.header_of(path))


def open_lora(path: Path, dtype: torch.dtype = torch.float32) -> LoraFile:
    """Return a LoRA file, its tensors rounded to dtype.

    Raises: CheckpointError for a file that is no plain LoRA, or holds numbers that are none.
    """
    return _lora_of(files.read(path), path, dtype)


def _lora_of(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> LoraFile:
    other = [name for name in tensors if name.endswith(OTHER_MATHS)]
    if other:
        raise CheckpointError(f"{path}: {other[0]} shows another method than plain LoRA, which cannot be merged here.")
    stored = files.modules_in(tensors, str(path))
    known = {name + ending for name in stored for ending in (DOWN, UP, ALPHA)}
    files.warn_of_names(path, "tensors that belong to no LoRA pair, left out", [n for n in tensors if n not in known])
    modules = {}
    for name, module in stored.items():
        if not (module.down.isfinite().all() and module.up.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are infinite or none at all (NaN).")
        modules[name] = StoredModule(module.down.to(dtype), module.up.to(dtype), module.alpha)
    return LoraFile(path, modules, files.header_of(path))


def tensors_of(modules: Mapping[str, StoredModule]) -> dict[str, Tensor]:
    """Return modules as the tensors of a file."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {name + DOWN: module.down, name + UP: module.up, name + ALPHA: torch.tensor(float(module.alpha))}
    return tensors


def write_lora(
    path: Path, modules: Mapping[str, StoredModule], dtype: torch.dtype | None, header: Mapping[str, str]
) -> None:
    """Write a LoRA file, all or nothing, with the hashes of what is in it.

    Raises: CheckpointError where it cannot be written, or the numbers do not fit the format.
    """
    write_tensors(path, tensors_of(modules), dtype, header)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, header: Mapping[str, str]
) -> None:
    """Write a LoRA file of any naming, all or nothing.

    Raises: CheckpointError where it cannot be written, or the numbers do not fit the format.
    """
    for name, tensor in tensors.items():
        if not tensor.to(dtype or tensor.dtype).isfinite().all():
            raise CheckpointError(f"{path}: {name} does not fit the number format. Use --save_precision float or bf16.")
    try:
        files.write(path, tensors, dtype, header)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error
    log.info("%s: written, %d tensors", path, len(tensors))


def sizes(modules: Iterable[StoredModule]) -> dict[str, str]:
    """Return ss_network_dim and ss_network_alpha: the one value there is, or the word Dynamic."""
    found = list(modules)
    ranks, alphas = {module.rank for module in found}, {round(module.alpha, 4) for module in found}
    return {
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else DYNAMIC,
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else DYNAMIC,
    }


def merged_header(
    modules: Mapping[str, StoredModule], sources: Sequence[LoraFile], path: Path, *, with_modelspec: bool
) -> dict[str, str]:
    """Return the metadata of a LoRA made from others.

    Args:
        modules: of the new file.
        sources: ss_v2 and ss_base_model_version are those of the first that has them.
        path: of the new file, its title.
        with_modelspec: False: only what a reader needs.
    """
    is_sd3 = lora_names.family_of(modules) == lora_names.SD3
    header = {"ss_network_module": "networks.lora_sd3" if is_sd3 else "networks.lora", **sizes(modules.values())}
    for key in ("ss_v2", "ss_base_model_version"):
        values = [source.metadata[key] for source in sources if key in source.metadata]
        if len(set(values)) > 1:
            log.warning("the files differ in %s (%s); the first is written", key, ", ".join(values))
        header |= {key: values[0]} if values else {}
    if not with_modelspec:
        return header
    version = header.get("ss_base_model_version") or _version_of(modules, is_v2=header.get("ss_v2") == "True")
    titles = merged_from([(source.path, source.metadata) for source in sources])
    return header | modelspec_of(version, path, titles, is_lora=True)


def _version_of(names: Iterable[str], *, is_v2: bool) -> str:
    """Return the base model that modules are for, by their names; "" for one that is not known here."""
    versions = {lora_names.SD: "sd_v2" if is_v2 else "sd_v1", lora_names.SDXL: "sdxl_base_v1-0"}
    return versions.get(lora_names.family_of(names) or "", "")


def merged_from(sources: Iterable[tuple[Path, Mapping[str, str]]]) -> str:
    """Return the titles of files, or their names, separated by commas."""
    return ", ".join(header.get("modelspec.title", path.stem) for path, header in sources)


def modelspec_of(
    version: str, path: Path, merged: str | None, *, is_lora: bool, prediction: str | None = None
) -> dict[str, str]:
    """Return the modelspec.* keys; none for a base model that they cannot describe.

    Args:
        version: ss_base_model_version.
        path: of the new file, its title.
        merged: what it was merged from.
        is_lora: a LoRA, or a whole checkpoint.
        prediction: "epsilon" or "v_prediction"; None: as version says.
    """
    if version not in metadata.ARCHITECTURES:
        return {}
    options = MetadataOptions(metadata_merged_from=merged)
    says_v = version.endswith("_v")
    prediction = prediction or ("v_prediction" if says_v else "epsilon")
    return metadata.modelspec(options, version, path.stem, prediction_type=prediction, is_lora=is_lora)
