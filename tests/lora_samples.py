"""LoRA files for the tests of the merging commands, and what they add to a layer."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.checkpoint import open_tensors
from networks import sdxl_merge_lora
from networks.checkpoint_places import SD1, Kind, places
from networks.files import StoredModule, modules_in
from networks.lora_file import tensors_of

MERGE_DATA = Path(__file__).resolve().parent / "data" / "merge"


def error_line(err: str) -> str:
    """Return the one line on the standard error, log messages apart, that a user's error ends with."""
    (line,) = [line for line in err.splitlines() if " INFO " not in line]
    assert line.startswith("error: ")
    return line


def reference_file(name: str) -> Path:
    """Return a file of the data that the reference implementation read or wrote."""
    return MERGE_DATA / f"{name}.safetensors"


def delta(module: StoredModule) -> Tensor:
    """Return what a module adds to its layer, (out, in * k * k) float64."""
    product = module.up.double().flatten(1) @ module.down.double().flatten(1)
    return product * (module.alpha / module.down.shape[0])


def deltas(path: Path) -> dict[str, Tensor]:
    """Return what a LoRA file adds to each layer."""
    return {name: delta(module) for name, module in modules_in(load_file(path), str(path)).items()}


def linear_sum(paths: Iterable[Path], ratios: Iterable[float]) -> dict[str, Tensor]:
    """Return the sum of ratio * delta over files: what a merge should be."""
    total: dict[str, Tensor] = {}
    for path, ratio in zip(paths, ratios, strict=True):
        for name, tensor in deltas(path).items():
            total[name] = total.get(name, torch.zeros_like(tensor)) + ratio * tensor
    return total


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def write_random(
    path: Path, checkpoint: Path, *, kind: Kind = SD1, conv: bool = False, rank: int = 2, seed: int = 0
) -> Path:
    """Write a LoRA with random numbers for every layer of a checkpoint that a LoRA can adapt; return path."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, place in places(open_tensors(checkpoint), kind).items():
        if place.kind == "resnet" and not conv:
            continue
        up_shape = (place.shape[0], rank, 1, 1) if len(place.inner) == 3 else (place.shape[0], rank)
        down = torch.randn(rank, *place.inner, generator=generator) * 0.1
        modules[name] = StoredModule(down, torch.randn(up_shape, generator=generator) * 0.1, 1.0)
    is_v2 = kind.version == "sd_v2"
    save_file(tensors_of(modules), path, {"ss_v2": str(is_v2), "ss_base_model_version": kind.version})
    return path


def worst_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest relative error, in the Frobenius norm, over modules of the same names."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


def merge_for_sdxl(files, ratios, out, *more, model=None) -> dict[str, Tensor]:
    """Return what sdxl_merge_lora.py writes to out."""
    into = [] if model is None else ["--sd_model", model]
    argv = [*into, "--models", *files, "--ratios", *ratios, "--save_to", out, *more]
    assert sdxl_merge_lora.main([str(each) for each in argv]) == 0
    return load_file(out)


def refusal_for_sdxl(capsys, *argv) -> str:
    """Return the one line in which sdxl_merge_lora.py refuses these arguments."""
    assert sdxl_merge_lora.main([str(each) for each in argv]) == 2
    return error_line(capsys.readouterr().err)
