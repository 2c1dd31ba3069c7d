"""SDXL's LoRA files as other tools name their modules: after diffusers' U-Net, or as diffusers itself writes them."""

from pathlib import Path

import pytest
import torch
from lora_samples import deltas, error_line, linear_sum, worst_error, write_random
from lora_samples import merge_for_sdxl as merge
from lora_samples import refusal_for_sdxl as refusal
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15, tiny_sdxl

from library.errors import CheckpointError
from library.models.layout import lora_names
from library.models.sdxl import Sdxl
from networks import lora, merge_lora, resize_lora, sdxl_merge_lora, svd_merge_lora
from networks.checkpoint_places import SDXL
from networks.diffusers_names import converted


def as_other_tools_name_it(path: Path, folder: Path) -> Path:
    """Write a LoRA file again with its U-Net's modules after diffusers' paths, which a loaded model tells."""
    parts = Sdxl().load(str(tiny_sdxl()), None, torch.float32)
    path_of = {module: name for name, module in parts.denoiser.named_modules()}
    names = {
        target.name: f"lora_unet_{path_of[target.module].replace('.', '_')}"
        for target in Sdxl().lora_targets(parts)
        if target.group == "unet"
    }
    renamed = {}
    for name, tensor in load_file(path).items():
        stem, dot, ending = name.partition(".")
        renamed[names.get(stem, stem) + dot + ending] = tensor
    assert not [name for name in renamed if "put_blocks" in name or "middle_block" in name]
    out = folder / f"{path.stem}-renamed.safetensors"
    save_file(renamed, out)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A LoRA for everything in the tiny SDXL that one can adapt."""
    return write_random(tmp_path_factory.mktemp("lora") / "whole.safetensors", tiny_sdxl(), kind=SDXL, conv=True)


@pytest.fixture(scope="module")
def renamed(whole) -> Path:
    """The same LoRA after diffusers' names."""
    return as_other_tools_name_it(whole, whole.parent)


def test_a_file_named_after_diffusers_does_the_same_to_a_model(tmp_path, whole, renamed):
    one, other = (
        merge([file], [0.7], tmp_path / f"{file.stem}-out.safetensors", model=tiny_sdxl()) for file in (whole, renamed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == other.keys()


@pytest.mark.parametrize("command", [sdxl_merge_lora, merge_lora, svd_merge_lora])
def test_files_of_both_namings_add_up(tmp_path, whole, renamed, command):
    out = tmp_path / "out.safetensors"
    argv = ["--models", whole, renamed, "--ratios", 1, 0.5, "--save_to", out]
    assert command.main([str(each) for each in argv]) == 0
    assert worst_error(deltas(out), linear_sum([whole], [1.5])) < 1e-5
    assert not [name for name in load_file(out) if "down_blocks" in name]


def test_training_begins_alike_with_either_naming(whole, renamed):
    family = Sdxl()
    parts = family.load(str(tiny_sdxl()), None, torch.float32)
    targets = tuple(family.lora_targets(parts))
    states = []
    for file in (whole, renamed):
        network, _ = lora.create_network_from_weights(1.0, file, None, None, None, targets=targets)
        network.load_weights(file)
        states.append(network.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name: tensor.shape for name, tensor in states[0].items()} == {
        name: tensor.shape for name, tensor in load_file(whole).items()
    }


def test_a_resized_file_keeps_its_names(tmp_path, renamed):
    out = tmp_path / "small.safetensors"
    assert resize_lora.main(["--model", str(renamed), "--new_rank", "1", "--save_to", str(out)]) == 0
    assert load_file(out).keys() == load_file(renamed).keys()


def test_a_module_under_both_names_is_refused(capsys, tmp_path, whole, renamed):
    both = tmp_path / "both.safetensors"
    save_file({**load_file(whole), **load_file(renamed)}, both)
    argv = ["--models", both, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert "is there a second time as lora_unet_" in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("down_blocks_0_resnets_1_conv2", "input_blocks_2_0_out_layers_3"),
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
        ("down_blocks_1_attentions_0_proj_in", "input_blocks_4_1_proj_in"),
        ("down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2", "input_blocks_8_1_transformer_blocks_9_ff_net_2"),
        ("mid_block_attentions_0_transformer_blocks_3_attn2_to_v", "middle_block_1_transformer_blocks_3_attn2_to_v"),
        ("mid_block_resnets_1_time_emb_proj", "middle_block_2_emb_layers_1"),
        ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"),
        ("up_blocks_1_attentions_2_proj_out", "output_blocks_5_1_proj_out"),
        ("up_blocks_2_resnets_2_conv_shortcut", "output_blocks_8_0_skip_connection"),
    ],
)  # fmt: skip
def test_names_after_diffusers_become_those_of_the_original_layout(diffusers, original):
    name = lora_names.in_original_layout(f"lora_unet_{diffusers}.lora_down.weight")
    assert name == f"lora_unet_{original}.lora_down.weight"


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["lora_unet_input_blocks_4_1_proj_in"], "sdxl"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"], "sdxl"),
        (["lora_unet_mid_block_attentions_0_transformer_blocks_9_ff_net_2"], "sdxl"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in"], "sd"),
        (["lora_unet_down_blocks_1_attentions_0_proj_in"], "sd"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1"], "sd"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_joint_blocks_0_x_block_attn_qkv"], "sd3"),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_input_blocks_4_1_proj_in"], None),
        (["something_else"], None),
    ],
)
def test_names_show_which_model_a_file_is_for(names, family):
    assert lora_names.family_of(names) == family


