"""LoRA files merged into SDXL models and with each other, whichever tool named their modules."""

import json
from pathlib import Path

import pytest
import torch
from lora_samples import (
    delta,
    deltas,
    error_line,
    linear_sum,
    metadata_of,
    reference_file,
    worst_error,
    write_random,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15, tiny_sd21, tiny_sdxl

from library.errors import CheckpointError
from library.models.checkpoint import open_tensors
from library.models.layout import lora_names
from library.models.sd import Sd
from library.models.sdxl import Sdxl
from networks import lora, merge_lora, oft, resize_lora, sdxl_merge_lora, svd_merge_lora
from networks.checkpoint_places import SDXL, places
from networks.diffusers_names import converted
from networks.files import modules_in
from tests.models.reference import Shapes, base_keys, read

UNET = "model.diffusion_model."
TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
IN_OPENCLIP = {
    "self_attn_q_proj": ("attn.in_proj_weight", 0),
    "self_attn_k_proj": ("attn.in_proj_weight", 1),
    "self_attn_v_proj": ("attn.in_proj_weight", 2),
    "self_attn_out_proj": ("attn.out_proj.weight", None),
    "mlp_fc1": ("mlp.c_fc.weight", None),
    "mlp_fc2": ("mlp.c_proj.weight", None),
}


def merge(files, ratios, out, *more, model=None) -> dict[str, torch.Tensor]:
    into = [] if model is None else ["--sd_model", model]
    argv = [*into, "--models", *files, "--ratios", *ratios, "--save_to", out, *more]
    assert sdxl_merge_lora.main([str(each) for each in argv]) == 0
    return load_file(out)


def refusal(capsys, *argv) -> str:
    assert sdxl_merge_lora.main([str(each) for each in argv]) == 2
    return error_line(capsys.readouterr().err)


def place_in(tensors, name) -> tuple[str, int | None]:
    """Return the tensor that a module's name stands for, and which third of it, by rules of this test alone."""
    if name.startswith("lora_te2_"):
        _, _, tail = name.partition("_layers_")
        layer, _, part = tail.partition("_")
        key, third = IN_OPENCLIP[part]
        return f"{TEXT[1]}transformer.resblocks.{layer}.{key}", third
    prefix, start = (TEXT[0], "lora_te1_") if name.startswith("lora_te1_") else (UNET, "lora_unet_")
    stem = name.removeprefix(start)
    (key,) = [
        key
        for key in tensors
        if key.startswith(prefix) and key[len(prefix) :].removesuffix(".weight").replace(".", "_") == stem
    ]
    return key, None


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


def test_each_weight_gets_its_share_and_the_rest_is_kept_bit_for_bit(tmp_path, whole):
    before, after = load_file(tiny_sdxl()), merge([whole], [-0.5], tmp_path / "out.safetensors", model=tiny_sdxl())
    wanted = {name: tensor.double() for name, tensor in before.items()}
    touched = set()
    for name, module in modules_in(load_file(whole), "").items():
        key, third = place_in(before, name)
        rows = len(wanted[key]) // 3
        part = wanted[key] if third is None else wanted[key][third * rows : (third + 1) * rows]
        part -= 0.5 * delta(module).view(part.shape)
        touched.add(key)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name in touched:
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=0, atol=1e-6)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert any(name.startswith(prefix) for prefix in TEXT for name in touched)


def test_a_lora_on_a_single_projection_leaves_the_other_two_thirds_alone(tmp_path):
    name = "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"
    key = f"{TEXT[1]}transformer.resblocks.1.attn.in_proj_weight"
    before = load_file(tiny_sdxl())[key]
    width = before.shape[1]
    down, up = torch.ones(1, width), torch.ones(width, 1)
    file = tmp_path / "k.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    after = merge([file], [2], tmp_path / "out.safetensors", model=tiny_sdxl())
    first, second, last = (after[key] - before).chunk(3)
    torch.testing.assert_close(second, torch.full((width, width), 2.0))
    assert not first.any()
    assert not last.any()


def test_the_places_in_a_model_of_true_size_are_those_of_the_reference():
    found = places(Shapes(base_keys("sdxl"), ""), SDXL)
    file = read("networks/lora_keys_sdxl.json.gz")["variants"]["conv"]
    stems = [name.removesuffix(".alpha") for name in file if name.endswith(".alpha")]
    assert list(found) == stems
    for name in stems:
        out, *inner = found[name].shape
        assert file[f"{name}.lora_down.weight"][1:] == inner
        assert file[f"{name}.lora_up.weight"][0] == out


# ---- names of other tools ------------------------------------------------------------------------------------------
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


