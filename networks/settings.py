"""What --network_dim, --network_alpha, --network_dropout and --network_args ask of a LoRA, of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from library.errors import OptionError, did_you_mean
from library.models.family import LoraTarget
from networks import blocks
from networks.blocks import BlockLayout
from networks.layers import Dropout

Number = TypeVar("Number", int, float)

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0

RANK_KEYS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
LR_WEIGHT_KEYS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
DROPOUT_KEYS = ("dropout", "rank_dropout", "module_dropout")
LORA_PLUS_KEYS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
BLOCK_KEYS = (*RANK_KEYS[2:], *LR_WEIGHT_KEYS, "block_lr_zero_threshold")  # lists with an entry for each block
KEYS = (*RANK_KEYS, *LR_WEIGHT_KEYS, "block_lr_zero_threshold", *DROPOUT_KEYS, *LORA_PLUS_KEYS)


# Keys of networks.lora_sd3, which adapts more of SD3 than the others and sets ranks by kind of layer.
TYPE_KEYS = tuple(f"{side}_{part}_dim" for side in ("context", "x") for part in ("attn", "mlp", "mod"))
SD3_KEYS = (*TYPE_KEYS, "emb_dims", "train_block_indices", "split_qkv", "train_t5xxl", "verbose")
OF_SD3: Mapping[str, str] = dict.fromkeys(SD3_KEYS, "it is of networks.lora_sd3.")
ON_DEMAND = ("embedding", "t5")  # kinds of LoraTarget that get a LoRA only where a module's own argument asks for it


@dataclass(frozen=True)
class Arguments:
    """The --network_args that a network module takes."""

    module: str  # "networks.lora"
    keys: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)  # keys of other modules, and why this one has them not
    of_file: tuple[str, ...] = RANK_KEYS  # the keys that have no effect where a file tells what the network is like

    def given(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that have a value; None counts as absent.

        Raises:
            OptionError: one that the module does not take.
        """
        given = {key: value for key, value in arguments.items() if value is not None}
        for key in given:
            if key in self.refused:
                raise OptionError(
                    f'--network_args: {self.module} cannot have "{key}": {self.refused[key]} Leave it out.'
                )
            if key not in self.keys:
                raise OptionError(
                    f'--network_args: {self.module} has no "{key}".{did_you_mean(key, self.keys)} '
                    f"It knows {', '.join(self.keys)}."
                )
        return given


LORA = Arguments("networks.lora", KEYS, OF_SD3)


@dataclass(frozen=True)
class Size:
    """Rank and alpha of one kind of module, possibly other ones for each block of the U-Net."""

    rank: int
    alpha: float
    block_ranks: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None

    def at(self, block: int | None) -> tuple[int, float]:
        """Return rank and alpha for a block; None: a module that belongs to none, such as a text encoder's."""
        rank = self.rank if block is None or self.block_ranks is None else self.block_ranks[block]
        alpha = self.alpha if block is None or self.block_alphas is None else self.block_alphas[block]
        return rank, alpha


@dataclass(frozen=True)
class LoraPlus:
    """How much faster lora_up learns than lora_down (LoRA+, arXiv:2402.12354); None: as fast."""

    unet: float | None = None
    text_encoder: float | None = None

    def ratio(self, group: str) -> float | None:
        """Return the ratio for a LoraTarget's group."""
        return self.unet if group == "unet" else self.text_encoder


