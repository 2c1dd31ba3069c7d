"""A LoRA from the difference of two models."""

import pytest
import torch
from lora_samples import (
    deltas,
    error_line,
    metadata_of,
    worst_error,
    write_random,
)
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15, tiny_sd21, tiny_sdxl

from library.file_hashes import hashes
from library.models.checkpoint import open_tensors
from networks import extract_lora_from_models, merge_lora, sdxl_merge_lora
from networks.checkpoint_places import SD1, SD2, SDXL, places

MODELS = {"sd15": (tiny_sd15, SD1, ()), "sd21": (tiny_sd21, SD2, ("--v2",)), "sdxl": (tiny_sdxl, SDXL, ("--sdxl",))}


def extract(original, tuned, out, *more):
    argv = ["--model_org", original, "--model_tuned", tuned, "--save_to", out, *more]
    assert extract_lora_from_models.main([str(each) for each in argv]) == 0
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny model with a random LoRA of rank 2 merged into it, convolutions included, for each version."""
    folder, made = tmp_path_factory.mktemp("tuned"), {}

    def make(name: str = "sd15"):
        if name not in made:
            model, kind, _ = MODELS[name]
            file = write_random(folder / f"lora-{name}.safetensors", model(), kind=kind, conv=True)
            out = folder / f"{name}.safetensors"
            argv = ["--sd_model", model(), "--models", file, "--ratios", "1", "--save_to", out]
            command = sdxl_merge_lora if kind is SDXL else merge_lora
            assert command.main([str(each) for each in argv] + (["--v2"] if kind is SD2 else [])) == 0
            made[name] = (file, out)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_that_was_merged_is_found_again(tmp_path, tuned, name):
    file, model = tuned(name)
    original, _, flags = MODELS[name]
    more = ["--dim", 2, "--conv_dim", 2, *flags]
    out = extract(original(), model, tmp_path / "x.safetensors", *more)
    assert worst_error(deltas(out), deltas(file)) < 1e-3
    found, wanted = load_file(out), load_file(file)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tensor.shape for n, tensor in wanted.items()}
    assert {tensor.item() for name, tensor in found.items() if name.endswith(".alpha")} == {2.0}


def test_without_conv_dim_resnets_are_left_out(tmp_path, tuned):
    names = deltas(extract(tiny_sd15(), tuned()[1], tmp_path / "x.safetensors"))
    assert len(names) == 264
    assert not [name for name in names if "resnets" in name or "samplers" in name]


def test_a_smaller_rank_keeps_the_best_part(tmp_path, tuned):
    file, model = tuned()
    found = deltas(extract(tiny_sd15(), model, tmp_path / "x.safetensors", "--dim", 1))
    wanted = deltas(file)
    for name, tensor in found.items():
        best = torch.linalg.svdvals(wanted[name])[1:].norm().item()
        assert (tensor - wanted[name]).norm().item() == pytest.approx(best, rel=1e-3)


def test_clamping_is_off_by_default_and_moves_away_from_the_best(tmp_path, tuned):
    file, model = tuned()
    wanted = deltas(file)
    names = [name for name in wanted if "resnets" not in name and "samplers" not in name]
    wanted = {name: wanted[name] for name in names}
    plain = deltas(extract(tiny_sd15(), model, tmp_path / "x.safetensors", "--dim", 2))
    clamped_file = extract(tiny_sd15(), model, tmp_path / "y.safetensors", "--dim", 2, "--clamp_quantile", 0.9)
    assert worst_error(plain, wanted) < 1e-3
    assert worst_error(deltas(clamped_file), wanted) > 0.02
    tensors = load_file(clamped_file)
    pair = [tensors[f"{names[0]}.{side}.weight"].abs().flatten() for side in ("lora_down", "lora_up")]
    values = torch.cat(pair)
    assert (values == values.max()).sum() >= 0.09 * len(values)  # all that was beyond lies on the limit


@pytest.mark.parametrize(("min_diff", "has_text"), [(0.0005, True), (0.01, False)])
def test_a_text_encoder_that_hardly_differs_is_left_out(tmp_path, tuned, min_diff, has_text):
    tensors = load_file(tuned()[1])
    base = load_file(tiny_sd15())
    for place in places(open_tensors(tiny_sd15()), SD1).values():
        if place.kind == "text_encoder":
            tensors[place.key] = base[place.key] + 0.001
    model = tmp_path / "model.safetensors"
    save_file(tensors, model)
    names = deltas(extract(tiny_sd15(), model, tmp_path / "x.safetensors", "--min_diff", min_diff))
    assert any(name.startswith("lora_te_") for name in names) == has_text
    assert any(name.startswith("lora_unet_") for name in names)


def test_precisions_of_reading_and_writing_are_those_asked_for(tmp_path, tuned):
    """A difference that fp16 cannot show is none."""
    base = load_file(tiny_sd15())
    place = places(open_tensors(tiny_sd15()), SD1)["lora_unet_mid_block_attentions_0_proj_in"]
    model = tmp_path / "model.safetensors"
    save_file({**base, place.key: base[place.key] * (1 + 1e-6)}, model)
    out = tmp_path / "x.safetensors"
    written = load_file(extract(tiny_sd15(), model, out, "--save_precision", "bf16"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    argv = ["--model_org", str(tiny_sd15()), "--model_tuned", str(model), "--save_to", str(out)]
    assert extract_lora_from_models.main([*argv, "--load_precision", "bf16"]) == 2


def test_the_metadata_say_what_the_file_is(tmp_path, tuned):
    more = ["--dim", 2, "--conv_dim", 1, "--v2", "--v_parameterization"]
    out = extract(tiny_sd21(), tuned("sd21")[1], tmp_path / "x.safetensors", *more)
    written = metadata_of(out)
    assert written["ss_v2"] == "True"
    assert written["ss_base_model_version"] == "sd_v2_v"
    assert written["ss_network_module"] == "networks.lora"
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("2", "2.0")  # as training writes them
    assert written["ss_network_args"] == '{"conv_dim": 1, "conv_alpha": 1.0}'
    assert written["modelspec.title"] == "x"
    assert written["modelspec.prediction_type"] == "v"
    own = {key: value for key, value in written.items() if not key.startswith("sshs_")}
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == hashes(load_file(out), own)
    bare = metadata_of(extract(tiny_sd21(), tuned("sd21")[1], tmp_path / "y.safetensors", *more, "--no_metadata"))
    assert not [key for key in bare if key.startswith("modelspec.")]


def test_the_last_layer_of_a_whole_openclip_is_not_compared(tmp_path, tuned):
    """SD 2.x files as published carry 24 layers; the output of the last is not used, and no LoRA adapts it."""
    file, model = tuned("sd21")
    whole = {}
    for name, path in (("original", tiny_sd21()), ("tuned", model)):
        tensors = load_file(path)
        last = {key.replace(".22.", ".23."): tensor for key, tensor in tensors.items() if ".resblocks.22." in key}
        whole[name] = tmp_path / f"{name}.safetensors"
        save_file({**tensors, **{key: tensor.clone() for key, tensor in last.items()}}, whole[name])
    more = ("--v2", "--dim", 2, "--conv_dim", 2)
    assert (
        deltas(extract(whole["original"], whole["tuned"], tmp_path / "x.safetensors", *more)).keys()
        == deltas(file).keys()
    )
    assert extract(tiny_sd21(), whole["tuned"], tmp_path / "y.safetensors", *more)


CASES = [
    "equal",
    "version",
    "sdxl flag",
    "two flags",
    "missing",
    "no tuned",
    "structure",
    "nan",
    "nan in text",
    "range",
]


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_ends_in_one_line(capsys, tmp_path, case):
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(tiny_sd15())
    place = places(open_tensors(tiny_sd15()), SD1)["lora_unet_mid_block_attentions_0_proj_in"]
    if case == "nan in text":
        name = places(open_tensors(tiny_sd15()), SD1)["lora_te_text_model_encoder_layers_3_mlp_fc1"].key
        tensors[name] = tensors[name] * torch.nan
    elif case == "nan":
        tensors[place.key] = tensors[place.key] * torch.nan
    elif case == "structure":
        del tensors[place.key]
    save_file(tensors, broken)
    tuned_argv = (
        [] if case == "no tuned" else ["--model_tuned", str(tmp_path / "no.ckpt" if case == "missing" else broken)]
    )
    more = {
        "version": ["--v2"],
        "sdxl flag": ["--sdxl"],
        "two flags": ["--v2", "--sdxl"],
        "range": ["--clamp_quantile", "1.5"],
    }.get(case, [])
    out = tmp_path / "x.safetensors"
    argv = ["--model_org", str(tiny_sd15()), *tuned_argv, "--save_to", str(out), *more]
    assert extract_lora_from_models.main(argv) == 2
    said = {
        "equal": "nothing to extract",
        "version": "Leave out --v2",
        "sdxl flag": "is a Stable Diffusion 1.x model. Leave out --v2 and --sdxl.",
        "two flags": "--v2 and --sdxl are for different models",
        "missing": "there is no file",
        "no tuned": "--model_tuned is missing",
        "structure": "differ in structure",
        "nan": "is not a number everywhere",
        "nan in text": "layers.3.mlp.fc1.weight less that of the original is not a number everywhere",
        "range": "--clamp_quantile must be above 0 and at most 1",
    }
    assert said[case] in error_line(capsys.readouterr().err)
    assert not out.exists()


def test_the_metadata_of_a_lora_of_sdxl_say_so(tmp_path, tuned):
    out = extract(tiny_sdxl(), tuned("sdxl")[1], tmp_path / "x.safetensors", "--sdxl", "--v_parameterization")
    written = metadata_of(out)
    assert (written["ss_v2"], written["ss_base_model_version"]) == ("False", "sdxl_base_v1-0")
    assert written["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert written["modelspec.prediction_type"] == "v"


def test_options_to_load_models_elsewhere_are_said_to_have_no_effect(tmp_path, tuned, caplog):
    more = ("--load_original_model_to", "cpu", "--load_tuned_model_to", "cpu")
    plain = extract(tiny_sdxl(), tuned("sdxl")[1], tmp_path / "x.safetensors", "--sdxl")
    assert "has no effect" not in caplog.text
    other = extract(tiny_sdxl(), tuned("sdxl")[1], tmp_path / "y.safetensors", "--sdxl", *more)
    assert load_file(plain).keys() == load_file(other).keys()
    assert caplog.text.count("has no effect: models are read weight by weight") == 2
