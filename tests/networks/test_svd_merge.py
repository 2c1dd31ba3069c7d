"""LoRA files merged to a chosen rank, and weights for their blocks."""

import json

import pytest
import torch
from lora_samples import (
    deltas,
    error_line,
    linear_sum,
    metadata_of,
    reference_file,
    worst_error,
)
from safetensors.torch import load_file

from networks import svd_merge_lora
from networks.block_weights import LAYOUTS, BlockWeights, position_of

CONV = "lora_unet_mid_block_resnets_0_conv1"


def merge(tmp_path, names, ratios, *more):
    out = tmp_path / "out.safetensors"
    argv = ["--models", *map(str, map(reference_file, names)), "--ratios", *map(str, ratios), "--save_to", str(out)]
    assert svd_merge_lora.main([*argv, *map(str, more)]) == 0
    return out


@pytest.mark.parametrize(
    ("names", "ratios"),
    [(("in_a", "in_b"), (0.5, 0.5)), (("in_a", "in_c"), (1, 1)), (("in_a", "in_d"), (1, -0.5)), (("in_b",), (2,))],
)
def test_with_enough_rank_the_sum_is_exact(tmp_path, names, ratios):
    """in_d has no alpha, where the reference stops with --device; in_c has another rank."""
    out = merge(tmp_path, names, ratios, "--new_rank", 16, "--device", "cpu")
    assert worst_error(deltas(out), linear_sum(map(reference_file, names), ratios)) < 1e-6


def test_with_less_rank_the_sum_is_the_best_of_that_rank(tmp_path):
    names, ratios = ("in_a", "in_c"), (1, 1)
    found = deltas(merge(tmp_path, names, ratios, "--new_rank", 4))
    reference = deltas(reference_file("out_svd_ac_rank4"))
    for name, wanted in linear_sum(map(reference_file, names), ratios).items():
        best = torch.linalg.svdvals(wanted)[4:].norm().item()
        assert (found[name] - wanted).norm().item() == pytest.approx(best, abs=1e-5)
        assert (reference[name] - wanted).norm().item() > best + 0.05  # its clamping costs more than the rank does


def test_alpha_is_the_rank_and_larger_convolutions_have_their_own(tmp_path):
    out = merge(tmp_path, ("in_a", "in_b"), (1, 1), "--new_rank", 5, "--new_conv_rank", 3)
    tensors = load_file(out)
    for name in deltas(out):
        rank = 3 if name == CONV else 5
        assert tensors[f"{name}.lora_down.weight"].shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == rank
        assert tensors[f"{name}.alpha"].item() == rank
    assert metadata_of(out)["ss_network_dim"] == "Dynamic"


def test_without_an_own_rank_larger_convolutions_get_that_of_the_others(tmp_path):
    tensors = load_file(merge(tmp_path, ("in_a", "in_b"), (1, 1), "--new_rank", 3))
    assert tensors[f"{CONV}.lora_down.weight"].shape == (3, 8, 3, 3)
    assert tensors[f"{CONV}.lora_up.weight"].shape == (6, 3, 1, 1)


def test_the_default_rank_is_4(tmp_path):
    tensors = load_file(merge(tmp_path, ("in_a", "in_b"), (1, 1)))
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name} == {4}


def test_bf16_works(tmp_path):
    names = ("in_a", "in_b")
    out = merge(tmp_path, names, (1, 1), "--new_rank", 8, "--precision", "bf16")
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}
    assert worst_error(deltas(out), linear_sum(map(reference_file, names), (1, 1))) < 0.03


def test_the_sum_is_rounded_to_the_precision_whatever_the_file_is_saved_in(tmp_path):
    out = load_file(merge(tmp_path, ("in_a", "in_b"), (1, 1), "--precision", "bf16", "--save_precision", "float"))
    assert {tensor.dtype for tensor in out.values()} == {torch.float32}
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in out.values())


def test_a_block_weight_counts_once(tmp_path):
    """The reference puts it on both factors when it merges LoRA files with each other."""
    lists = [[1.0] * 12, [0.5, -0.2, *[0.2] * 3, 0.25, *[0.2] * 6]]  # BASE, IN04 and MID of the second
    out = merge(
        tmp_path, ("in_xa", "in_xb"), (1, 2), "--new_rank", 8, "--lbws", json.dumps(lists[0]), json.dumps(lists[1])
    )
    one, other = deltas(reference_file("in_xa")), deltas(reference_file("in_xb"))
    text1, text2 = (f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2))
    into, middle = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_2",
    )
    wanted = {
        text1: one[text1],
        text2: 2 * 0.5 * other[text2],
        into: one[into] + 2 * -0.2 * other[into],
        middle: one[middle] + 2 * 0.25 * other[middle],
    }
    assert worst_error(deltas(out), wanted) < 1e-6


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 0),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc2", 0),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 2),  # IN01
        ("lora_unet_down_blocks_0_attentions_1_proj_in", 3),  # IN02
        ("lora_unet_down_blocks_0_downsamplers_0_conv", 4),  # IN03
        ("lora_unet_down_blocks_2_attentions_1_proj_in", 9),  # IN08
        ("lora_unet_down_blocks_3_resnets_1_conv1", 12),  # IN11
        ("lora_unet_mid_block_attentions_0_proj_in", 13),
        ("lora_unet_up_blocks_0_resnets_0_conv1", 14),  # OUT00
        ("lora_unet_up_blocks_0_upsamplers_0_conv", 16),  # OUT02
        ("lora_unet_up_blocks_1_attentions_0_proj_in", 17),  # OUT03
        ("lora_unet_up_blocks_3_attentions_2_proj_out", 25),  # OUT11
        ("lora_unet_input_blocks_8_1_proj_in", 9),
        ("lora_unet_middle_block_1_proj_in", 13),
        ("lora_unet_output_blocks_5_1_proj_in", 19),
        ("lora_unet_time_embed_0", None),
    ],
)
def test_each_module_has_its_place_among_26(name, position):
    assert position_of(name) == position


def test_every_list_has_as_many_positions_as_numbers():
    assert {length: len(set(positions)) for length, positions in LAYOUTS.items()} == {12: 12, 17: 17, 20: 20, 26: 26}


def test_a_block_that_a_list_does_not_name_counts_1():
    weights = BlockWeights((0.0,) * 17)
    assert weights.of("lora_unet_down_blocks_0_downsamplers_0_conv") == 1.0  # IN03 is not among the 17
    assert weights.of("lora_unet_down_blocks_0_attentions_0_proj_in") == 0.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lbws", "[1,2]"], "a list has 2 numbers, there are lists of 12, 17, 20, 26"),
        (["--lbws", "1,2"], "takes lists of numbers"),
        (["--lbws", json.dumps([1] * 12)], "12 numbers are for SDXL"),
        (["--lbws", json.dumps([1] * 17), json.dumps([1] * 17)], "2 lists for 1 --models"),
        (["--new_rank", "0"], "--new_rank must be at least 1"),
        (["--device", "tpu9"], "--device tpu9 cannot be used here"),
    ],
)
def test_wrong_options_end_in_one_line(capsys, tmp_path, more, said):
    out = tmp_path / "x.safetensors"
    argv = ["--models", str(reference_file("in_a")), "--ratios", "1", "--save_to", str(out), *more]
    assert svd_merge_lora.main(argv) == 2
    assert said in error_line(capsys.readouterr().err)
    assert not out.exists()
