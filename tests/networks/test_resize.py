"""LoRA files at another rank, and the command that shows their weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_samples import (
    deltas,
    error_line,
    metadata_of,
    reference_file,
    worst_error,
)
from safetensors.torch import load_file, save_file

from library.file_hashes import hashes
from networks import check_lora_weights, resize_lora

LINEAR, CONV = "lora_unet_x", "lora_unet_y"
VALUES = (8.0, 4.0, 2.0, 1.0, 0.5)  # sum 15.5, squares 85.25


def with_values(values, inner=(7,), outer=6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down and up whose product has these singular values."""
    generator = torch.Generator().manual_seed(1)
    rank, size = len(values), torch.Size(inner).numel()
    left = torch.linalg.qr(torch.randn(outer, rank, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0].T
    up = left * torch.tensor(values)
    up = up[:, :, None, None] if len(inner) == 3 else up
    return right.reshape(rank, *inner).contiguous(), up.contiguous()


@pytest.fixture
def source(tmp_path):
    """A file of a Linear and a 3x3 convolution, each with VALUES, alpha 2.5 of rank 5: strength a half."""
    down, up = with_values(VALUES)
    conv_down, conv_up = with_values(VALUES, inner=(2, 3, 3))
    tensors = {f"{LINEAR}.lora_down.weight": down, f"{LINEAR}.lora_up.weight": up, f"{LINEAR}.alpha": torch.tensor(2.5),
               f"{CONV}.lora_down.weight": conv_down, f"{CONV}.lora_up.weight": conv_up,
               f"{CONV}.alpha": torch.tensor(2.5)}  # fmt: skip
    path = tmp_path / "source.safetensors"
    save_file(tensors, path, {"ss_network_dim": "5", "ss_network_alpha": "2.5", "ss_training_comment": "mine"})
    return path


def resize(source, *more, name="out.safetensors"):
    out = source.parent / name
    assert resize_lora.main(["--model", str(source), "--save_to", str(out), *map(str, more)]) == 0
    return out


def ranks(path) -> tuple[int, int]:
    tensors = load_file(path)
    return tensors[f"{LINEAR}.lora_down.weight"].shape[0], tensors[f"{CONV}.lora_down.weight"].shape[0]


def test_a_smaller_rank_keeps_the_largest_singular_values(source):
    out = resize(source, "--new_rank", 2)
    assert ranks(out) == (2, 2)
    for tensor in deltas(out).values():
        torch.testing.assert_close(
            torch.linalg.svdvals(tensor)[:3], torch.tensor([4.0, 2.0, 0.0]).double(), rtol=0, atol=1e-5
        )


def test_the_strength_stays_and_alpha_shrinks_with_the_rank(source):
    tensors = load_file(resize(source, "--new_rank", 2))
    assert tensors[f"{LINEAR}.alpha"].item() == tensors[f"{CONV}.alpha"].item() == 1.0


@pytest.mark.parametrize("rank", [5, 64])
def test_with_enough_rank_nothing_changes(source, rank):
    out = resize(source, "--new_rank", rank)
    assert worst_error(deltas(out), deltas(source)) < 1e-6
    assert ranks(out) == (5, 5)


def test_a_module_that_keeps_its_lower_rank_is_told_of(source, caplog):
    resize(source, "--new_rank", 64, "--new_conv_rank", 4)
    assert "1 of 2 modules have a lower rank than asked for, 5, and keep it" in caplog.text


def test_larger_convolutions_have_their_own_rank(source):
    out = resize(source, "--new_rank", 3, "--new_conv_rank", 1)
    assert ranks(out) == (3, 1)
    assert metadata_of(out)["ss_network_dim"] == "3"  # of the linear layers, as training writes it


def test_a_number_too_large_for_the_number_format_is_refused(capsys, source):
    tensors = load_file(source)
    save_file({**tensors, f"{LINEAR}.lora_up.weight": tensors[f"{LINEAR}.lora_up.weight"] * 1e14}, source)
    out = source.parent / "out.safetensors"
    assert resize_lora.main(["--model", str(source), "--save_to", str(out), "--save_precision", "fp16"]) == 2
    assert "does not fit the number format" in error_line(capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "param", "rank"),
    [
        ("sv_ratio", 5, 4),  # 8, 4 and 2 are above 8/5: three, and one more
        ("sv_ratio", 1.5, 2),  # 8 alone is above 8/1.5, and one more
        ("sv_fro", 0.95, 3),  # 80 of 85.25 are 0.97 squared: two, and one more
        ("sv_fro", 0.5, 2),  # 64 alone is more than a quarter, and one more
        ("sv_cumulative", 0.7, 3),  # 8 + 4 of 15.5 are 0.77: two, and one more
        ("sv_cumulative", 0.9, 4),  # 8 + 4 + 2 are 0.903: three, and one more
        ("sv_cumulative", 1, 5),
    ],
)
def test_a_dynamic_method_chooses_the_rank_by_the_singular_values(source, method, param, rank):
    out = resize(source, "--new_rank", 5, "--dynamic_method", method, "--dynamic_param", param)
    assert ranks(out) == (rank, rank)
    assert load_file(out)[f"{LINEAR}.alpha"].item() == pytest.approx(rank / 2)