@dataclass(frozen=True)
class Settings:
    """A network's shape and how it learns."""

    size: Size = Size(DEFAULT_RANK, DEFAULT_ALPHA)  # Linear and 1x1 convolutions
    conv_size: Size | None = None  # larger kernels; None: these, and all of the resnets, are left alone
    lr_weights: tuple[float, ...] | None = None  # one per block; None: the U-Net is one parameter group
    dropout: Dropout = field(default_factory=Dropout)
    lora_plus: LoraPlus = field(default_factory=LoraPlus)
    is_rate_by_encoder: bool = False  # each text encoder is a parameter group even where their rates are the same
    is_listed: bool = False  # every layer is to be named in the log

    def size_of(self, target: LoraTarget) -> tuple[int, float]:
        """Return rank and alpha for a target; rank 0: it gets no LoRA."""
        if target.kind in ON_DEMAND:
            return 0, 0.0
        size = self.conv_size if has_large_kernel(target) else self.size
        if size is None or (target.kind == "resnet" and self.conv_size is None) or self.lr_weight(target) == 0:
            return 0, 0.0
        return size.at(target.block if target.group == "unet" else None)

    def lr_weight(self, target: LoraTarget) -> float:
        """Return the factor on a target's learning rate."""
        if self.lr_weights is None or target.group != "unet" or target.block is None:
            return 1.0
        return self.lr_weights[target.block]


def has_large_kernel(target: LoraTarget) -> bool:
    """Return whether the target is a convolution other than 1x1, which conv_dim applies to."""
    return math.prod(getattr(target.module, "kernel_size", (1,))) > 1


def read(
    dim: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    layout: BlockLayout | None,
    known: Arguments = LORA,
) -> Settings:
    """Return the settings that the options ask for.

    Args:
        dim: --network_dim; None: 4.
        alpha: --network_alpha; None: 1.
        neuron_dropout: --network_dropout.
        arguments: --network_args by key; values as strings or already of their type; None counts as absent.
        layout: the model's blocks; None: it has no numbered blocks.
        known: the arguments that the network module takes.

    Raises:
        OptionError: an unknown key, or a value that does not fit.
    """
    given = known.given(arguments)
    size = Size(DEFAULT_RANK if dim is None else dim, DEFAULT_ALPHA if alpha is None else alpha)
    if size.rank < 1:
        raise OptionError(f"--network_dim must be at least 1, got {size.rank}.")
    conv_dim = number(given, "conv_dim", int)
    conv_alpha = number(given, "conv_alpha", float)
    if conv_dim is not None and conv_dim < 1:
        raise OptionError(
            f"--network_args: conv_dim must be at least 1, got {conv_dim}. Leave it out for no LoRA there."
        )
    conv_size = None if conv_dim is None else Size(conv_dim, DEFAULT_ALPHA if conv_alpha is None else conv_alpha)
    if any(key in given for key in RANK_KEYS[2:]):
        size, conv_size = _block_sizes(given, layout, size, conv_size, conv_alpha)
    if conv_alpha is not None and conv_size is None:
        raise OptionError("--network_args: conv_alpha needs conv_dim or conv_block_dims.")
    return Settings(
        size=size,
        conv_size=conv_size,
        lr_weights=_lr_weights(given, layout),
        dropout=_dropout(given, neuron_dropout),
        lora_plus=_lora_plus(given),
    )


def check(
    dim: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    known: Arguments = LORA,
) -> Settings:
    """Return the settings that need no model to be understood; lists by block, which wait for its blocks, left out.

    Raises:
        OptionError: an unknown key, or a value that does not fit.
    """
    later = {key for key in BLOCK_KEYS if arguments.get(key) is not None}
    if "conv_block_dims" in later:
        later.add("conv_alpha")  # which is right beside it
    sooner = {key: value for key, value in arguments.items() if key not in later}
    return read(dim, alpha, neuron_dropout, sooner, None, known)


def _block_sizes(
    given: Mapping[str, Any], layout: BlockLayout | None, size: Size, conv_size: Size | None, conv_alpha: float | None
) -> tuple[Size, Size | None]:
    blocks_of = _layout(layout, "block_dims")
    size = Size(
        size.rank,
        size.alpha,
        _list(given, "block_dims", int, blocks_of.num_blocks),
        _list(given, "block_alphas", float, blocks_of.num_blocks),
    )
    conv_ranks = _list(given, "conv_block_dims", int, blocks_of.num_blocks)
    conv_alphas = _list(given, "conv_block_alphas", float, blocks_of.num_blocks)
    if conv_ranks is None and conv_alphas is not None and conv_size is None:
        raise OptionError("--network_args: conv_block_alphas needs conv_dim or conv_block_dims.")
    if conv_size is not None or conv_ranks is not None:
        rank, alpha = (conv_size.rank, conv_size.alpha) if conv_size else (0, conv_alpha or DEFAULT_ALPHA)
        conv_size = Size(rank, alpha, conv_ranks, conv_alphas)
    return size, conv_size


