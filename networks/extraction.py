"""A LoRA from the difference of two checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource
from library.progress import progress
from networks import combining, merging
from networks.checkpoint_places import SDXL, Kind, Place, places
from networks.files import StoredModule
from networks.lora_file import modelspec_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """How a difference becomes a LoRA."""

    dim: int
    conv_dim: int | None  # None: convolutions in resnets are left out
    min_diff: float  # text encoders are left out if no weight differs by more
    clamp_quantile: float  # 1: no clamping
    device: torch.device


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of the same structure, read one weight at a time."""

    original: TensorSource
    tuned: TensorSource
    found: Mapping[str, Place]
    dtype: torch.dtype | None

    def difference(self, name: str) -> Tensor:
        """Return tuned minus original of one weight, float32."""
        place = self.found[name]
        original, tuned = (place.part(file.read(place.key)) for file in (self.original, self.tuned))
        if self.dtype is not None:
            original, tuned = original.to(self.dtype), tuned.to(self.dtype)
        return tuned.float() - original.float()


def pair(
    original: TensorSource, tuned: TensorSource, kind: Kind, advice: Mapping[str, str], dtype: torch.dtype | None
) -> Pair:
    """Return two checkpoints to be compared.

    Args:
        original: the model before training.
        tuned: and after.
        kind: what both should be.
        advice: what to do where one is of another kind, by that kind's version.
        dtype: weights are rounded to it before they are compared; None: to none.

    Raises: CheckpointError where one is of another kind, or they differ in structure.
    """
    found, other = (places(file, kind, advice) for file in (original, tuned))
    for name in [*found, *other]:
        if name not in other or name not in found or other[name].shape != found[name].shape:
            shapes = [list(side[name].shape) if name in side else "missing" for side in (found, other)]
            raise CheckpointError(
                f"{tuned.path}: {name} is {shapes[1]}, in {original.path} {shapes[0]}. The models differ in structure."
            )
    return Pair(original, tuned, found, dtype)


def extract(models: Pair, settings: Extraction) -> dict[str, StoredModule]:
    """Return the LoRA whose addition to the original comes nearest to the tuned model; alpha is the rank.

    Raises: CheckpointError where the models do not differ, or a difference is not a number.
    """
    names = [name for name, place in models.found.items() if place.kind == "attention"]
    if settings.conv_dim is not None:
        names += [name for name, place in models.found.items() if place.kind == "resnet"]
    text = [name for name, place in models.found.items() if place.kind == "text_encoder"]
    if not all(models.difference(name).abs().max() <= settings.min_diff for name in text):  # NaN is no small one
        names = [*text, *names]
    elif text:
        log.info("no weight of the text encoder differs by more than %g: it is left out", settings.min_diff)
    modules, residuals = {}, {}
    for name in progress(names, label="extract", unit="module"):
        modules[name], residuals[name] = _module(name, models, settings)
    if not any(module.up.count_nonzero() for module in modules.values()):
        raise CheckpointError(
            f"{models.tuned.path}: has the same weights as {models.original.path}; nothing to extract."
        )
    combining.report(residuals, "a larger --dim leaves out less")
    return modules


def _module(name: str, models: Pair, settings: Extraction) -> tuple[StoredModule, float]:
    place, difference = models.found[name], models.difference(name)
    if not difference.isfinite().all():
        raise CheckpointError(f"{models.tuned.path}: {place.key} less that of the original is not a number everywhere.")
    is_large = len(place.shape) == 4 and place.shape[2:] != (1, 1)
    wanted = settings.conv_dim if is_large else settings.dim
    assert wanted is not None, name
    u, s, vh = torch.linalg.svd(difference.flatten(1).to(settings.device), full_matrices=False)
    rank = min(wanted, len(s))
    down, up = merging.cut((u, s, vh), rank)
    if settings.clamp_quantile < 1:
        down, up = _clamped(down, up, settings.clamp_quantile)
    down, up = merging.shaped(down.cpu(), up.cpu(), place.inner)
    return StoredModule(down, up, float(rank)), merging.residual(s, rank)


def _clamped(down: Tensor, up: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return both with values beyond the quantile of all magnitudes cut to it."""
    magnitudes = torch.cat([down.flatten(), up.flatten()]).abs()
    position = max(1, round(quantile * len(magnitudes)))  # torch.quantile refuses more than 16 million values
    limit = magnitudes.kthvalue(position).values
    return down.clamp(-limit, limit), up.clamp(-limit, limit)


def header(kind: Kind, settings: Extraction, save_to: Path, *, is_v: bool, with_modelspec: bool) -> dict[str, str]:
    """Return the metadata of an extracted LoRA.

    Args:
        kind: of the models.
        settings: how it was made.
        save_to: the file, its title.
        is_v: the models predict velocity.
        with_modelspec: False: only what a reader needs.
    """
    version = kind.version + ("_v" if is_v and kind is not SDXL else "")
    facts = {
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.dim),
        "ss_network_alpha": str(float(settings.dim)),
    }
    if settings.conv_dim is not None:
        arguments = {"conv_dim": settings.conv_dim, "conv_alpha": float(settings.conv_dim)}
        facts["ss_network_args"] = json.dumps(arguments)
    if not with_modelspec:
        return facts
    prediction = "v_prediction" if is_v else "epsilon"
    return facts | modelspec_of(version, save_to, None, is_lora=True, prediction=prediction)
