"""LoRA files merged into a model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_samples import error_line, metadata_of, reference_file, write_random
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd15, tiny_sd21, tiny_sdxl

from library.models import sd, sdxl
from library.models.checkpoint import open_tensors
from networks import lora, merge_lora, sdxl_merge_lora
from networks.checkpoint_places import SD1, SD2, SDXL, Place, places
from networks.files import modules_in
from networks.into_checkpoint import Addition, added

ROOT = Path(__file__).resolve().parents[2]
MODELS = {  # model, kind, merging command with its flags, family, its weights as a file has them
    "sd15": (tiny_sd15, SD1, merge_lora, (), sd.Sd(), lambda parts: sd.original_tensors(parts, v2=False)),
    "sd21": (tiny_sd21, SD2, merge_lora, ("--v2",), sd.Sd(v2=True), lambda parts: sd.original_tensors(parts, v2=True)),
    "sdxl": (tiny_sdxl, SDXL, sdxl_merge_lora, (), sdxl.Sdxl(), sdxl.original_tensors),
}


def merge(model, files, ratios, out, *more, command=merge_lora) -> dict[str, torch.Tensor]:
    argv = ["--sd_model", model, "--models", *files, "--ratios", *ratios, "--save_to", out, *more]
    assert command.main([str(each) for each in argv]) == 0
    return load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)["state_dict"]


def refusal(capsys, *argv) -> str:
    assert merge_lora.main([str(each) for each in argv]) == 2
    return error_line(capsys.readouterr().err)


def test_the_numbers_are_those_of_the_reference():
    before, after = (load_file(reference_file(name)) for name in ("model_before", "model_after_a0.5_b-0.25"))
    changed = dict(before)
    for file, ratio in (("in_a", 0.5), ("in_b", -0.25)):
        for name, module in modules_in(load_file(reference_file(file)), file).items():
            key = next(k for k in before if f"lora_{k.removesuffix('.weight').replace('.', '_')}" == name)
            place = Place(key, tuple(before[key].shape), "attention")
            changed[key] = added(changed[key], [Addition(place, module, ratio)])
    assert changed.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(changed[name], tensor, rtol=0, atol=1e-6)
    assert not torch.equal(before[key], after[key])


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_gets_what_base_weights_give_it_in_training(tmp_path, name):
    """The names go two ways here: through our tables on the file, and through modules of the loaded model."""
    make, kind, command, flags, family, weights_of = MODELS[name]
    model = make()
    file = write_random(tmp_path / "lora.safetensors", model, kind=kind, conv=True)
    merged = merge(model, [file], [0.5], tmp_path / "out.safetensors", *flags, command=command)
    parts = family.load(str(model), None, torch.float32)
    targets = tuple(family.lora_targets(parts))
    network, tensors = lora.create_network_from_weights(
        0.5, file, None, parts.text_encoders, parts.denoiser, targets=targets
    )
    assert len(network.layers) == len(targets)
    network.merge_to(parts.text_encoders, parts.denoiser, tensors)
    wanted = weights_of(parts)
    stored = load_file(model)
    assert merged.keys() == stored.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(merged[name], wanted[name])]
    assert sum(not torch.equal(merged[name], stored[name]) for name in stored) == len(
        {place.key for place in places(open_tensors(model), kind).values()}
    )


def test_two_files_and_ratios_add_up(tmp_path):
    model = tiny_sd15()
    files = [write_random(tmp_path / f"{seed}.safetensors", model, seed=seed, rank=seed + 1) for seed in (0, 1)]
    before = load_file(model)
    both = merge(model, files, [0.5, -2], tmp_path / "both.safetensors")
    alone = [merge(model, [file], [1], tmp_path / "one.safetensors") for file in files]
    for name, tensor in before.items():
        wanted = tensor + 0.5 * (alone[0][name] - tensor) - 2 * (alone[1][name] - tensor)
        torch.testing.assert_close(both[name], wanted, rtol=0, atol=1e-5)


def test_what_the_lora_does_not_touch_is_kept_bit_for_bit(tmp_path):
    model = tmp_path / "model.safetensors"
    extra = {"model_ema.decay": torch.tensor(0.5), "cond_stage_model.transformer.text_model.embeddings.position_ids":
             torch.arange(77)[None]}  # fmt: skip
    save_file({**load_file(tiny_sd15()), **extra}, model)
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    before, after = load_file(model), merge(model, [file], [1], tmp_path / "out.safetensors")
    touched = {place.key for place in places(open_tensors(model), SD1).values() if place.kind != "resnet"}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == touched


def test_the_model_is_written_in_save_precision_and_counters_stay_whole_numbers(tmp_path):
    model = tmp_path / "model.safetensors"
    save_file({**load_file(tiny_sd15()), "step": torch.tensor(3)}, model)
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    out = tmp_path / "out.safetensors"
    exact = merge(model, [file], [1], tmp_path / "exact.safetensors")
    half = merge(model, [file], [1], out, "--save_precision", "fp16")
    assert half["step"].item() == 3
    assert all(torch.equal(half[name], exact[name].half()) for name in half if name != "step")
    assert merge(model, [file], [1], out, "--precision", "bf16")["step"].dtype == torch.int64
    assert load_file(out)[next(name for name in exact if name.endswith("proj_in.weight"))].dtype == torch.bfloat16


def test_what_the_lora_does_not_touch_is_not_rounded_to_the_precision_of_the_sum(tmp_path):
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    before = load_file(tiny_sd15())
    more = ("--precision", "fp16", "--save_precision", "float")
    after = merge(tiny_sd15(), [file], [1], tmp_path / "out.safetensors", *more)
    touched = {place.key for place in places(open_tensors(tiny_sd15()), SD1).values() if place.kind != "resnet"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - touched)
    assert all(torch.equal(after[name], after[name].half().float()) for name in touched)


def test_what_is_merged_is_rounded_to_the_precision_before_and_after(tmp_path):
    """Model, down and up before, the sum after; the sum itself is made in float32."""
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    after = merge(
        tiny_sd15(), [file], [0.5], tmp_path / "out.safetensors", "--precision", "bf16", "--save_precision", "float"
    )
    name = "lora_te_text_model_encoder_layers_3_mlp_fc1"
    key = places(open_tensors(tiny_sd15()), SD1)[name].key
    module = modules_in(load_file(file), "")[name]
    weight, down, up = (each.bfloat16().float() for each in (load_file(tiny_sd15())[key], module.down, module.up))
    wanted = (weight + 0.5 * module.alpha / module.rank * (up @ down)).bfloat16().float()
    torch.testing.assert_close(
        after[key], wanted, rtol=2**-8, atol=0
    )  # a step of bfloat16, where a sum lies between two
    assert (after[key] == wanted).float().mean() > 0.99


def test_the_merged_file_can_be_the_model_itself(tmp_path):
    model = tmp_path / "model.safetensors"
    model.write_bytes(tiny_sd15().read_bytes())
    file = write_random(tmp_path / "lora.safetensors", model)
    other = merge(model, [file], [1], tmp_path / "other.safetensors")
    same = merge(model, [file], [1], model)
    assert all(torch.equal(same[name], tensor) for name, tensor in other.items())


def test_a_ckpt_can_be_read_and_written(tmp_path):
    model = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(tiny_sd15()), "epoch": 3}, model)
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    pickled = merge(model, [file], [1], tmp_path / "out.ckpt")
    mapped = merge(tiny_sd15(), [file], [1], tmp_path / "out.safetensors")
    assert all(torch.equal(pickled[name], tensor) for name, tensor in mapped.items())


def test_the_merged_model_says_what_it_is(tmp_path):
    out = tmp_path / "mine.safetensors"
    merge(tiny_sd15(), [write_random(tmp_path / "style.safetensors", tiny_sd15())], [1], out)
    written = metadata_of(out)
    assert written["modelspec.title"] == "mine"
    assert written["modelspec.merged_from"] == "sd15, style"
    assert written["modelspec.architecture"] == "stable-diffusion-v1"
    assert written["modelspec.prediction_type"] == "epsilon"
    assert not [key for key in written if key.startswith("ss_")]


def test_a_v2_model_is_labelled_v_prediction_with_a_warning(tmp_path, caplog):
    out = tmp_path / "mine.safetensors"
    file = write_random(tmp_path / "style.safetensors", tiny_sd21(), kind=SD2)
    merge(tiny_sd21(), [file], [1], out, "--v2")
    assert metadata_of(out)["modelspec.prediction_type"] == "v"
    assert "labelled as v-prediction" in caplog.text


def test_no_metadata_writes_none(tmp_path):
    out = tmp_path / "mine.safetensors"
    merge(tiny_sd15(), [write_random(tmp_path / "a.safetensors", tiny_sd15())], [1], out, "--no_metadata")
    assert not metadata_of(out)


def test_modules_that_the_model_lacks_are_named(tmp_path, caplog):
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    tensors = load_file(file)
    surplus = {
        "lora_unet_far_away.lora_down.weight": torch.ones(1, 4),
        "lora_unet_far_away.lora_up.weight": torch.ones(4, 1),
    }
    save_file({**tensors, **surplus}, file)
    merge(tiny_sd15(), [file], [1], tmp_path / "out.safetensors")
    assert "lora_unet_far_away" in caplog.text


@pytest.mark.parametrize(
    "case", ["v2 missing", "v2 too much", "lora as model", "sdxl lora", "sdxl model", "other width"]
)
def test_files_that_do_not_fit_end_in_one_line_and_nothing_is_written(capsys, tmp_path, case):
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    other = tmp_path / "sdxl.safetensors"
    save_file({"conditioner.embedders.0.x": torch.ones(1), "model.diffusion_model.x": torch.ones(1)}, other)
    wide = tmp_path / "wide.safetensors"
    tensors = load_file(file)
    down = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    save_file({**tensors, down: torch.ones(2, 33)}, wide)
    model, loras, more, said = {
        "v2 missing": (tiny_sd21(), file, [], "Add --v2"),
        "v2 too much": (tiny_sd15(), file, ["--v2"], "Leave out --v2"),
        "lora as model": (file, file, [], "is a LoRA file"),
        "sdxl lora": (tiny_sd15(), reference_file("in_xa"), [], "is for SDXL, and"),
        "sdxl model": (other, file, [], "is an SDXL model. Merge into it with networks/sdxl_merge_lora.py"),
        "other width": (tiny_sd15(), wide, [], "128 x 33, the model's is 128 x 32"),
    }[case]
    out = tmp_path / "out.safetensors"
    argv = ["--sd_model", model, "--models", loras, "--ratios", 1, "--save_to", out, *more]
    assert said in refusal(capsys, *argv)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_failing_write_leaves_the_file_that_was_there(capsys, tmp_path):
    """A weight that is infinite in fp16 is met in the middle of the file."""
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    argv = ["--sd_model", tiny_sd15(), "--models", file, "--ratios", 1e9, "--save_to", out, "--precision", "fp16"]
    assert "does not fit the number format" in refusal(capsys, *argv)
    assert out.read_bytes() == b"before"
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_is_damaged_is_named(capsys, tmp_path):
    model = tmp_path / "model.safetensors"
    key = places(open_tensors(tiny_sd15()), SD1)["lora_unet_mid_block_attentions_0_proj_in"].key
    tensors = load_file(tiny_sd15())
    save_file({**tensors, key: tensors[key] * torch.nan}, model)
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    argv = ["--sd_model", model, "--models", file, "--ratios", 1, "--save_to", tmp_path / "out.safetensors"]
    assert f"{model}: {key} holds numbers that are infinite or none at all" in refusal(capsys, *argv)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no limit on the size of files")
@pytest.mark.parametrize("into_model", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_file_that_was_there(capsys, tmp_path, into_model, ending):
    import resource

    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    out = tmp_path / f"out{ending}"
    out.write_bytes(b"before")
    model = ["--sd_model", tiny_sd15()] if into_model else []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = refusal(capsys, *model, "--models", file, "--ratios", 1, "--save_to", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out}: cannot be written" in said
    assert out.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [file, out]


@pytest.mark.parametrize("name", ["merge_lora", "sdxl_merge_lora", "svd_merge_lora", "extract_lora_from_models",
                                  "resize_lora", "check_lora_weights"])  # fmt: skip
def test_the_commands_run_as_files_from_anywhere(tmp_path, name):
    script = ROOT / "networks" / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}.py" in done.stdout
    assert "config_file" not in done.stdout


def test_a_weight_that_does_not_fit_the_files_number_format_is_refused(capsys, tmp_path):
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    out = tmp_path / "out.safetensors"
    argv = ["--sd_model", tiny_sd15(), "--models", file, "--ratios", 1e9, "--save_to", out, "--save_precision", "fp16"]
    assert "does not fit the number format" in refusal(capsys, *argv)
    assert not out.exists()


def test_the_sum_leaves_its_inputs_alone():
    """The file's tensors are mapped, and three layers may lie in one of them."""
    weight = torch.zeros(6, 2)
    down, up = torch.ones(1, 2), torch.ones(2, 1)
    module = modules_in({"x.lora_down.weight": down, "x.lora_up.weight": up}, "x")["x"]
    places = [Place("k", (2, 2), "text_encoder", third) for third in (0, 2, 2)]
    total = added(weight, [Addition(place, module, 1.0) for place in places])
    assert total[:, 0].tolist() == [1, 1, 0, 0, 2, 2]
    assert not weight.any()


@pytest.mark.parametrize("into_model", [True, False])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_place_that_cannot_be_written_to_ends_in_one_line(capsys, tmp_path, into_model, ending):
    file = write_random(tmp_path / "lora.safetensors", tiny_sd15())
    out = file / "folder" / f"out{ending}"  # a file where a folder is needed
    model = ["--sd_model", tiny_sd15()] if into_model else []
    said = refusal(capsys, *model, "--models", file, "--ratios", 1, "--save_to", out)
    assert f"{out}: cannot be written" in said