def _lr_weights(given: Mapping[str, Any], layout: BlockLayout | None) -> tuple[float, ...] | None:
    threshold = number(given, "block_lr_zero_threshold", float)
    if not any(key in given for key in LR_WEIGHT_KEYS):
        if threshold is not None:
            raise OptionError(f"--network_args: block_lr_zero_threshold needs one of {', '.join(LR_WEIGHT_KEYS)}.")
        return None
    known = _layout(layout, "lr weights for blocks")
    return blocks.lr_weights(
        known,
        _weights(given, "down_lr_weight", known.num_down),
        _numbers(given, "mid_lr_weight", float),
        _weights(given, "up_lr_weight", known.num_up),
        threshold or 0.0,
    )


def _dropout(given: Mapping[str, Any], neuron_dropout: float | None) -> Dropout:
    neuron = probability(given, "dropout")
    if neuron is not None and neuron_dropout is not None and neuron != neuron_dropout:
        raise OptionError(f"--network_dropout {neuron_dropout} and dropout={neuron} in --network_args disagree.")
    return Dropout(
        neuron=neuron if neuron_dropout is None else neuron_dropout,
        rank=probability(given, "rank_dropout"),
        module=probability(given, "module_dropout"),
    )


def _lora_plus(given: Mapping[str, Any]) -> LoraPlus:
    general, unet, text_encoder = (number(given, key, float) for key in LORA_PLUS_KEYS)
    return LoraPlus(general if unet is None else unet, general if text_encoder is None else text_encoder)


def _layout(layout: BlockLayout | None, what: str) -> BlockLayout:
    if layout is None:
        raise OptionError(f"--network_args: this model has no numbered blocks, so {what} cannot be set. Leave it out.")
    return layout


def number(given: Mapping[str, Any], key: str, kind: Callable[[str], Number]) -> Number | None:
    """Return an argument's number; None where it is not given. Raises: OptionError naming the key."""
    return _parse(str(given[key]), key, kind) if key in given else None


def probability(given: Mapping[str, Any], key: str) -> float | None:
    """Return an argument's number in [0, 1); None where it is not given. Raises: OptionError naming the key."""
    value = number(given, key, float)
    if value is not None and not 0 <= value < 1:
        raise OptionError(f"--network_args: {key} must be in [0, 1), got {value}.")
    return value


def _list(given: Mapping[str, Any], key: str, kind: Callable[[str], Number], length: int) -> tuple[Number, ...] | None:
    values = _numbers(given, key, kind)
    if values is not None and len(values) != length:
        raise OptionError(f"--network_args: {key} must have {length} entries, one per block, got {len(values)}.")
    if values is not None and min(values) < 0:
        raise OptionError(f"--network_args: {key} must not be negative, got {min(values)}. 0 leaves a block out.")
    return values


def _numbers(given: Mapping[str, Any], key: str, kind: Callable[[str], Number]) -> tuple[Number, ...] | None:
    if key not in given:
        return None
    return tuple(_parse(entry.strip() or "0", key, kind) for entry in _text(given[key]).split(","))


def _weights(given: Mapping[str, Any], key: str, length: int) -> tuple[float, ...] | None:
    if key in given and "," not in _text(given[key]):  # as sd-scripts: a single word is a preset, never a number
        return blocks.preset(_text(given[key]), length, f"--network_args: {key}")
    return _numbers(given, key, float)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _parse(text: str, key: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise OptionError(f'--network_args: {key} must be {wanted}, got "{text}".') from None
