"""What the merging commands do with modules of LoRA files: sums, exact or of a given rank."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from library.errors import CheckpointError
from library.progress import progress
from networks import merging
from networks.block_weights import BlockWeights
from networks.files import StoredModule
from networks.lora_file import LoraFile

log = logging.getLogger(__name__)

SHUFFLE_SEED = 0  # the same files give the same result
NOTICEABLE = 0.01  # a residual from which on a warning is due
ROUNDING = 1e-5  # a residual below is none
SURPLUS = 1e-6  # a singular value below this share of the largest is float32's rounding, and adds nothing to a sum
Term = tuple[StoredModule, float]  # a module and the ratio it is added with


@dataclass(frozen=True)
class Combined:
    """A sum of modules, and what was lost when it was brought to its rank."""

    module: StoredModule
    residual: float  # of the Frobenius norm, 0 to 1


def terms_of(loras: Iterable[tuple[LoraFile, float, BlockWeights | None]]) -> dict[str, list[Term]]:
    """Return for each module name what is to be added up, in the order of the files.

    Raises: CheckpointError where files hold modules of one name and different size.
    """
    terms: dict[str, list[Term]] = {}
    for lora, ratio, weights in loras:
        if terms and not terms.keys() & lora.modules.keys():
            log.warning(
                "%s: has no module in common with the files before it; are they for different models?", lora.path
            )
        for name, module in lora.modules.items():
            known = terms.setdefault(name, [])
            if known and _size(known[0][0]) != _size(module):
                raise CheckpointError(
                    f"{lora.path}: {name} adapts a layer of {_shown(module)}, in the files before it one of "
                    f"{_shown(known[0][0])}. The files are for different models."
                )
            known.append((module, ratio * (weights.of(name) if weights else 1.0)))
    return terms


def _size(module: StoredModule) -> tuple[int, ...]:
    """Return (out, in, k, k); a Linear and a 1x1 convolution are the same thing."""
    inner = tuple(module.down.shape[1:])
    return (module.up.shape[0], *(inner if len(inner) == 3 else (*inner, 1, 1)))


def _shown(module: StoredModule) -> str:
    return " x ".join(map(str, _size(module)))


def concatenated(terms: Sequence[Term]) -> StoredModule:
    """Return the exact sum; its rank is the sum of the ranks.

    alpha / rank is that of the first term, so that a single file at ratio 1 comes out as it went in, bit for bit.
    """
    first = terms[0][0]
    scale = first.alpha / first.rank if first.alpha > 0 else 1.0
    parts = [(module.down, module.up, ratio * (module.alpha / module.rank) / scale) for module, ratio in terms]
    down, up = merging.concatenated(parts)
    return StoredModule(down, up, scale * down.shape[0])


def truncated(module: StoredModule, rank: int, scale: float, device: torch.device | None = None) -> Combined:
    """Return the best approximation of a module whose rank is at most `rank`, with alpha = scale * rank.

    Args:
        module: rank R; with R at most `rank` and the same scale it comes back as it is.
        rank: at least 1.
        scale: alpha / rank of the result, above 0.
        device: to compute on.
    """
    if module.rank <= rank and module.alpha / module.rank == scale:
        return Combined(module, 0.0)
    down, up = module.down.to(device or "cpu"), module.up.to(device or "cpu")
    u, s, vh = merging.singular(down, up)
    s = s * abs(module.alpha / module.rank)
    kept = min(rank, len(s))
    new_down, new_up = merging.cut((u, s, vh), kept, scale)
    sign = 1.0 if module.alpha >= 0 else -1.0
    new_down, new_up = merging.shaped(new_down.cpu(), sign * new_up.cpu(), tuple(module.down.shape[1:]))
    return Combined(StoredModule(new_down, new_up, scale * kept), merging.residual(s, kept))


def condensed(module: StoredModule) -> StoredModule:
    """Return a module of the lowest rank, at least 1, that does the same; itself where that is its own rank."""
    u, s, vh = merging.singular(module.down, module.up)
    kept = max(1, int((s > SURPLUS * s[0]).sum()))
    if kept == module.rank:
        return module
    down, up = merging.shaped(*merging.cut((u, s, vh), kept), tuple(module.down.shape[1:]))
    return StoredModule(down, up, module.alpha / module.rank * kept)


def merge(terms: Mapping[str, Sequence[Term]], *, concat: bool, shuffle: bool) -> dict[str, StoredModule]:
    """Return the sum of LoRA files, module by module.

    Args:
        terms: from `terms_of`.
        concat: ranks add up. Otherwise a module gets the lowest rank that holds the sum. Both are exact.
        shuffle: put the ranks of each module into another order.
    """
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    merged = {}
    for name, parts in progress(terms.items(), label="merge", unit="module"):
        module = concatenated(parts)
        if not concat and len(parts) > 1:
            module = condensed(module)
        if shuffle:
            down, up = merging.shuffled(module.down, module.up, generator)
            module = StoredModule(down, up, module.alpha)
        merged[name] = module
    before = {part.rank for parts in terms.values() for part, _ in parts}
    if max(module.rank for module in merged.values()) > max(before):
        log.info(
            "ranks of up to %d became up to %d, which the exact sum needs; resize_lora.py brings them down",
            max(before),
            max(module.rank for module in merged.values()),
        )
    return merged


def merge_by_svd(
    terms: Mapping[str, Sequence[Term]], rank: int, conv_rank: int, device: torch.device
) -> dict[str, StoredModule]:
    """Return the sum of LoRA files, each module brought to a rank, with alpha = rank.

    Args:
        terms: from `terms_of`.
        rank: of linear layers and 1x1 convolutions. A module whose sum has a lower rank gets that.
        conv_rank: of larger convolutions.
        device: to compute on.
    """
    merged, residuals = {}, {}
    for name, parts in progress(terms.items(), label="merge", unit="module"):
        module = concatenated(parts)
        wanted = conv_rank if is_large_convolution(module) else rank
        done = truncated(module, wanted, 1.0, device)
        merged[name], residuals[name] = done.module, done.residual
    report(residuals, "a larger --new_rank leaves out less")
    return merged


def is_large_convolution(module: StoredModule) -> bool:
    """Return whether a module adapts a convolution with a kernel larger than 1x1."""
    return module.down.dim() == 4 and tuple(module.down.shape[2:]) != (1, 1)


def report(residuals: Mapping[str, float], advice: str) -> None:
    """Log what a reduction of ranks left out; from 1% on it is a warning with an advice."""
    if not residuals or max(residuals.values()) < ROUNDING:
        return
    worst = max(residuals, key=lambda name: residuals[name])
    mean = sum(residuals.values()) / len(residuals)
    log.log(
        logging.WARNING if mean > NOTICEABLE else logging.INFO,
        "the chosen rank leaves out %.2f%% of a module on average, at most %.2f%% (%s); %s",
        100 * mean,
        100 * residuals[worst],
        worst,
        advice,
    )


def rounded(modules: Mapping[str, StoredModule], dtype: torch.dtype) -> dict[str, StoredModule]:
    """Return modules with their factors in a number format."""
    return {name: StoredModule(each.down.to(dtype), each.up.to(dtype), each.alpha) for name, each in modules.items()}