# ---- weights of blocks ---------------------------------------------------------------------------------------------
WEIGHTS = [0.5, 0.25, -1.0, 0.0, 2.0, 0.125, 3.0, 0.75, 1.5, 0.375, 4.0, -0.5]  # BASE, IN04 05 07 08, MID, OUT00-05
POSITIONS = {
    "lora_te": 0, "input_blocks_4_": 1, "input_blocks_5_": 2, "input_blocks_7_": 3, "input_blocks_8_": 4,
    "middle_block_": 5, "output_blocks_0_": 6, "output_blocks_1_": 7, "output_blocks_2_": 8, "output_blocks_3_": 9,
    "output_blocks_4_": 10, "output_blocks_5_": 11,
}  # fmt: skip


def weight_of(name: str) -> float:
    stem = name.removeprefix("lora_unet_")
    return next((WEIGHTS[position] for start, position in POSITIONS.items() if stem.startswith(start)), 1.0)


def test_block_weights_scale_what_a_model_gets(tmp_path, whole):
    lists = ["--lbws", json.dumps(WEIGHTS)]
    before = load_file(tiny_sdxl())
    plain = merge([whole], [1], tmp_path / "plain.safetensors", model=tiny_sdxl())
    after = merge([whole], [1], tmp_path / "out.safetensors", *lists, model=tiny_sdxl())
    for name in modules_in(load_file(whole), ""):
        key, _ = place_in(before, name)
        wanted = before[key] + weight_of(name) * (plain[key] - before[key])
        torch.testing.assert_close(after[key], wanted, rtol=0, atol=1e-6)


def test_block_weights_scale_what_files_add_to_each_other_once(tmp_path, whole):
    """The reference puts a weight on both factors, and so it counts squared."""
    lists = ["--lbws", json.dumps([1] * 12), json.dumps([0.5, *[0.2] * 11])]
    files = [reference_file("in_xa"), reference_file("in_xb")]
    out = tmp_path / "out.safetensors"
    merge(files, [1, 1], out, *lists)
    found, one, other = deltas(out), *map(deltas, files)
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"  # in the second file alone
    torch.testing.assert_close(found[name], 0.5 * other[name])
    torch.testing.assert_close(deltas(reference_file("out_sdxl_add_lbw"))[name], 0.25 * other[name])
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    torch.testing.assert_close(found[name], one[name] + 0.2 * other[name])


def test_a_sum_at_ratios_is_exact_where_the_reference_is_not(tmp_path):
    files, ratios = [reference_file("in_xa"), reference_file("in_xb")], [0.6, 0.4]
    wanted = linear_sum(files, ratios)
    for more in ((), ("--concat",), ("--shuffle",)):
        merge(files, ratios, tmp_path / "out.safetensors", *more)
        assert worst_error(deltas(tmp_path / "out.safetensors"), wanted) < 1e-6
    assert worst_error(deltas(reference_file("out_sdxl_concat_0.6_0.4")), wanted) > 0.5


# ---- files ---------------------------------------------------------------------------------------------------------
def test_the_merged_model_says_what_it_is(tmp_path, whole):
    out = tmp_path / "mine.safetensors"
    merge([whole], [1], out, model=tiny_sdxl())
    written = metadata_of(out)
    assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert written["modelspec.merged_from"] == "sdxl, whole"
    assert written["modelspec.prediction_type"] == "epsilon"
    assert written["modelspec.resolution"] == "1024x1024"
    merge([whole], [1], out, "--no_metadata", model=tiny_sdxl())
    assert not metadata_of(out)


