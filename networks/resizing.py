"""LoRA files brought to another rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.progress import progress
from networks import merging
from networks.combining import is_large_convolution
from networks.files import StoredModule
from networks.lora_file import DYNAMIC, sizes

log = logging.getLogger(__name__)

NAMINGS = (  # of the two factors; alpha stands beside them
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("down.weight", "up.weight"),
)


def _by_ratio(s: Tensor, param: float) -> int:
    return int((s > s[0] / param).sum())


def _by_energy(s: Tensor, param: float) -> int:
    return _first_reaching(s.square(), param**2)


def _by_sum(s: Tensor, param: float) -> int:
    return _first_reaching(s, param)


def _first_reaching(values: Tensor, share: float) -> int:
    cumulative = values.cumsum(0) / values.sum()
    return int(torch.searchsorted(cumulative, torch.tensor(share, dtype=values.dtype))) + 1


METHODS: Mapping[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": _by_ratio,  # keeps values above the largest / param
    "sv_fro": _by_energy,  # until the Frobenius norm reaches the share param
    "sv_cumulative": _by_sum,  # until the sum reaches the share param
}


@dataclass(frozen=True)
class Resizing:
    """To which ranks."""

    rank: int  # of linear layers and 1x1 convolutions; with a method the largest allowed
    conv_rank: int  # of larger convolutions
    method: str | None  # one of METHODS
    param: float | None
    device: torch.device

    def rank_of(self, s: Tensor, is_large_convolution: bool) -> int:
        """Return the rank to keep for singular values, (R,) falling."""
        limit = min(self.conv_rank if is_large_convolution else self.rank, len(s))
        if s[0] == 0:
            return 1
        if self.method is None or self.param is None:
            return limit
        return max(1, min(METHODS[self.method](s, self.param) + 1, limit))  # as sd-scripts: one more than needed


@dataclass(frozen=True)
class Resized:
    """A file's tensors at their new ranks."""

    tensors: Mapping[str, Tensor]
    old: tuple[StoredModule, ...]
    new: tuple[StoredModule, ...]


def resize(tensors: Mapping[str, Tensor], settings: Resizing, origin: object, verbose: bool) -> Resized:
    """Return a LoRA file's tensors at other ranks, under the same names; what belongs to no pair stays.

    alpha / rank stays as it is, so that the strength does.

    Args:
        tensors: by name, in one of NAMINGS.
        settings: the ranks.
        origin: the file, for messages.
        verbose: log a line for each module.

    Raises: CheckpointError where there is no pair, or a module cannot be resized.
    """
    pairs = _pairs(tensors, origin)
    written = dict(tensors)
    old, new, lines = [], [], []
    for base, (down_name, up_name) in progress(pairs.items(), label="resize", unit="module"):
        alpha = tensors.get(f"{base}alpha")
        down, up = tensors[down_name], tensors[up_name]
        before = StoredModule(down.float(), up.float(), float(down.shape[0] if alpha is None else alpha))
        if not (before.down.isfinite().all() and before.up.isfinite().all()):
            raise CheckpointError(f"{origin}: {base[:-1]} holds numbers that are infinite or none at all (NaN).")
        after, line = _resized(before, settings)
        written |= {down_name: after.down, up_name: after.up, f"{base}alpha": torch.tensor(after.alpha)}
        old.append(before)
        new.append(after)
        lines.append(f"{base[:-1]}: {line}")
    smaller = [module for module in old if module.rank < _asked(module, settings)]
    if smaller and settings.method is None:
        log.info(
            "%d of %d modules have a lower rank than asked for, %s, and keep it",
            len(smaller),
            len(old),
            ", ".join(map(str, sorted({module.rank for module in smaller}))),
        )
    if verbose:
        for text in lines:
            log.info("%s", text)
    return Resized(written, tuple(old), tuple(new))


def _asked(module: StoredModule, settings: Resizing) -> int:
    return settings.conv_rank if is_large_convolution(module) else settings.rank


def _pairs(tensors: Mapping[str, Tensor], origin: object) -> dict[str, tuple[str, str]]:
    """Return the names of each module's factors by what stands before them, its last character being the dot."""
    pairs = {}
    for down_name, tensor in tensors.items():
        for down_ending, up_ending in NAMINGS:
            base = down_name.removesuffix(down_ending)
            if base == down_name or not base.endswith("."):
                continue
            up = tensors.get(base + up_ending)
            if up is None:
                raise CheckpointError(f"{origin}: {base}{up_ending} is missing.")
            if up.dim() not in {2, 4} or tensor.dim() not in {2, 4} or up.shape[1] != tensor.shape[0]:
                raise CheckpointError(
                    f"{origin}: {base[:-1]} is no LoRA pair ({tuple(tensor.shape)}, {tuple(up.shape)})."
                )
            pairs[base] = (down_name, base + up_ending)
            break
    if not pairs:
        raise CheckpointError(f"{origin}: holds no LoRA (its first entry: {next(iter(tensors), 'none')}).")
    return pairs


def _resized(module: StoredModule, settings: Resizing) -> tuple[StoredModule, str]:
    """Return the module at its new rank, and a line about what it keeps."""
    u, s, vh = (part.cpu() for part in merging.singular(module.down.to(settings.device), module.up.to(settings.device)))
    rank = settings.rank_of(s, is_large_convolution(module))
    scale = module.alpha / module.rank
    down, up = merging.cut((u, s, vh), rank)
    down, up = merging.shaped(down, up, tuple(module.down.shape[1:]))
    kept_sum = 1.0 if s.sum() == 0 else (s[:rank].sum() / s.sum()).item()
    kept_norm = math.sqrt(max(0.0, 1 - merging.residual(s, rank) ** 2))
    spread = (s[0] / s[rank - 1]).item() if s[rank - 1] > 0 else math.inf
    line = (
        f"rank {module.rank} -> {rank}, keeps {kept_sum:.1%} of the sum of singular values and {kept_norm:.1%} of the "
        f"norm, largest / smallest kept {spread:.1f}"
    )
    return StoredModule(down, up, scale * rank), line


def header(metadata: Mapping[str, str], done: Resized, settings: Resizing) -> dict[str, str]:
    """Return a file's metadata for its new ranks: ss_training_comment says how it was resized."""
    if not metadata:
        metadata = {"ss_network_module": "networks.lora"}
    old, comment = sizes(done.old)["ss_network_dim"], metadata.get("ss_training_comment", "")
    comment = "" if comment == "None" else comment
    found = sizes([module for module in done.new if not is_large_convolution(module)] or done.new)
    if settings.method is None:
        note = f"dimension is resized from {old} to {settings.rank}"
    else:
        note = f"dynamic resize with {settings.method}: {settings.param} from {old}"
        found = {"ss_network_dim": DYNAMIC, "ss_network_alpha": DYNAMIC}
    return {**metadata, "ss_training_comment": f"{note}; {comment}", **found}
