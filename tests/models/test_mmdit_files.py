import pytest
import torch
from safetensors.torch import save_file

from library.errors import CheckpointError
from library.models.checkpoint import Prefixed, open_tensors
from library.models.layout import mmdit as layout
from library.models.mmdit import build, build_from_diffusers, original_shapes, original_tensors
from library.models.mmdit_files import FromDiffusers, diffusers_tensors
from tests.models.mmdit_models import LAYOUTS, inputs, narrow, tensors
from tests.tiny_models import tiny_sdxl

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8": torch.float8_e4m3fn}


def written(tmp_path, weights, name="mmdit.safetensors"):
    path = tmp_path / name
    save_file({each: tensor.contiguous() for each, tensor in weights.items()}, path)
    return open_tensors(path)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- what is read -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_is_read_and_written_as_it_was(tmp_path, name):
    weights = original_tensors(narrow(name))
    denoiser = build(Prefixed(written(tmp_path, weights), layout.PREFIX), torch.float32)
    assert denoiser.shape == narrow(name).shape
    assert denoiser.shape.name == name
    assert_same(original_tensors(denoiser), weights)
    assert not denoiser.training
    assert not any(weight.requires_grad for weight in denoiser.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_diffusers_gives_the_same_model(tmp_path, name):
    weights = tensors(narrow(name))
    denoiser = build_from_diffusers(written(tmp_path, diffusers_tensors(weights)), torch.float32)
    assert_same(tensors(denoiser), weights)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_and_positions_are_not(tmp_path, stored, dtype):
    weights = {each: tensor.to(STORED[stored]) for each, tensor in tensors(narrow()).items()}
    denoiser = build(written(tmp_path, weights), dtype)
    assert_same(denoiser.state_dict(), {n: w.to(dtype) for n, w in weights.items() if n != layout.POSITIONS})
    table = denoiser.positions.table
    assert torch.equal(table.float(), weights[layout.POSITIONS].float())
    assert denoiser(*(each.to(dtype) for each in inputs())).isfinite().all()


def test_float8_weights_with_factors_are_the_weights_they_stand_for(tmp_path):
    denoiser = narrow()
    weights, wanted = tensors(denoiser), tensors(narrow())
    layer = "joint_blocks.1.x_block.mlp.fc1"
    factor = torch.tensor(0.003)
    weights[f"{layer}.weight"] = (weights[f"{layer}.weight"] / factor).to(torch.float8_e4m3fn)
    wanted[f"{layer}.weight"] = weights[f"{layer}.weight"].float() * factor
    companions = {f"{layer}.scale_weight": factor, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    assert_same(tensors(build(written(tmp_path, weights | companions), torch.float32)), wanted)


def test_rows_of_a_diffusers_file_are_those_of_the_original_tensor(tmp_path):
    weights = tensors(narrow())
    stored = written(tmp_path, diffusers_tensors(weights))
    file = FromDiffusers(stored)
    assert file.shapes == original_shapes(stored) == {name: tuple(each.shape) for name, each in weights.items()}
    name = "joint_blocks.0.x_block.attn2.qkv.weight"
    assert torch.equal(file.rows(name, 100, 200), weights[name][100:200])


# ---- what is refused ----------------------------------------------------------------------------------------------
def without(name):
    return lambda weights: weights.pop(name)


def without_block(index):
    def change(weights):
        for name in [name for name in weights if name.startswith(f"joint_blocks.{index}.")]:
            weights.pop(name)

    return change


def with_value(name, value):
    return lambda weights: weights.update({name: value})


BLOCK = "joint_blocks.1.x_block"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("x_embedder.proj.weight"), "not have the structure .*stopped at 'x_embedder.proj.weight'"),
        (without("pos_embed"), "stopped at 'pos_embed'"),
        (without("final_layer.linear.bias"), "1 of .* MMDiT tensors are missing .first: final_layer.linear.bias"),
        (without_block(1), r"are missing \(first: joint_blocks.1.context_block"),
        (without_block(2), "not known .first: joint_blocks.1.context_block"),
        (without(f"{BLOCK}.attn.ln_k.weight"), f"missing .first: {BLOCK}.attn.ln_k.weight"),
        (with_value(f"{BLOCK}.attn.qkv.bias", torch.zeros(7)), r"attn.qkv.bias is \[7\], expected \[384\]"),
        (with_value(f"{BLOCK}.attn.qkv.weight.absmax", torch.zeros(7)), "1 tensors .* not known .*quantised"),
        (with_value(f"{BLOCK}.attn.qkv.scale_weight", torch.zeros(7)), "scale_weight holds several scales"),
        (with_value("joint_blocks.2.x_block.attn2.qkv.bias", torch.zeros(384)), "not known .*blocks.2.x_block.attn2"),
        (with_value("pos_embed", torch.zeros(1, 255, 128)), "255 positions, expected .* square"),
        (with_value("pos_embed", torch.zeros(256, 128)), "not have the structure"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_file_that_does_not_fit_says_why(tmp_path, change, words):
    weights = tensors(narrow())
    change(weights)
    with pytest.raises(CheckpointError, match=words) as refusal:
        build(written(tmp_path, weights), torch.float32)
    assert "\n" not in str(refusal.value)
    assert "mmdit.safetensors: " in str(refusal.value)


def test_what_a_diffusers_folder_lacks_goes_by_diffusers_name(tmp_path):
    weights = diffusers_tensors(tensors(narrow()))
    weights.pop("transformer_blocks.1.attn.add_k_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing \(first: transformer_blocks.1.attn.add_k_proj.weight\)"):
        build_from_diffusers(written(tmp_path, weights), torch.float32)


def test_another_kind_of_denoiser_is_refused():
    with pytest.raises(CheckpointError, match="not have the structure of SD3's MMDiT"):
        build(Prefixed(open_tensors(tiny_sdxl()), layout.PREFIX), torch.float32)
