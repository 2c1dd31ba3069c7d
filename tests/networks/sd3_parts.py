"""The parts of SD3 that a LoRA adapts, at any size, made from nothing but names and shapes."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from library.models import lora_targets
from library.models.family import LoraTarget
from tests.models.reference import read

PREFIX = "model.diffusion_model."
TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
NUM_PARTS = 3


def tree(shapes: Mapping[str, Sequence[int]], device: str = "meta") -> nn.Module:
    """Return modules in which a weight of two axes is a Linear's, and one of four a Conv2d's."""
    root = nn.Module()
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) not in {2, 4}:
            continue
        *path, leaf, _ = name.split(".")
        parent = root
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        if len(shape) == 4:
            layer: nn.Module = nn.Conv2d(shape[1], shape[0], shape[2], stride=shape[2], device=device)
        else:
            layer = nn.Linear(shape[1], shape[0], device=device)
        parent.add_module(leaf, layer)
    return _with_lists(root)


def _with_lists(module: nn.Module) -> nn.Module:
    """Return a module as a list if its parts are counted from 0, which can be asked for its length."""
    for name, child in list(module.named_children()):
        setattr(module, name, _with_lists(child))
    names = [name for name, _ in module.named_children()]
    is_list = bool(names) and names == [str(index) for index in range(len(names))]
    return nn.ModuleList(module.children()) if is_list else module


def true_size(architecture: str) -> tuple[list[nn.Module], nn.Module]:
    """Return the text encoders and the MMDiT of a real model, without memory."""
    keys = read(f"models/base_keys_{architecture}.json.gz")
    denoiser = {name.removeprefix(PREFIX): shape for name, shape in keys["required"].items() if PREFIX in name}
    return [tree(keys["text_encoder_files"][name]) for name in TEXT_ENCODERS], tree(denoiser)


def narrow_shapes(num_blocks: int = 3, width: int = 8, num_dual: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a narrow MMDiT, by name."""
    shapes = {
        "context_embedder": (width, 12),
        "t_embedder.mlp.0": (width, 6),
        "t_embedder.mlp.2": (width, width),
        "x_embedder.proj": (width, 4, 2, 2),
        "y_embedder.mlp.0": (width, 10),
        "y_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (16, width),
    }
    for block in range(num_blocks):
        for side in ("context_block", "x_block"):
            is_short = side == "context_block" and block == num_blocks - 1
            is_dual = side == "x_block" and block < num_dual
            for attention in ("attn", "attn2") if is_dual else ("attn",):
                shapes[f"joint_blocks.{block}.{side}.{attention}.qkv"] = (NUM_PARTS * width, width)
                if not is_short:
                    shapes[f"joint_blocks.{block}.{side}.{attention}.proj"] = (width, width)
            if not is_short:
                shapes[f"joint_blocks.{block}.{side}.mlp.fc1"] = (4 * width, width)
                shapes[f"joint_blocks.{block}.{side}.mlp.fc2"] = (width, 4 * width)
            modulation = 2 if is_short else 9 if is_dual else 6
            shapes[f"joint_blocks.{block}.{side}.adaLN_modulation.1"] = (modulation * width, width)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def narrow_text_shapes(width: int = 8) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of CLIP-L, CLIP-G and T5 with a layer each, by name."""
    clip_layer = "text_model.encoder.layers.0."
    clip = {f"{clip_layer}self_attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
    clip |= {f"{clip_layer}mlp.fc1.weight": (2 * width, width), f"{clip_layer}mlp.fc2.weight": (width, 2 * width)}
    t5_layer = "encoder.block.0.layer."
    t5 = {f"{t5_layer}0.SelfAttention.{part}.weight": (width, width) for part in "qkvo"}
    t5 |= {f"{t5_layer}1.DenseReluDense.{part}.weight": (2 * width, width) for part in ("wi_0", "wi_1")}
    t5 |= {f"{t5_layer}1.DenseReluDense.wo.weight": (width, 2 * width)}
    return [clip, clip, t5]


def narrow(num_blocks: int = 3) -> tuple[list[nn.Module], nn.Module]:
    """Return narrow text encoders and an MMDiT with weights."""
    torch.manual_seed(0)
    parts = [tree(shapes, "cpu") for shapes in (*narrow_text_shapes(), narrow_shapes(num_blocks))]
    for part in parts:
        part.requires_grad_(False)
    return parts[:-1], parts[-1]


def narrow_targets(num_blocks: int = 3) -> tuple[LoraTarget, ...]:
    """Return everything in them that a LoRA can adapt."""
    return tuple(lora_targets.of(*narrow(num_blocks)))
