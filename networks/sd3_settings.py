"""What the --network_args of networks.lora_sd3 ask for: ranks by kind of layer, blocks, and what else is adapted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import OptionError, did_you_mean
from library.models.family import LoraTarget
from library.models.layout import lora_names, mmdit_lora
from networks import settings
from networks.settings import (
    DROPOUT_KEYS,
    LORA_PLUS_KEYS,
    LR_WEIGHT_KEYS,
    RANK_KEYS,
    SD3_KEYS,
    TYPE_KEYS,
    Arguments,
    Settings,
    has_large_kernel,
)

JOINT_BLOCKS = f"{lora_names.UNET}joint_blocks_"
CONV_KEYS = RANK_KEYS[:2]
BY_BLOCK = (
    "SD3 has no blocks of different kinds. Ranks are set by kind of layer with context_attn_dim, context_mlp_dim, "
    "context_mod_dim, x_attn_dim, x_mlp_dim and x_mod_dim, and blocks are chosen with train_block_indices."
)
BY_RATE = "all blocks of SD3 learn at one rate. train_block_indices chooses blocks."
KNOWN = Arguments(
    "networks.lora_sd3",
    (*CONV_KEYS, *DROPOUT_KEYS, *LORA_PLUS_KEYS, *SD3_KEYS),
    {
        **dict.fromkeys(RANK_KEYS[2:], BY_BLOCK),
        **dict.fromkeys((*LR_WEIGHT_KEYS, "block_lr_zero_threshold"), BY_RATE),
    },
    of_file=(*CONV_KEYS, *(key for key in SD3_KEYS if key != "verbose")),
)
NUM_EMBEDDINGS = len(mmdit_lora.EMBEDDING_LORA)
_EMBEDDINGS = {  # name in LoRA files -> which of the numbers of emb_dims
    lora_names.UNET + path.replace(".", "_"): index
    for index, group in enumerate(mmdit_lora.EMBEDDING_LORA)
    for path in group
}
_TYPE = re.compile(JOINT_BLOCKS + r"\d+_(context|x)_block_(attn|mlp|adaLN)")
_PARTS = {"attn": "attn", "mlp": "mlp", "adaLN": "mod"}  # in names -> in arguments
_SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Sd3Settings(Settings):
    """A network's shape on SD3, and how it learns."""

    type_ranks: tuple[int | None, ...] = (None,) * len(TYPE_KEYS)  # of each of TYPE_KEYS; None: as all
    embedding_ranks: tuple[int, ...] = (0,) * NUM_EMBEDDINGS  # outside the joint blocks; 0: no LoRA there
    blocks: frozenset[int] | None = None  # the joint blocks that are adapted; None: all
    is_qkv_split: bool = False
    has_t5: bool = False

    def size_of(self, target: LoraTarget) -> tuple[int, float]:
        """Return rank and alpha for a target; rank 0: it gets no LoRA."""
        if target.kind == mmdit_lora.EMBEDDING:
            rank = self.embedding_ranks[_EMBEDDINGS[target.name]]
            if rank and has_large_kernel(target) and self.conv_size is not None:
                return self.conv_size.at(None)
            return rank, self.size.alpha
        if target.kind == mmdit_lora.T5:
            return self.size.at(None) if self.has_t5 else (0, 0.0)
        if target.group != "unet":
            return self.size.at(None)
        if self.blocks is not None and target.block not in self.blocks:
            return 0, 0.0
        given = self.type_ranks[TYPE_KEYS.index(_type_of(target.name))]
        return self.size.rank if given is None else given, self.size.alpha


def _type_of(name: str) -> str:
    """Return the key of TYPE_KEYS for a module of a joint block."""
    found = _TYPE.match(name)
    assert found is not None, name
    return f"{found[1]}_{_PARTS[found[2]]}_dim"


