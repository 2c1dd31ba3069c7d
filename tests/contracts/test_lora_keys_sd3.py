"""The names in LoRA files for SD3 are a contract: the lists were written by sd-scripts."""

from typing import Any

import pytest
import torch

from library.models import lora_targets, mmdit
from networks import lora, lora_sd3
from tests.models.reference import Shapes, read
from tests.networks.sd3_parts import PREFIX, true_size

RANK = 4
ARCHITECTURES = ("sd3m", "sd35m", "sd35l")
EMBEDDINGS = {"emb_dims": "[4,4,4,4,4,4]"}
VARIANTS: dict[str, tuple[bool, dict[str, str]]] = {  # name -> are the text encoders trained, network_args
    "default": (True, {}),
    "unet_only": (False, {}),
    "t5": (True, {"train_t5xxl": "True"}),
    "split_qkv": (True, {"split_qkv": "True"}),
    "emb": (True, EMBEDDINGS),
    "unet_only+emb": (False, EMBEDDINGS),
}
NUM_MODULES = {  # as sd-scripts made them
    "sd3m": {"default": 501, "unet_only": 237, "t5": 669, "split_qkv": 501, "emb": 509, "unet_only+emb": 245},
    "sd35m": {"default": 527, "unet_only": 263, "t5": 695, "split_qkv": 527, "emb": 535, "unet_only+emb": 271},
    "sd35l": {"default": 641, "unet_only": 377, "t5": 809, "split_qkv": 641, "emb": 649, "unet_only+emb": 385},
}


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    """Everything in the real models that a LoRA can adapt, without memory."""
    return {architecture: tuple(lora_targets.of(*true_size(architecture))) for architecture in ARCHITECTURES}


def frozen(architecture: str, variant: str) -> dict[str, list[int]]:
    """Return name -> shape in the order of the file."""
    return read(f"networks/lora_keys_{architecture}.json.gz")["variants"][variant]


def shapes_of(module: Any, chosen: Any, *, is_text_trained: bool, arguments: dict[str, str]) -> dict[str, list[int]]:
    """Return name -> shape of a network, in the order of its file."""
    with torch.device("meta"):
        network = module.create_network(1.0, RANK, 1.0, None, None, None, targets=chosen, **arguments)
    network.apply_to(None, None, is_text_trained, True)
    network.detach()
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_has_the_names_and_shapes_of_sd_scripts_in_their_order(
    architecture: str, variant: str, targets: dict[str, Any]
) -> None:
    is_text_trained, arguments = VARIANTS[variant]
    made = shapes_of(lora_sd3, targets[architecture], is_text_trained=is_text_trained, arguments=arguments)
    assert list(made.items()) == list(frozen(architecture, variant).items())
    assert sum(name.endswith(".alpha") for name in made) == NUM_MODULES[architecture][variant]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_denoiser_that_is_trained_has_these_layers(architecture: str, targets: dict[str, Any]) -> None:
    shapes = Shapes(read(f"models/base_keys_{architecture}.json.gz")["required"], PREFIX).shapes
    shape = mmdit.shape_of(shapes, architecture)
    with torch.device("meta"):
        denoiser = mmdit.Mmdit(shape, torch.empty(shapes["pos_embed"]))

    def described(found: Any) -> list[tuple[str, str, int | None, tuple[int, ...]]]:
        return [(t.name, t.kind, t.block, tuple(t.module.weight.shape)) for t in found if t.group == "unet"]

    assert described(lora_targets.of_mmdit(denoiser)) == described(targets[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plain_lora_adapts_the_same_modules_under_the_same_names(
    architecture: str, targets: dict[str, Any]
) -> None:
    made = shapes_of(lora, targets[architecture], is_text_trained=True, arguments={})
    assert list(made.items()) == list(frozen(architecture, "default").items())
