"""LoRA files merged into SDXL models and with each other, whichever tool named their modules."""

import json
from pathlib import Path

import pytest
import torch
from lora_samples import (
    delta,
    deltas,
    linear_sum,
    metadata_of,
    reference_file,
    worst_error,
    write_random,
)
from lora_samples import merge_for_sdxl as merge
from lora_samples import refusal_for_sdxl as refusal
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15, tiny_sd21, tiny_sdxl

from library.models.checkpoint import open_tensors
from library.models.sd import Sd
from library.models.sdxl import Sdxl
from networks import merge_lora, oft, sdxl_merge_lora
from networks.checkpoint_places import SDXL, places
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A LoRA for everything in the tiny SDXL that one can adapt."""
    return write_random(tmp_path_factory.mktemp("lora") / "whole.safetensors", tiny_sdxl(), kind=SDXL, conv=True)


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


def test_nothing_is_left_open_in_the_places_of_the_tiny_model(whole):
    assert set(modules_in(load_file(whole), "")) == set(places(open_tensors(tiny_sdxl()), SDXL))


# ---- rotations -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
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
