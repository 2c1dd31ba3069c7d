"""Three low-rank updates for the query, key and value that one Linear computes together: split_qkv of SD3.

In files they are one module of three times the rank: lora_down's are stacked, lora_up's stand on the diagonal, and
alpha counts three times, so that alpha / rank is what was trained with and any reader gets the trained strength.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import CheckpointError
from library.models.family import LoraTarget
from networks import merging
from networks.files import ALPHA, StoredModule
from networks.layers import Dropout, LayerMaker, LoraLayer

log = logging.getLogger(__name__)

PARTS = 3  # query, key, value
UP = "lora_up.weight"
_QKV = re.compile(r".*_block_attn2?_qkv")
_SAME = 1e-3  # relative; alphas are rounded in files of 16 bits


class SplitQkvLayer(LoraLayer):
    """A LoRA layer whose query, key and value each have their own pair.

    Tensors while training: lora_down.weight (3R, in) and lora_up.weight (out, R), each the three stacked; alpha (),
    three times that of one. In its state, as in files: lora_up.weight (out, 3R), zero beside the diagonal's blocks.
    """

    def __init__(
        self, target: LoraTarget, rank: int, alpha: float | None, dropout: Dropout, multiplier: float = 1.0
    ) -> None:
        """Make a layer that changes nothing yet; see `LoraLayer`.

        Args:
            target: a Linear whose outputs are query, key and value, one behind the other.
            rank: of each of the three.
            alpha: strength in units of 1/rank; None or 0: as if it were rank.
            dropout: used in training mode only; a rank of one of the three is dropped by itself.
            multiplier: strength of the whole update.
        """
        super().__init__(target, PARTS * rank, PARTS * (alpha or rank), dropout, multiplier)
        num_outputs = self.lora_up.weight.shape[0]
        assert num_outputs % PARTS == 0, f"{target.name} has {num_outputs} outputs, no three parts of one size"
        self.lora_up = nn.Linear(rank, num_outputs, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_state_dict_post_hook(_fuse)
        self.register_load_state_dict_pre_hook(_split)

    def delta_norm(self) -> Tensor:
        """Return the Frobenius norm of the update without its scale, float32, on the weights' device."""
        pairs = zip(self.lora_down.weight.chunk(PARTS), self.lora_up.weight.chunk(PARTS), strict=True)
        return torch.stack([merging.delta_norm(down, up) for down, up in pairs]).square().sum().sqrt()

    def _update(self, x: Tensor) -> Tensor:
        hidden = self.lora_down(x)
        if self.training:
            hidden = self._drop(hidden)
        pairs = zip(hidden.chunk(PARTS, -1), self.lora_up.weight.chunk(PARTS), strict=True)
        return torch.cat([F.linear(part, up) for part, up in pairs], -1)


def is_qkv(target: LoraTarget) -> bool:
    """Return whether a target computes query, key and value together."""
    return _QKV.fullmatch(target.name) is not None


def split_layers(
    target: LoraTarget, rank: int, alpha: float | None, dropout: Dropout, multiplier: float = 1.0
) -> LoraLayer:
    """Return the layer of a target: three pairs for a qkv, one for any other."""
    kind: LayerMaker = SplitQkvLayer if is_qkv(target) else LoraLayer
    return kind(target, rank, alpha, dropout, multiplier)


def fused(up: Tensor) -> Tensor:
    """Return lora_up as in files, (out, 3R), of three stacked ones, (out, R)."""
    return torch.block_diag(*up.chunk(PARTS))


def parted(up: Tensor) -> Tensor | None:
    """Return the three stacked lora_up (out, R) of one as in files (out, 3R), None where it is no three."""
    rows, columns = up.shape[0] // PARTS, up.shape[1] // PARTS
    blocks = [up[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(PARTS)]
    return torch.cat(blocks) if torch.equal(torch.block_diag(*blocks), up) else None


def _fuse(layer: SplitQkvLayer, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    state[prefix + UP] = fused(state[prefix + UP])
    state[prefix + "alpha"] = state.pop(prefix + "alpha")  # as sd-scripts: behind the other two


def _split(layer: SplitQkvLayer, state: dict[str, Any], prefix: str, *_others: object) -> None:
    name = prefix + UP
    if name not in state or state[name].shape[1] != layer.rank:
        return  # reported by what loads it
    up = parted(state[name])
    if up is None:
        raise CheckpointError(
            f"{name} has values beside the three blocks of query, key and value, so it was trained without split_qkv. "
            "Leave split_qkv out of --network_args."
        )
    state[name] = up


def with_trained_strength(
    tensors: Mapping[str, Tensor], layers: Iterable[LoraLayer], origin: object
) -> Mapping[str, Tensor]:
    """Return a file's tensors with alphas under which split layers are as strong as they were trained.

    sd-scripts writes them at a third of it. Its files are known by the alpha of a qkv, which is that of the proj behind
    it; here it is three times that.
    """
    weak = {}
    for name in (layer.target.name for layer in layers if isinstance(layer, SplitQkvLayer)):
        alpha, beside = tensors.get(name + ALPHA), tensors.get(name.removesuffix("qkv") + "proj" + ALPHA)
        if alpha is not None and beside is not None:
            weak[name] = math.isclose(float(alpha), float(beside), rel_tol=_SAME)
    if not weak or not all(weak.values()):
        return tensors
    names = {layer.target.name + ALPHA for layer in layers if isinstance(layer, SplitQkvLayer)}
    log.info("%s: its split qkv are stored at a third of the strength that they were trained with; restored", origin)
    return {name: tensor * PARTS if name in names else tensor for name, tensor in tensors.items()}


def warn_of_weak(modules: Mapping[str, StoredModule], origin: object) -> None:
    """Log a warning where a file's split qkv are a third as strong as they were trained, as sd-scripts writes them."""
    for name, module in modules.items():
        beside = modules.get(name.removesuffix("qkv") + "proj")
        if not _QKV.fullmatch(name) or beside is None or module.rank != PARTS * beside.rank:
            continue
        if math.isclose(module.alpha, beside.alpha, rel_tol=_SAME) and parted(module.up) is not None:
            log.warning(
                "%s: sd-scripts wrote it with split_qkv, so its query, key and value (%s) act with a third of the "
                "strength that they were trained with. They are taken as they are, as every reader does",
                origin,
                name,
            )
            return
