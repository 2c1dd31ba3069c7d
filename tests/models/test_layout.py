import pytest
import torch

from library.models import clip, lora_targets, unet, vae
from library.models.checkpoint import build_on_meta
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout
from library.models.layout import vae as vae_layout
from library.models.layout.keys import KeyTable
from tests.models.reference import Shapes, base_keys, full_size, read


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_a_real_checkpoints_names_and_shapes_come_out_as_they_went_in(architecture):
    denoiser, text, autoencoder = full_size(architecture)
    v2 = architecture == "sd21"
    written = (
        unet.original_tensors(denoiser, linear_projection=v2)
        | vae.original_tensors(autoencoder)
        | clip.original_tensors(text, openclip=v2)
    )
    assert {name: list(tensor.shape) for name, tensor in written.items()} == base_keys(architecture)


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_every_name_of_the_unet_and_the_vae_translates_there_and_back(architecture):
    for layout in (unet_layout, vae_layout):
        shapes = Shapes(base_keys(architecture), layout.PREFIX).shapes
        blocks = layout.blocks_of(shapes)
        table = layout.unet_table(blocks) if layout is unet_layout else layout.vae_table(blocks)
        assert [table.to_original(table.to_library(name)) for name in shapes] == list(shapes)


def test_the_heads_are_8_in_sd1_and_64_wide_in_sd2():
    heads = {}
    for architecture in ("sd15", "sd21"):
        shapes = Shapes(base_keys(architecture), unet_layout.PREFIX)
        heads[architecture] = unet.config_of(shapes, architecture == "sd21")["attention_head_dim"]
    assert heads == {"sd15": 8, "sd21": [5, 10, 20, 20]}


def test_the_text_encoders_have_12_and_16_heads_and_their_own_activations():
    _, first, _ = full_size("sd15")
    _, second, _ = full_size("sd21")
    assert (first.config.num_attention_heads, first.config.hidden_act) == (12, "quick_gelu")
    assert (second.config.num_attention_heads, second.config.hidden_act) == (16, "gelu")
    assert second.config.num_hidden_layers == 23


def test_the_last_of_24_openclip_layers_is_left_out():
    shapes = dict(base_keys("sd21"))
    shapes |= read("models/base_keys_sd21.json.gz")["optional_ignored_by_kohya"]
    text = clip.build_openclip(Shapes(shapes, clip_layout.SD2_PREFIX), torch.float32)
    assert text.config.num_hidden_layers == 23


def test_sd15_lora_targets_are_the_references_in_its_order():
    denoiser, text, _ = full_size("sd15")
    targets = list(lora_targets.of([text], denoiser))
    variants = read("networks/lora_keys_sd15.json.gz")["variants"]

    def modules(variant):
        return [name.removesuffix(".alpha") for name in variants[variant] if name.endswith(".alpha")]

    assert [target.name for target in targets] == modules("conv")
    assert [target.name for target in targets if target.kind == "attention"] == modules("default")
    assert [target.name for target in targets if target.group == "unet"] == modules("unet_only+conv")
    for target in targets:
        down = variants["conv"][f"{target.name}.lora_down.weight"]
        assert list(target.module.weight.shape[1:]) == down[1:], target.name


def test_sd21_has_138_text_192_unet_and_86_resnet_targets():
    denoiser, text, _ = full_size("sd21")
    targets = list(lora_targets.of([text], denoiser))
    assert sum(target.group == "text_encoder" for target in targets) == 138
    assert sum(target.group == "unet" and target.kind == "attention" for target in targets) == 192
    assert sum(target.kind == "resnet" for target in targets) == 86


def test_sd21_projections_are_1x1_convolutions_as_the_reference_trains_them():
    denoiser, _, _ = full_size("sd21")
    projections = [target for target in lora_targets.of([], denoiser) if target.name.endswith(("proj_in", "proj_out"))]
    assert len(projections) == 32
    assert all(target.module.weight.shape[2:] == (1, 1) for target in projections)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 1),
        ("lora_unet_down_blocks_0_resnets_1_conv1", 2),
        ("lora_unet_down_blocks_1_downsamplers_0_conv", 6),
        ("lora_unet_down_blocks_3_resnets_1_conv2", 11),
        ("lora_unet_mid_block_attentions_0_proj_out", 12),
        ("lora_unet_up_blocks_0_resnets_0_conv1", 13),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", 18),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", 24),
    ],
)
def test_a_target_stands_at_its_place_among_the_25_blocks(name, block):
    denoiser, _, _ = full_size("sd15")
    assert {target.name: target.block for target in lora_targets.of([], denoiser)}[name] == block


def test_text_encoder_targets_have_no_block():
    _, text, _ = full_size("sd15")
    nothing = build_on_meta(torch.nn.Identity)
    assert {target.block for target in lora_targets.of([text], nothing)} == {None}


def test_a_longer_name_is_preferred_to_its_beginning():
    table = KeyTable((("a", "x"), ("a.b", "y")))
    assert table.to_library("a.b.weight") == "y.weight"
    assert table.to_library("a.c.weight") == "x.c.weight"
    assert table.to_library("ab.weight") is None