def read(
    dim: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    targets: Sequence[LoraTarget] | None,
    known: Arguments = KNOWN,
) -> Sd3Settings:
    """Return the settings that the options ask for; see `networks.settings.read`.

    Args:
        dim: --network_dim.
        alpha: --network_alpha.
        neuron_dropout: --network_dropout.
        arguments: --network_args by key.
        targets: what the model offers; None: there is no model yet, and only what needs none is checked.
        known: the arguments that the network module takes.

    Raises: OptionError for an unknown key, a value that does not fit, or a model of another kind.
    """
    given = known.given(arguments)
    basics = settings.read(dim, alpha, neuron_dropout, given, None, known)
    blocks = _blocks(given)
    if targets is not None:
        _check_model(targets, blocks)
        if _switch(given, "train_t5xxl"):
            _check_t5(targets)
    return Sd3Settings(
        size=basics.size,
        conv_size=basics.conv_size,
        dropout=basics.dropout,
        lora_plus=basics.lora_plus,
        is_rate_by_encoder=True,
        is_listed=_switch(given, "verbose"),
        type_ranks=tuple(_rank(given, key) for key in TYPE_KEYS),
        embedding_ranks=_embedding_ranks(given),
        blocks=blocks,
        is_qkv_split=_switch(given, "split_qkv"),
        has_t5=_switch(given, "train_t5xxl"),
    )


def _check_model(targets: Sequence[LoraTarget], blocks: frozenset[int] | None) -> None:
    present = {target.block for target in targets if target.name.startswith(JOINT_BLOCKS)}
    if not present:
        raise OptionError(
            "--network_module networks.lora_sd3 is for Stable Diffusion 3, and the model is none. Use networks.lora."
        )
    beyond = sorted((blocks or frozenset()) - present)
    if beyond:
        raise OptionError(
            f"--network_args: train_block_indices names block {beyond[0]}, the model has {len(present)} blocks, "
            f"0 to {len(present) - 1}."
        )


def _check_t5(targets: Sequence[LoraTarget]) -> None:
    """Raise OptionError where text encoders are adapted, and T5 is not among them."""
    kinds = {target.kind for target in targets if target.group == "text_encoder"}
    if kinds and mmdit_lora.T5 not in kinds:
        raise OptionError("--network_args: train_t5xxl=True, and the model has no T5. Give its file with --t5xxl.")


def _rank(given: Mapping[str, Any], key: str) -> int | None:
    rank = settings.number(given, key, int)
    if rank is not None and rank < 0:
        raise OptionError(f"--network_args: {key} must not be negative, got {rank}. 0 leaves these layers out.")
    return rank


def _embedding_ranks(given: Mapping[str, Any]) -> tuple[int, ...]:
    if "emb_dims" not in given:
        return (0,) * NUM_EMBEDDINGS
    value = given["emb_dims"]
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        ranks = tuple(int(entry) for entry in inner.split(","))
    except ValueError:
        ranks = ()
    if len(ranks) != NUM_EMBEDDINGS or min(ranks) < 0:
        raise OptionError(
            f"--network_args: emb_dims must be {NUM_EMBEDDINGS} whole numbers from 0 on like [4,4,4,4,4,4], "
            f'got "{text}". They are the ranks of context_embedder, t_embedder, x_embedder, y_embedder, '
            "final_layer.adaLN_modulation and final_layer.linear; 0 leaves one out."
        )
    return ranks


def _blocks(given: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the joint blocks that train_block_indices names, None for all of them."""
    text = str(given.get("train_block_indices", "all")).strip()
    if text.lower() == "all":
        return None
    if text.lower() in {"", "none"}:
        return frozenset()
    found: set[int] = set()
    for entry in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", entry)
        if ends is None:
            hint = did_you_mean(text.lower(), ("all", "none"))
            raise OptionError(
                '--network_args: train_block_indices must be "all", "none" or block numbers and ranges like 0,3-5, '
                f'got "{text}".{hint}'
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if first > last:
            raise OptionError(
                f"--network_args: train_block_indices has the range {first}-{last}, whose end lies before its start."
            )
        found.update(range(first, last + 1))
    return frozenset(found)


def _switch(given: Mapping[str, Any], key: str) -> bool:
    value = str(given.get(key, False)).strip()
    if value.lower() not in _SWITCHES:
        raise OptionError(f'--network_args: {key} must be True or False, got "{value}".')
    return _SWITCHES[value.lower()]
