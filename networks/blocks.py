"""The blocks of a U-Net, and one learning-rate weight for each."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.errors import OptionError, did_you_mean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockLayout:
    """How the entries of block_dims are laid out: before, down, mid, up, after."""

    num_down: int
    num_mid: int
    num_up: int
    num_before: int = 0  # blocks without weights of their own, always 1
    num_after: int = 0

    @property
    def num_blocks(self) -> int:
        """Entries that block_dims must have."""
        return self.num_before + self.num_down + self.num_mid + self.num_up + self.num_after


# The names in the file tell which numbering their reader knows; a name without a block has no layout.
LAYOUTS: Mapping[str, BlockLayout] = {
    "lora_unet_down_blocks_": BlockLayout(12, 1, 12),
    "lora_unet_input_blocks_": BlockLayout(9, 3, 9, num_before=1, num_after=1),
}


def layout_of(names: Iterable[str]) -> BlockLayout | None:
    """Return the block numbering that goes with these LoRA names; None if their model has none."""
    for name in names:
        for prefix, layout in LAYOUTS.items():
            if name.startswith(prefix):
                return layout
    return None


# x runs from 0 at the first block of a part to 1 at its last.
PRESETS: Mapping[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda _x: 0.0,
}


def preset(text: str, length: int, option: str) -> tuple[float, ...]:
    """Return the weights of a preset such as "sine" or "sine+0.25".

    Args:
        text: name, or name+offset; the offset is added to every weight.
        length: number of blocks.
        option: named in errors.
    """
    name, plus, offset_text = (part.strip() for part in text.partition("+"))
    if name not in PRESETS:
        raise OptionError(
            f'{option} must be a comma list or a preset ({", ".join(PRESETS)}, each also with "+offset"), '
            f'got "{text}".{did_you_mean(name, PRESETS)}'
        )
    try:
        offset = float(offset_text) if plus else 0.0
    except ValueError:
        raise OptionError(f'{option}: the offset of a preset must be a number, got "{text}".') from None
    return tuple(PRESETS[name](i / max(length - 1, 1)) + offset for i in range(length))


def fit(weights: Sequence[float] | None, length: int, option: str) -> tuple[float, ...]:
    """Return exactly length weights: surplus ones are cut, missing ones are 1, each with a warning."""
    if weights is None:
        return (1.0,) * length
    if len(weights) > length:
        log.warning("%s has %d entries, the model %d blocks: the last are ignored", option, len(weights), length)
    elif len(weights) < length:
        log.warning("%s has %d entries, the model %d blocks: the others get 1", option, len(weights), length)
    return (tuple(weights) + (1.0,) * length)[:length]


def lr_weights(
    layout: BlockLayout,
    down: Sequence[float] | None,
    mid: Sequence[float] | None,
    up: Sequence[float] | None,
    zero_threshold: float = 0.0,
) -> tuple[float, ...]:
    """Return one learning-rate factor for each block; 0 where it is not above zero_threshold.

    Args:
        layout: the model's blocks.
        down: for the down blocks, from the picture's side; None: all 1.
        mid: for the middle.
        up: for the up blocks, from the middle to the picture's side.
        zero_threshold: weights up to this count as 0, which removes the block.
    """
    trained = (
        *fit(down, layout.num_down, "down_lr_weight"),
        *fit(mid, layout.num_mid, "mid_lr_weight"),
        *fit(up, layout.num_up, "up_lr_weight"),
    )
    kept = tuple(weight if weight > zero_threshold else 0.0 for weight in trained)
    return (1.0,) * layout.num_before + kept + (1.0,) * layout.num_after