def test_a_dynamic_rank_stays_below_the_given_ones(source):
    more = ["--new_rank", 3, "--new_conv_rank", 2, "--dynamic_method", "sv_cumulative", "--dynamic_param", 1]
    assert ranks(resize(source, *more)) == (3, 2)


def test_a_module_without_any_effect_gets_rank_1(source):
    tensors = load_file(source)
    tensors[f"{LINEAR}.lora_up.weight"].zero_()
    save_file(tensors, source)
    out = resize(source, "--new_rank", 3, "--dynamic_method", "sv_ratio", "--dynamic_param", 2)
    assert ranks(out)[0] == 1
    assert not deltas(out)[LINEAR].any()


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_down", "lora_up")])
def test_every_naming_of_the_two_factors_is_understood_and_kept(tmp_path, names):
    down, up = with_values(VALUES)
    path = tmp_path / "source.safetensors"
    save_file({f"unet.to_q.{names[0]}.weight": down, f"unet.to_q.{names[1]}.weight": up}, path)
    tensors = load_file(resize(path, "--new_rank", 2))
    small_down, small_up = (tensors[f"unet.to_q.{name}.weight"] for name in names)
    assert (small_down.shape, small_up.shape) == ((2, 7), (6, 2))
    (alpha,) = (tensor for name, tensor in tensors.items() if name.endswith("alpha"))
    assert alpha.item() == 2  # a file without alpha has the strength 1
    product = torch.linalg.svdvals(small_up @ small_down)
    torch.testing.assert_close(product[:2], torch.tensor([8.0, 4.0]))


def test_the_metadata_tell_of_it(source):
    fixed = metadata_of(resize(source, "--new_rank", 2))
    assert fixed["ss_training_comment"] == "dimension is resized from 5 to 2; mine"
    assert (fixed["ss_network_dim"], fixed["ss_network_alpha"]) == ("2", "1")
    out = resize(source, "--new_rank", 5, "--dynamic_method", "sv_fro", "--dynamic_param", 0.9)
    dynamic = metadata_of(out)
    assert dynamic["ss_training_comment"] == "dynamic resize with sv_fro: 0.9 from 5; mine"
    assert (dynamic["ss_network_dim"], dynamic["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    own = {key: value for key, value in dynamic.items() if not key.startswith("sshs_")}
    assert (dynamic["sshs_model_hash"], dynamic["sshs_legacy_hash"]) == hashes(load_file(out), own)


def test_verbose_tells_what_each_module_keeps(source, caplog):
    resize(source, "--new_rank", 2, "--verbose")
    lines = [record.getMessage() for record in caplog.records if "rank 5 -> 2" in record.getMessage()]
    assert len(lines) == 2
    assert "keeps 77.4% of the sum of singular values and 96.9% of the norm" in lines[0]


def test_precision_and_file_type_are_those_asked_for(source):
    out = resize(source, "--new_rank", 2, "--save_precision", "fp16", name="out.pt")
    assert {tensor.dtype for tensor in torch.load(out, weights_only=True).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dynamic_method", "sv_fro"], "belong together"),
        (["--dynamic_method", "sv_frob", "--dynamic_param", "0.9"], "Did you mean sv_fro?"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "9"], "must be at most 1 for sv_fro"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "must be at least 1 for sv_ratio"),
        (["--new_rank", "-1"], "--new_rank must be at least 1"),
        (["--new_rnk", "2"], "Did you mean --new_rank?"),
    ],
)
def test_wrong_options_end_in_one_line(capsys, source, more, said):
    out = source.parent / "out.safetensors"
    assert resize_lora.main(["--model", str(source), "--save_to", str(out), *more]) == 2
    assert said in error_line(capsys.readouterr().err)
    assert not out.exists()


def test_a_file_that_is_no_lora_is_refused(capsys, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"model.weight": torch.ones(2)}, path)
    assert resize_lora.main(["--model", str(path), "--save_to", str(tmp_path / "y.safetensors")]) == 2
    assert "holds no LoRA (its first entry: model.weight)" in error_line(capsys.readouterr().err)


def test_weights_are_shown_with_their_mean_and_smallest_magnitude(capsys, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a.lora_down.weight": torch.tensor([[-1.0, 2.0]]), "a.lora_up.weight": torch.tensor([[0.0], [-0.5]]),
               "a.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(tensors, path)
    assert check_lora_weights.main([str(path)]) == 0
    down, up = "a.lora_down.weight,(1-2),1.5,1.0", "a.lora_up.weight,(2-1),0.25,0.0"
    assert capsys.readouterr().out.splitlines() == ["number of LoRA modules: 1", down, up]
    assert check_lora_weights.main(["-s", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["a.alpha,(),1.0,1.0", down, up]


def test_a_reader_that_has_seen_enough_ends_the_list_in_silence(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"layer{index:05}.lora_down.weight": torch.ones(1, 1) for index in range(5000)}, path)  # fills a pipe
    script = Path(check_lora_weights.__file__)
    process = subprocess.Popen(
        [sys.executable, script, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "number of LoRA modules: 5000\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
    process.stderr.close()


def test_showing_a_missing_file_ends_in_one_line(capsys, tmp_path):
    assert check_lora_weights.main([str(tmp_path / "no.safetensors")]) == 2
    assert "there is no file" in error_line(capsys.readouterr().err)
    assert check_lora_weights.main([str(reference_file("in_a"))]) == 0