def test_a_model_that_predicts_velocity_is_still_said_to(tmp_path, whole):
    model = tmp_path / "v.safetensors"
    save_file({**load_file(tiny_sdxl()), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, model)
    after = merge([whole], [1], tmp_path / "out.safetensors", model=model)
    assert after["v_pred"].shape == (0,)
    assert metadata_of(tmp_path / "out.safetensors")["modelspec.prediction_type"] == "v"


def test_precisions_are_those_asked_for(tmp_path, whole):
    after = merge([whole], [1], tmp_path / "a.safetensors", "--save_precision", "fp16", model=tiny_sdxl())
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    after = merge([whole], [1], tmp_path / "b.safetensors", "--precision", "bf16", model=tiny_sdxl())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


CASES = {
    "sd15 model": "is a Stable Diffusion 1.x model. Merge into it with networks/merge_lora.py.",
    "sd21 model": "is a Stable Diffusion 2.x model. Merge into it with networks/merge_lora.py --v2.",
    "refiner": "is an SDXL refiner",
    "sd15 lora": "is for Stable Diffusion 1.x or 2.x, and",
    "lora as model": "is a LoRA file",
    "no text encoder": "holds no text encoder where one belongs (no tensor starts with conditioner.embedders.1.model.",
    "half a text encoder": "resblocks.2.attn.in_proj_weight is missing. The file is incomplete.",
    "half a U-Net": "input_blocks.8.1.proj_in.weight is missing. The file is incomplete.",
    "no U-Net": "holds no U-Net",
    "nan in the lora": "holds numbers that are infinite or none at all (NaN)",
    "nan in the model": "The model is damaged.",
    "half a module": "lora_up.weight is missing",
    "lists of sd15": "lists of 17 numbers are for SD 1.x",
    "v2": "--v2 cannot be used",
    "too few lists": "--lbws has 2 lists for 1 --models",
    "concat": "--concat is for merging LoRA files with each other",
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_ends_in_one_line_and_nothing_is_written(capsys, tmp_path, whole, case):
    tensors, adapted = load_file(tiny_sdxl()), load_file(whole)
    drop = {
        "no text encoder": TEXT[1],
        "half a text encoder": f"{TEXT[1]}transformer.resblocks.2.attn.in_proj_weight",
        "half a U-Net": f"{UNET}input_blocks.8.1.proj_in.weight",
        "no U-Net": UNET,
    }.get(case)
    tensors = {name: tensor for name, tensor in tensors.items() if drop is None or not name.startswith(drop)}
    first = next(iter(adapted))
    if case == "nan in the model":
        key = place_in(tensors, first.partition(".")[0])[0]
        tensors[key] = tensors[key] * torch.nan
    if case == "refiner":
        tensors["conditioner.embedders.0.model.ln_final.weight"] = torch.ones(1)
    if case == "nan in the lora":
        adapted[first.partition(".")[0] + ".lora_down.weight"] *= torch.nan
    if case == "half a module":
        del adapted[first.partition(".")[0] + ".lora_up.weight"]
    model, file = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    save_file(tensors, model)
    save_file(adapted, file)
    if case == "sd15 lora":
        write_random(file, tiny_sd15())
    model = {"sd15 model": tiny_sd15(), "sd21 model": tiny_sd21(), "lora as model": file}.get(case, model)
    more = {
        "lists of sd15": ["--lbws", json.dumps([1] * 17)],
        "too few lists": ["--lbws", *[json.dumps([1] * 12)] * 2],
        "v2": ["--v2"],
        "concat": ["--concat"],
    }.get(case, [])
    out = tmp_path / "out.safetensors"
    argv = ["--sd_model", model, "--models", file, "--ratios", 1, "--save_to", out, *more]
    assert CASES[case] in refusal(capsys, *argv)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lora.safetensors", "model.safetensors"]


def test_an_sdxl_lora_after_diffusers_names_is_refused_by_the_other_tool(capsys, tmp_path, renamed):
    argv = ["--sd_model", tiny_sd15(), "--models", renamed, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert merge_lora.main([str(each) for each in argv]) == 2
    assert "is for SDXL, and" in error_line(capsys.readouterr().err)


def test_nothing_is_left_open_in_the_places_of_the_tiny_model(whole):
    assert set(modules_in(load_file(whole), "")) == set(places(open_tensors(tiny_sdxl()), SDXL))


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


# ---- rotations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_file_of_networks_oft_is_merged_as_base_weights_merge_it(tmp_path, name):
    make, command, family = {
        "sd15": (tiny_sd15, merge_lora, Sd()),
        "sdxl": (tiny_sdxl, sdxl_merge_lora, Sdxl()),
    }[name]
    parts = family.load(str(make()), None, torch.float32)
    targets = tuple(family.lora_targets(parts))
    network = oft.create_network(0.5, 4, 0.1, None, None, None, targets=targets, enable_conv="true")
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_()
    file, out = tmp_path / "oft.safetensors", tmp_path / "out.safetensors"
    network.save_weights(file, None, {})
    argv = ["--sd_model", make(), "--models", file, "--ratios", 0.5, "--save_to", out]
    assert command.main([str(each) for each in argv]) == 0
    network.merge_to(None, None, load_file(file))
    merged = family.load(str(out), None, torch.float32).denoiser.state_dict()
    for key, tensor in parts.denoiser.state_dict().items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=1e-6)
    changed = {key for key, tensor in load_file(make()).items() if not torch.equal(tensor, load_file(out)[key])}
    assert len(changed) == len(network.layers)


def test_a_rotation_of_another_width_is_refused(capsys, tmp_path):
    file = tmp_path / "oft.safetensors"
    stem = "oft_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{stem}.oft_blocks": torch.zeros(2, 3, 3), f"{stem}.alpha": torch.tensor(0.1)}, file)
    argv = ["--sd_model", tiny_sdxl(), "--models", file, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert "rotates 6 outputs, the model's layer has 64" in refusal(capsys, *argv)


def test_rotations_are_not_added_to_each_other(capsys, tmp_path):
    file = tmp_path / "oft.safetensors"
    save_file({"oft_unet_x.oft_blocks": torch.zeros(2, 3, 3), "oft_unet_x.alpha": torch.tensor(0.1)}, file)
    argv = ["--models", file, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert "networks.lora cannot read it" in refusal(capsys, *argv)
