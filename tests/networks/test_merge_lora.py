"""LoRA files merged with each other: linear in the ratios, whatever their ranks and alphas."""

import pytest
import torch
from lora_samples import (
    deltas,
    error_line,
    linear_sum,
    metadata_of,
    reference_file,
    worst_error,
    write_random,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15

from library.file_hashes import hashes
from networks import merge_lora

PAIRS = [
    (("in_a", "in_b"), (1.0, 1.0)),
    (("in_a", "in_b"), (0.5, 0.5)),
    (("in_a", "in_b"), (0.7, -0.3)),
    (("in_a", "in_c"), (1.0, 1.0)),  # ranks 4 and 2
    (("in_a", "in_d"), (1.0, 1.0)),  # the second has no alpha
    (("in_xa", "in_xb"), (0.6, 0.4)),  # of SDXL
]


def merge(tmp_path, names, ratios, *more, name="out.safetensors"):
    out = tmp_path / name
    argv = ["--models", *map(str, map(reference_file, names)), "--ratios", *map(str, ratios), "--save_to", str(out)]
    assert merge_lora.main([*argv, *more]) == 0
    return out


def refusal(capsys, *argv) -> str:
    """Return the one line that a command with a user's error ends with."""
    assert merge_lora.main([str(each) for each in argv]) == 2
    return error_line(capsys.readouterr().err)


@pytest.mark.parametrize("more", [(), ("--concat",), ("--shuffle",), ("--concat", "--shuffle")], ids=" ".join)
@pytest.mark.parametrize(("names", "ratios"), PAIRS)
def test_a_merge_is_exactly_the_sum_of_the_parts(tmp_path, names, ratios, more):
    out = merge(tmp_path, names, ratios, *more)
    assert worst_error(deltas(out), linear_sum(map(reference_file, names), ratios)) < 1e-6


def test_concat_adds_the_ranks_up_and_scales_alpha_with_them(tmp_path):
    """The reference keeps alpha while the rank grows, and so comes out at half strength."""
    out, reference = merge(tmp_path, ("in_a", "in_b"), (1, 1), "--concat"), reference_file("out_concat_ab_1_1")
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    ours, theirs = load_file(out), load_file(reference)
    assert ours[f"{name}.lora_down.weight"].shape == theirs[f"{name}.lora_down.weight"].shape == (8, 8)
    assert (ours[f"{name}.alpha"].item(), theirs[f"{name}.alpha"].item()) == (8, 4)
    half = {key: value / 2 for key, value in linear_sum(map(reference_file, ("in_a", "in_b")), (1, 1)).items()}
    assert worst_error(deltas(reference), half) < 1e-5


def test_one_file_at_ratio_1_comes_out_as_it_went_in(tmp_path):
    out, reference = load_file(merge(tmp_path, ("in_a",), (1,))), load_file(reference_file("out_add_a_1"))
    assert out.keys() == reference.keys()
    assert all(torch.equal(out[name], reference[name]) for name in reference)


def test_one_file_at_half_ratio_has_half_the_effect(tmp_path):
    """The reference gives a quarter: it puts the ratio on both factors."""
    whole, out = deltas(reference_file("in_a")), deltas(merge(tmp_path, ("in_a",), (0.5,)))
    theirs = deltas(reference_file("out_add_a_0.5"))
    assert worst_error(out, {name: value / 2 for name, value in whole.items()}) < 1e-6
    assert worst_error(theirs, {name: value / 4 for name, value in whole.items()}) < 1e-5


@pytest.mark.parametrize(("names", "ratios"), PAIRS)
def test_without_concat_a_module_has_the_rank_of_the_sum_and_no_more(tmp_path, names, ratios):
    out = load_file(merge(tmp_path, names, ratios))
    for name, wanted in linear_sum(map(reference_file, names), ratios).items():
        assert out[f"{name}.lora_down.weight"].shape[0] == torch.linalg.matrix_rank(wanted, rtol=1e-5)


def test_without_concat_a_file_merged_with_itself_keeps_its_rank(tmp_path):
    out = merge(tmp_path, ("in_a", "in_a"), (0.5, 0.25))
    concat = merge(tmp_path, ("in_a", "in_a"), (0.5, 0.25), "--concat", name="concat.safetensors")
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    assert (len(load_file(out)[name]), len(load_file(concat)[name])) == (4, 8)
    assert worst_error(deltas(out), linear_sum((reference_file("in_a"),), (0.75,))) < 1e-6


def test_nothing_has_rank_1(tmp_path):
    out = merge(tmp_path, ("in_a", "in_a"), (0, 0))
    assert {len(tensor) for name, tensor in load_file(out).items() if "lora_down" in name} == {1}
    assert not any(tensor.any() for tensor in deltas(out).values())


def test_ranks_that_grow_are_told_of(tmp_path, caplog):
    merge(tmp_path, ("in_a", "in_b"), (1, 1), "--concat")
    assert "ranks of up to 4 became up to 8" in caplog.text
    caplog.clear()
    merge(tmp_path, ("in_a", "in_a"), (1, 1))
    assert "became" not in caplog.text


def test_shuffling_moves_ranks_and_changes_nothing_in_the_sum(tmp_path):
    plain = merge(tmp_path, ("in_a", "in_b"), (1, 1), "--concat")
    mixed = merge(tmp_path, ("in_a", "in_b"), (1, 1), "--concat", "--shuffle", name="mixed.safetensors")
    name = "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"
    one, other = load_file(plain)[name], load_file(mixed)[name]
    assert not torch.equal(one, other)
    assert sorted(row.sum().item() for row in one) == sorted(row.sum().item() for row in other)
    assert worst_error(deltas(mixed), deltas(plain)) < 1e-6


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.002)])
def test_every_precision_works(tmp_path, precision, tolerance):
    names = ("in_a", "in_e_fp16")
    out = merge(tmp_path, names, (1, 1), "--concat", "--precision", precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {tensor.dtype for tensor in load_file(out).values()} == {dtype}
    assert worst_error(deltas(out), linear_sum(map(reference_file, names), (1, 1))) < tolerance


def test_the_file_is_written_in_save_precision(tmp_path):
    out = merge(tmp_path, ("in_a",), (1,), "--save_precision", "bf16")
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}


