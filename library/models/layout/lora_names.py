"""Whose LoRA a file is, by the names of its modules, and the names that SDXL's U-Net has in files of other tools.

SDXL's LoRA files name modules after the original layout, `lora_unet_input_blocks_4_1_...`. Some tools name them after
diffusers', `lora_unet_down_blocks_1_attentions_0_...`, as SD 1.x files do. Here the second kind becomes the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from library.models.layout.unet import UNetBlocks, unet_table

UNET = "lora_unet_"
SDXL_BLOCKS = UNetBlocks((0, 2, 10), 2)
SD, SDXL, SD3 = "sd", "sdxl", "sd3"
TITLES = {SD: "Stable Diffusion 1.x or 2.x", SDXL: "SDXL", SD3: "Stable Diffusion 3"}

_DIFFUSERS = re.compile(UNET + r"(down_blocks|up_blocks|mid_block)_")
_SIGNS = (  # (what some module's name starts with, whose it is)
    (SD3, re.compile(UNET + r"(joint_blocks|context_embedder|y_embedder_mlp)|lora_te3_")),
    (SDXL, re.compile(UNET + r"(input_blocks|middle_block|output_blocks)_")),
    # The finest level of SDXL has no attention, and there is no fourth.
    (SD, re.compile(rf"lora_te_|{UNET}(down_blocks_0_attentions|up_blocks_2_attentions|(down|up)_blocks_3)_")),
    # SD 1.x and 2.x have no second text encoder, and nowhere a second transformer block.
    (SDXL, re.compile(rf"lora_te[12]_|{UNET}(down_blocks|up_blocks|mid_block)_.*_transformer_blocks_[1-9]_")),
)


def family_of(names: Iterable[str]) -> str | None:
    """Return SD, SDXL or SD3, whichever names in a LoRA file show; None where they show none, or several."""
    known = list(names)
    shown = {family for family, sign in _SIGNS if any(sign.match(name) for name in known)}
    if SD3 in shown:
        shown.discard(SDXL)  # it has those two text encoders as well
    if not shown and any(_DIFFUSERS.match(name) for name in known):
        return SD
    return shown.pop() if len(shown) == 1 else None


def in_original_layout(name: str) -> str:
    """Return a module's or tensor's name as SDXL's files have it; itself if it is not named after diffusers' U-Net.

    "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" -> "lora_unet_input_blocks_4_1_proj_in.alpha"
    """
    if not _DIFFUSERS.match(name):
        return name
    stem, dot, tensor = name.removeprefix(UNET).partition(".")
    head, places = stem, _places()
    while head:
        if head in places:
            return f"{UNET}{places[head]}{stem[len(head) :]}{dot}{tensor}"
        head = head.rpartition("_")[0]
    return name


@cache
def _places() -> dict[str, str]:
    """Return the original name of each part of SDXL's U-Net by diffusers' name, both as in LoRA files."""
    return {
        library.replace(".", "_"): original.replace(".", "_") for original, library in unet_table(SDXL_BLOCKS).pairs
    }
