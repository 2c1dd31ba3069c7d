"""Weights for the blocks of a U-Net, as lists of 12, 17, 20 or 26 numbers ("LBW")."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import OptionError
from library.models.layout import lora_names

# Positions in the full list: 0 BASE (text encoders), 1-12 IN00-IN11, 13 MID, 14-25 OUT00-OUT11.
IN, MID, OUT, TOTAL = 1, 13, 14, 26
LAYOUTS = {  # length of a list -> the positions of its numbers
    12: (0, *(IN + n for n in (4, 5, 7, 8)), MID, *(OUT + n for n in range(6))),
    17: (0, *(IN + n for n in (1, 2, 4, 5, 7, 8)), MID, *(OUT + n for n in range(3, 12))),
    20: (0, *(IN + n for n in range(9)), MID, *(OUT + n for n in range(9))),
    26: tuple(range(TOTAL)),
}
SDXL_LENGTHS = (12, 20)
HELP = 'For each of --models a list of weights of its blocks, 12, 17, 20 or 26 numbers: "[1,0.5,...]".'
_DIFFUSERS = re.compile(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)_")
_ORIGINAL = re.compile(r"lora_unet_(input|output)_blocks_(\d+)_")


@dataclass(frozen=True)
class BlockWeights:
    """One list; positions that it does not name count 1."""

    values: tuple[float, ...]

    def of(self, name: str) -> float:
        """Return the weight of a module, by its name in LoRA files; 1 for one that lies in no block."""
        position = position_of(name)
        positions = LAYOUTS[len(self.values)]
        return self.values[positions.index(position)] if position in positions else 1.0


def read_lists(texts: Sequence[str] | None, num_models: int) -> list[BlockWeights | None]:
    """Return the weights for each model; None for all without lists.

    Args:
        texts: one JSON list of numbers for each model, all of the same length.
        num_models: of --models.

    Raises: OptionError.
    """
    if texts is None:
        return [None] * num_models
    if len(texts) != num_models:
        raise OptionError(f"--lbws has {len(texts)} lists for {num_models} --models. Give one for each.")
    lists = [_read_list(text) for text in texts]
    if len({len(each.values) for each in lists}) > 1:
        raise OptionError(
            f"--lbws: the lists have {', '.join(str(len(each.values)) for each in lists)} numbers, "
            "they must be of the same length."
        )
    return list(lists)


def _read_list(text: str) -> BlockWeights:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    is_list = isinstance(values, list)
    if not is_list or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise OptionError(f'--lbws takes lists of numbers like "[1,0.5,...]", each in quotes; got {text!r}.')
    if len(values) not in LAYOUTS:
        lengths = ", ".join(map(str, LAYOUTS))
        raise OptionError(f"--lbws: a list has {len(values)} numbers, there are lists of {lengths}.")
    return BlockWeights(tuple(float(value) for value in values))


def check_family(weights: Sequence[BlockWeights | None], names: Sequence[str], origin: object) -> None:
    """Refuse lists for SDXL beside a file for SD 1.x or 2.x, the reverse, and any beside one for SD3.

    Raises: OptionError.
    """
    for each in weights:
        if each is None:
            continue
        if lora_names.family_of(names) == lora_names.SD3:
            raise OptionError(f"--lbws: there are no lists for SD3's blocks, and {origin} is for SD3. Leave it out.")
        is_for_sdxl = len(each.values) in SDXL_LENGTHS
        if any((_DIFFUSERS if is_for_sdxl else _ORIGINAL).match(name) for name in names):
            kinds = ("SDXL", "SD 1.x") if is_for_sdxl else ("SD 1.x", "SDXL")
            raise OptionError(
                f"--lbws: lists of {len(each.values)} numbers are for {kinds[0]}, and {origin} is for {kinds[1]}."
            )


def position_of(name: str) -> int | None:
    """Return a module's place among the 26, None for one that lies in no block."""
    if name.startswith("lora_te"):
        return 0
    if name.startswith(("lora_unet_mid_block_", "lora_unet_middle_block_")):
        return MID
    if found := _ORIGINAL.match(name):
        return (IN if found[1] == "input" else OUT) + int(found[2])
    found = _DIFFUSERS.match(name)
    if found is None:
        return None
    direction, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    if direction == "down":
        return IN + 3 * (level + 1) if kind == "downsamplers" else IN + 1 + 3 * level + index
    return OUT + 3 * level + (2 if kind == "upsamplers" else index)