def test_the_hashes_are_those_of_the_tensors_in_the_file(tmp_path):
    out = merge(tmp_path, ("in_a", "in_b"), (1, 1), "--save_precision", "fp16")
    written = metadata_of(out)
    own = {key: value for key, value in written.items() if not key.startswith("sshs_")}
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == hashes(load_file(out), own)


def test_the_metadata_describe_the_result(tmp_path):
    written = metadata_of(merge(tmp_path, ("in_xa", "in_xb"), (1, 1)))
    assert written["ss_network_module"] == "networks.lora"
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("Dynamic", "Dynamic")  # some are in one file
    assert written["ss_base_model_version"] == "sdxl_base_v1-0"
    assert written["ss_v2"] == "False"
    assert written["modelspec.title"] == "out"
    assert written["modelspec.merged_from"] == "in_xa, in_xb"
    assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize(
    ("names", "architecture"),
    [(("in_xa", "in_xb"), "stable-diffusion-xl-v1-base/lora"), (("in_a", "in_b"), "stable-diffusion-v1/lora")],
)
def test_files_without_metadata_are_described_by_their_names(tmp_path, names, architecture):
    bare = []
    for name in names:
        bare.append(tmp_path / f"{name}.safetensors")
        save_file(load_file(reference_file(name)), bare[-1])
    out = tmp_path / "out.safetensors"
    argv = ["--models", *map(str, bare), "--ratios", "1", "1", "--save_to", str(out)]
    assert merge_lora.main(argv) == 0
    written = metadata_of(out)
    assert written["modelspec.architecture"] == architecture
    assert "ss_base_model_version" not in written  # what is guessed is not written as known


