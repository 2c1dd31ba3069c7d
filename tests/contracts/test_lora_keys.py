"""The names in LoRA files are a contract: other tools find each weight by its name.

SD 1.5's lists were written by sd-scripts. SD 2.1's are frozen here, and follow from the names in a base model's file by
the rules below, which share nothing with the tables that the program uses.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from library.models import lora_targets
from networks import lora
from tests.models.reference import base_keys, full_size, read

RANK, CONV_RANK = 4, 4
VARIANTS: dict[str, tuple[bool, dict[str, str]]] = {  # name -> is the text encoder trained, network_args
    "default": (True, {}),
    "conv": (True, {"conv_dim": str(CONV_RANK), "conv_alpha": "1"}),
    "unet_only": (False, {}),
    "unet_only+conv": (False, {"conv_dim": str(CONV_RANK), "conv_alpha": "1"}),
}
NUM_MODULES = {  # as sd-scripts made them
    ("sd15", "default"): 264, ("sd15", "conv"): 350, ("sd15", "unet_only"): 192, ("sd15", "unet_only+conv"): 278,
    ("sd21", "default"): 330, ("sd21", "conv"): 416, ("sd21", "unet_only"): 192, ("sd21", "unet_only+conv"): 278,
}  # fmt: skip
IN_A_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def frozen(architecture: str, variant: str) -> dict[str, list[int]]:
    """Return name -> shape in the order of the file."""
    return read(f"networks/lora_keys_{architecture}.json.gz")["variants"][variant]


@pytest.fixture(scope="module")
def made() -> Callable[[str, str], dict[str, list[int]]]:
    """Return name -> shape of our own network over the real architecture."""
    parts = {architecture: full_size(architecture)[:2] for architecture in ("sd15", "sd21")}

    def make(architecture: str, variant: str) -> dict[str, list[int]]:
        is_text_trained, arguments = VARIANTS[variant]
        unet, text_encoder = parts[architecture]
        targets = tuple(lora_targets.of([text_encoder], unet))
        network = lora.create_network(1.0, RANK, 1.0, None, None, None, targets=targets, **arguments)
        network.apply_to(text_encoder, unet, is_text_trained, True)
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        network.detach()
        return shapes

    return make


def tensors_of(stem: str, shape: list[int], rank: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the three tensors of a module whose weight has this shape (out, in, *kernel)."""
    ones = [1] * len(shape[2:])
    yield f"{stem}.alpha", []
    yield f"{stem}.lora_down.weight", [rank, *shape[1:]]
    yield f"{stem}.lora_up.weight", [shape[0], rank, *ones]


def place_of(block: str, index: int, member: str) -> tuple[str, str]:
    """Return where diffusers has a part of Stability's U-Net: the group's name, and resnet, attention or other."""
    if block == "middle_block":
        return {"0": ("mid_block_resnets_0", "resnet"), "1": ("mid_block_attentions_0", "attention")}.get(
            member, ("mid_block_resnets_1", "resnet")
        )
    side, stage, part = ("down", *divmod(index - 1, 3)) if block == "input_blocks" else ("up", *divmod(index, 3))
    if block == "input_blocks" and part == 2:
        return f"down_blocks_{stage}_downsamplers_0", "other"
    kind = "resnets" if member == "0" else "attentions"
    return f"{side}_blocks_{stage}_{kind}_{part}", kind.removesuffix("s")


def of_the_unet(shapes: dict[str, list[int]], *, has_conv: bool) -> Iterator[tuple[str, list[int]]]:
    """Yield what a LoRA of a U-Net whose file has these names has."""
    for name, shape in shapes.items():
        pattern = r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d)\.)?(.+)\.weight"
        match = re.fullmatch(pattern, name)
        if match is None or len(shape) < 2:  # vectors are norms
            continue
        block, number, member, rest = match.groups()
        if block == "middle_block":  # its parts have no stage
            member = number
        if name.endswith("input_blocks.0.0.weight"):  # the very first convolution is not adapted
            continue
        if block == "output_blocks" and rest == "conv":  # behind the resnet, or behind resnet and attention
            place, kind, rest = f"up_blocks_{int(number) // 3}_upsamplers_0", "other", "conv"
        else:
            place, kind = place_of(block, int(number), member or "")
        if kind == "attention":
            is_point = rest in ("proj_in", "proj_out")  # SD 2.x has matrices here, and is trained on convolutions
            yield from tensors_of(
                f"lora_unet_{place}_{rest.replace('.', '_')}", [*shape[:2], 1, 1] if is_point else shape, RANK
            )
        elif has_conv:
            last = {"op": "conv"}.get(rest, rest) if kind == "other" else IN_A_RESNET[rest]
            rank = CONV_RANK if shape[2:] == [3, 3] else RANK
            yield from tensors_of(f"lora_unet_{place}_{last}", shape, rank)


def of_openclip(shapes: dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """Yield what a LoRA of SD 2.x's text encoder has: its file holds query, key and value in one matrix."""
    for name, shape in shapes.items():
        match = re.fullmatch(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)weight", name)
        if match is None or len(shape) < 2:
            continue
        stem = f"lora_te_text_model_encoder_layers_{match[1]}"
        if match[2] == "attn.in_proj":
            for part in "qkv":
                yield from tensors_of(f"{stem}_self_attn_{part}_proj", [shape[0] // 3, shape[1]], RANK)
        else:
            last = {"attn.out_proj": "self_attn_out_proj", "mlp.c_fc": "mlp_fc1", "mlp.c_proj": "mlp_fc2"}[match[2]]
            yield from tensors_of(f"{stem}_{last}", shape, RANK)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_a_file_has_the_frozen_names_and_shapes_in_their_order(architecture: str, variant: str, made: Any) -> None:
    assert list(made(architecture, variant).items()) == list(frozen(architecture, variant).items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_there_are_as_many_modules_as_in_sd_scripts(architecture: str, variant: str) -> None:
    names = frozen(architecture, variant)
    assert sum(name.endswith(".alpha") for name in names) == NUM_MODULES[architecture, variant]
    assert len(names) == 3 * NUM_MODULES[architecture, variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_lists_of_sd21_follow_from_the_names_in_its_checkpoint(variant: str) -> None:
    is_text_trained, arguments = VARIANTS[variant]
    expected = dict(of_the_unet(base_keys("sd21"), has_conv="conv_dim" in arguments))
    expected |= dict(of_openclip(base_keys("sd21"))) if is_text_trained else {}
    assert frozen("sd21", variant) == expected


@pytest.mark.parametrize("variant", ["unet_only", "unet_only+conv"])
def test_the_same_rules_give_the_lists_that_sd_scripts_made_of_sd15(variant: str) -> None:
    """Which is what makes the rules worth believing."""
    expected = dict(of_the_unet(base_keys("sd15"), has_conv="conv_dim" in VARIANTS[variant][1]))
    assert frozen("sd15", variant) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_unets_have_the_same_names_in_the_same_order(variant: str) -> None:
    lists = [[name for name in frozen(architecture, variant) if "_unet_" in name] for architecture in ("sd15", "sd21")]
    assert lists[0] == lists[1]