def test_an_sdxl_lora_after_diffusers_names_is_refused_by_the_other_tool(capsys, tmp_path, renamed):
    argv = ["--sd_model", tiny_sd15(), "--models", renamed, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert merge_lora.main([str(each) for each in argv]) == 2
    assert "is for SDXL, and" in error_line(capsys.readouterr().err)


# ---- files of diffusers --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def of_diffusers(tmp_path_factory):
    """A LoRA as diffusers saves it, and what it computes with: the parts with the adapters on."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    family = Sdxl()
    parts = family.load(str(tiny_sdxl()), None, torch.float32)
    models = dict(zip(("unet", "text_encoder", "text_encoder_2"), (parts.denoiser, *parts.text_encoders), strict=True))
    settings = {
        "unet": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "proj_in", "conv1"],
                           alpha_pattern={"to_q": 3}, init_lora_weights=False),
        "text_encoder": LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False),
        "text_encoder_2": LoraConfig(r=4, lora_alpha=1, target_modules=["k_proj", "fc1"], use_rslora=True,
                                     init_lora_weights=False),
    }  # fmt: skip
    torch.manual_seed(0)
    for name, model in models.items():
        model.add_adapter(settings[name])
    folder = tmp_path_factory.mktemp("diffusers")
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(models))
    return folder / "pytorch_lora_weights.safetensors", parts


def test_a_file_of_diffusers_does_to_a_model_what_it_does_there(tmp_path, of_diffusers):
    file, parts = of_diffusers
    merged = tmp_path / "out.safetensors"
    merge([file], [1], merged, model=tiny_sdxl())
    family = Sdxl()
    tokens = family.tokenize(["a cat on a mat"])
    ours = family.load(str(merged), None, torch.float32)
    plain = family.load(str(tiny_sdxl()), None, torch.float32)
    with torch.no_grad():
        theirs, found, without = (family.encode_text(each, tokens) for each in (parts, ours, plain))
    for index, text in enumerate(theirs):
        torch.testing.assert_close(found[index], text, rtol=0, atol=1e-4)
        assert (without[index] - text).abs().max() > 1e-2
    noisy, told = torch.randn(1, 4, 16, 16), {"text_embeds": theirs[2], "time_ids": torch.ones(1, 6)}
    states = torch.cat(theirs[:2], dim=-1)
    with torch.no_grad():
        outputs = [
            each.denoiser(noisy, 500, encoder_hidden_states=states, added_cond_kwargs=told).sample
            for each in (parts, ours, plain)
        ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-2


def test_training_goes_on_from_a_file_of_diffusers(of_diffusers):
    file, _ = of_diffusers
    family = Sdxl()
    parts = family.load(str(tiny_sdxl()), None, torch.float32)
    targets = tuple(family.lora_targets(parts))
    network, _ = lora.create_network_from_weights(1.0, file, None, None, None, targets=targets)
    said = network.load_weights(file)
    count = len(network.state_dict())
    assert said.endswith(f"{count} of {count} tensors loaded")
    alphas = {name: layer.alpha.item() for name, layer in ((each.target.name, each) for each in network.layers)}
    assert alphas["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == 3
    assert alphas["lora_unet_input_blocks_4_1_proj_in"] == 6
    assert alphas["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] == 3
    assert alphas["lora_te2_text_model_encoder_layers_0_mlp_fc1"] == 2  # of rank 4, rank-stabilised


def test_a_file_of_diffusers_for_sd15_has_one_text_encoder():
    names = {
        "unet.down_blocks.0.attentions.0.proj_in.lora.down.weight": torch.ones(1, 4, 1, 1),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": torch.ones(4, 1),
    }
    assert set(converted(names, {}, "x")) == {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
    }


def test_a_file_of_diffusers_with_other_maths_is_refused():
    names = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(1, 4),
        "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": torch.ones(4),
    }
    with pytest.raises(CheckpointError, match="lora_magnitude_vector shows another method than plain LoRA"):
        converted(names, {}, "x")


def test_a_header_that_hides_the_alphas_is_refused():
    names = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(1, 4)}
    with pytest.raises(CheckpointError, match="is no JSON"):
        converted(names, {"lora_adapter_metadata": "{"}, "x")