def test_of_metadata_that_differ_the_first_file_has_its_way(tmp_path, caplog):
    paths = []
    for version in ("sd_v2", "sd_v1"):
        paths.append(tmp_path / f"{version}.safetensors")
        facts = {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
        save_file(load_file(reference_file("in_a")), paths[-1], facts)
    out = tmp_path / "out.safetensors"
    assert merge_lora.main(["--models", *map(str, paths), "--ratios", "1", "1", "--save_to", str(out)]) == 0
    written = metadata_of(out)
    assert (written["ss_base_model_version"], written["ss_v2"]) == ("sd_v2", "True")
    assert written["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert "the files differ in ss_base_model_version (sd_v2, sd_v1); the first is written" in caplog.text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_linear_layer_and_a_1x1_convolution_are_the_same_module(tmp_path, order):
    """As projections of SD 2.x are, in files trained on a folder and on a single file."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    paths = [tmp_path / "linear.safetensors", tmp_path / "point.safetensors"]
    for path, tail in zip(paths, ((), (1, 1)), strict=True):
        down, up = torch.randn(2, 8, *tail), torch.randn(6, 2, *tail)
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    out = tmp_path / "out.safetensors"
    files = [paths[index] for index in order]
    assert merge_lora.main(["--models", *map(str, files), "--ratios", "1", "0.5", "--save_to", str(out)]) == 0
    assert worst_error(deltas(out), linear_sum(files, (1, 0.5))) < 1e-6
    assert load_file(out)[f"{name}.lora_down.weight"].dim() == (2, 4)[order[0]]  # as in the first file


def test_files_that_share_no_module_are_merged_with_a_warning(tmp_path, caplog):
    out = merge(tmp_path, ("in_a", "in_xa"), (1, 1))
    assert deltas(out).keys() == deltas(reference_file("in_a")).keys() | deltas(reference_file("in_xa")).keys()
    assert "no module in common" in caplog.text
    caplog.clear()
    merge(tmp_path, ("in_a", "in_b"), (1, 1))
    assert "no module in common" not in caplog.text


def test_no_metadata_leaves_what_a_reader_needs(tmp_path):
    written = metadata_of(merge(tmp_path, ("in_a", "in_b"), (1, 1), "--no_metadata"))
    assert not [key for key in written if key.startswith("modelspec.")]
    assert written["ss_base_model_version"] == "sd_v1"


def test_torchs_own_format_can_be_written(tmp_path):
    out = merge(tmp_path, ("in_a",), (1,), name="out.pt")
    assert torch.load(out, weights_only=True).keys() == load_file(reference_file("in_a")).keys()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ratios", "1", "2", "--save_to", "x.safetensors"], "--ratios has 2 numbers for 1 --models"),
        (["--save_to", "x.safetensors"], "--ratios has 0 numbers"),
        (["--ratios", "1"], "--save_to is missing"),
        (["--ratios", "1", "--save_to", "x.onnx"], "the ending must be one of .safetensors"),
        (["--ratios", "one", "--save_to", "x.safetensors"], "--ratios must be a number"),
        (["--ratios", "1", "--save_too", "x"], "Did you mean --save_to?"),
        (["--ratios", "1", "--save_to", "x.safetensors", "--precision", "fp61"], "Did you mean fp16?"),
        (["--ratios", "1", "--save_to", "x.safetensors", "--sd_model", "m.ckpt"], "there is no file m.ckpt"),
        (["--ratios", "1", "--save_to", "x.safetensors", "--sd_model", "m.ckpt", "--concat"], "--concat is for"),
    ],
)
def test_wrong_options_end_in_one_line(capsys, more, said):
    assert said in refusal(capsys, "--models", reference_file("in_a"), *more)


def test_a_missing_file_ends_in_one_line(capsys, tmp_path):
    said = refusal(capsys, "--models", tmp_path / "no.safetensors", "--ratios", 1, "--save_to", tmp_path / "x.pt")
    assert "there is no file" in said


def test_files_for_different_models_are_refused_and_nothing_is_written(capsys, tmp_path):
    other, out = tmp_path / "other.safetensors", tmp_path / "x.safetensors"
    tensors = load_file(reference_file("in_a"))
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file({**tensors, name: torch.zeros(4, 12)}, other)
    said = refusal(capsys, "--models", reference_file("in_a"), other, "--ratios", 1, 1, "--save_to", out)
    assert "6 x 12" in said
    assert "6 x 8" in said
    assert sorted(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("broken", ["nan", "dora", "cut"])
def test_a_file_that_cannot_be_merged_is_refused(capsys, tmp_path, broken):
    path = tmp_path / "broken.safetensors"
    tensors = load_file(reference_file("in_a"))
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    if broken == "nan":
        tensors[f"{name}.lora_up.weight"][0, 0] = torch.nan
    elif broken == "dora":
        tensors[f"{name}.dora_scale"] = torch.ones(6)
    save_file(tensors, path)
    if broken == "cut":
        path.write_bytes(path.read_bytes()[:900])
    said = refusal(capsys, "--models", path, "--ratios", 1, "--save_to", tmp_path / "x.safetensors")
    wanted = {"nan": "(NaN)", "dora": "another method than plain LoRA", "cut": "cannot be read"}
    assert wanted[broken] in said
    assert str(path) in said


def test_a_sum_too_large_for_the_number_format_is_refused(capsys, tmp_path):
    out = tmp_path / "x.safetensors"
    argv = ["--models", reference_file("in_a"), "--ratios", 1e12, "--save_to", out, "--save_precision", "fp16"]
    assert "--save_precision float" in refusal(capsys, *argv)
    assert not out.exists()


def test_a_file_with_every_name_of_a_model_is_merged(tmp_path):
    source = write_random(tmp_path / "a.safetensors", tiny_sd15(), conv=True)
    out = tmp_path / "out.safetensors"
    assert merge_lora.main(["--models", str(source), str(source), "--ratios", "1", "-0.25", "--save_to", str(out)]) == 0
    assert worst_error(deltas(out), linear_sum((source,), (0.75,))) < 1e-5
