"""LoRA files merged into SD3 models and with each other."""

from pathlib import Path

import pytest
import torch
from lora_samples import delta, deltas, error_line, linear_sum, metadata_of, worst_error, write_random
from safetensors.torch import load_file, save_file
from tiny_models import tiny_sd3, tiny_sd3_apart, tiny_sd15, tiny_sdxl

from library.models.checkpoint import Prefixed, open_tensors
from library.models.lora_targets import of_sd3
from library.models.mmdit import build
from networks import (
    check_lora_weights,
    extract_lora_from_models,
    lora_sd3,
    merge_lora,
    resize_lora,
    sd3_merge_lora,
    sdxl_merge_lora,
    svd_merge_lora,
)
from networks.checkpoint_places import SD3, places
from networks.files import modules_in

DIT = "model.diffusion_model."
TEXT = {f"lora_te{i}_": f"text_encoders.{name}.transformer." for i, name in enumerate(("clip_l", "clip_g", "t5xxl"), 1)}
KIND = "5-medium"


def merge(files, ratios, out, *more, model=None) -> dict[str, torch.Tensor]:
    """Return what sd3_merge_lora.py writes to out."""
    into = [] if model is None else ["--sd_model", model]
    argv = [*into, "--models", *files, "--ratios", *ratios, "--save_to", out, *more]
    assert sd3_merge_lora.main([str(each) for each in argv]) == 0
    return load_file(out)


def refusal(capsys, *argv) -> str:
    """Return the one line in which sd3_merge_lora.py refuses these arguments."""
    assert sd3_merge_lora.main([str(each) for each in argv]) == 2
    return error_line(capsys.readouterr().err)


def key_of(tensors, name: str) -> str:
    """Return the tensor that a module's name stands for, by rules of this test alone."""
    prefix, start = DIT, "lora_unet_"
    for text_start, text_prefix in TEXT.items():
        if name.startswith(text_start):
            prefix, start = text_prefix, text_start
    stem = name.removeprefix(start)
    (key,) = [
        key
        for key in tensors
        if key.startswith(prefix) and key[len(prefix) :].removesuffix(".weight").replace(".", "_") == stem
    ]
    return key


def changed(before, lora: Path, ratio: float) -> dict[str, torch.Tensor]:
    """Return a model's tensors with a LoRA added, in double precision."""
    wanted = {name: tensor.double() for name, tensor in before.items()}
    for name, module in modules_in(load_file(lora), "").items():
        key = key_of(before, name)
        wanted[key] = wanted[key] + ratio * delta(module).view(wanted[key].shape)
    return wanted


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_sd3(KIND)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model) -> Path:
    """A LoRA for everything in the tiny SD3.5 that one can adapt."""
    return write_random(tmp_path_factory.mktemp("lora") / "whole.safetensors", model, kind=SD3)


@pytest.fixture(scope="module")
def of_the_mmdit(tmp_path_factory, whole) -> Path:
    """Its part without the text encoders."""
    path = tmp_path_factory.mktemp("lora") / "mmdit.safetensors"
    save_file({name: tensor for name, tensor in load_file(whole).items() if "_unet_" in name}, path)
    return path


@pytest.mark.parametrize("kind", ["medium", "5-medium", "5-large"])
def test_each_weight_gets_its_share_and_the_rest_is_kept_bit_for_bit(kind, tmp_path) -> None:
    model = tiny_sd3(kind)
    lora = write_random(tmp_path / "lora.safetensors", model, kind=SD3)
    before, after = load_file(model), merge([lora], [-0.5], tmp_path / "out.safetensors", model=model)
    wanted = changed(before, lora, -0.5)
    touched = {key_of(before, name) for name in modules_in(load_file(lora), "")}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name in touched:
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=0, atol=1e-6)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    assert sum(name.startswith(DIT) for name in touched) > 40
    for prefix in TEXT.values():
        assert any(name.startswith(prefix) for name in touched)


def test_every_module_of_a_network_has_its_place(model) -> None:
    file = open_tensors(model)
    denoiser = build(Prefixed(file, DIT), torch.float32)
    found = places(file, SD3)
    targets = list(of_sd3([], denoiser))
    assert [name for name in found if "_unet_" in name] == [target.name for target in targets]
    assert all(found[target.name].shape == tuple(target.module.weight.shape) for target in targets)


def test_the_merged_model_computes_as_the_model_with_its_network(tmp_path, model, of_the_mmdit) -> None:
    latents, timesteps = torch.randn(1, 16, 8, 12), torch.tensor([500])
    plain = build(Prefixed(open_tensors(model), DIT), torch.float32)
    context, pooled = torch.randn(1, 7, plain.shape.context_width), torch.randn(1, plain.shape.pooled_width)
    network, _ = lora_sd3.create_network_from_weights(0.7, of_the_mmdit, None, [], plain)
    network.load_weights(of_the_mmdit)
    with network.attached():
        wanted = plain(latents, timesteps, context, pooled)
    merge([of_the_mmdit], [0.7], tmp_path / "out.safetensors", model=model)
    merged = build(Prefixed(open_tensors(tmp_path / "out.safetensors"), DIT), torch.float32)
    found = merged(latents, timesteps, context, pooled)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-3 * float(wanted.detach().abs().max()), rtol=0)
    assert not torch.allclose(found, plain(latents, timesteps, context, pooled), atol=1e-2)


def test_a_file_without_prefix_is_merged_into_like_one_with_it(tmp_path, model, of_the_mmdit) -> None:
    bare = {name.removeprefix(DIT): t for name, t in load_file(model).items() if name.startswith(DIT)}
    save_file(bare, tmp_path / "bare.safetensors")
    after = merge([of_the_mmdit], [1], tmp_path / "out.safetensors", model=tmp_path / "bare.safetensors")
    whole_file = merge([of_the_mmdit], [1], tmp_path / "whole.safetensors", model=model)
    assert after.keys() == bare.keys()
    assert all(torch.equal(tensor, whole_file[DIT + name]) for name, tensor in after.items())


def test_text_encoders_in_files_of_their_own_are_merged_into_files_of_their_own(tmp_path, model, whole) -> None:
    folder = tiny_sd3_apart(KIND)
    texts = []
    for name in ("clip_l", "clip_g", "t5xxl"):
        texts += [f"--{name}", folder / f"{name}.safetensors", f"--{name}_save_to", tmp_path / f"{name}.safetensors"]
    apart = merge([whole], [0.5], tmp_path / "model.safetensors", *texts, model=folder / "model.safetensors")
    together = merge([whole], [0.5], tmp_path / "together.safetensors", model=model)
    assert not any(name.startswith("text_encoders.") for name in apart)
    assert all(torch.equal(tensor, together[name]) for name, tensor in apart.items())
    for name in ("clip_l", "clip_g", "t5xxl"):
        written = load_file(tmp_path / f"{name}.safetensors")
        prefix = f"text_encoders.{name}.transformer."
        assert written.keys() == load_file(folder / f"{name}.safetensors").keys()
        assert all(torch.equal(tensor, together[prefix + key]) for key, tensor in written.items())


def test_a_text_encoder_that_no_file_holds_is_left_out_with_the_option_that_gives_it(
    tmp_path, whole, of_the_mmdit, caplog
) -> None:
    folder = tiny_sd3_apart(KIND)
    found = merge([whole], [1], tmp_path / "out.safetensors", model=folder / "model.safetensors")
    wanted = merge([of_the_mmdit], [1], tmp_path / "wanted.safetensors", model=folder / "model.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    for name in ("clip_l", "clip_g", "t5xxl"):
        assert f"its part is left out; give it with: --{name}" in caplog.text


def test_a_float8_model_is_merged_into(tmp_path, model, of_the_mmdit) -> None:
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dim() > 1 and "pos_embed" not in name else tensor
        for name, tensor in load_file(model).items()
    }
    save_file(narrow, tmp_path / "fp8.safetensors")
    after = merge(
        [of_the_mmdit],
        [1],
        tmp_path / "out.safetensors",
        "--save_precision",
        "bf16",
        model=tmp_path / "fp8.safetensors",
    )
    wanted = changed({name: tensor.float() for name, tensor in narrow.items()}, of_the_mmdit, 1)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-2, atol=1e-5)


def test_factors_of_float8_weights_are_worked_in(tmp_path, model, of_the_mmdit) -> None:
    before = load_file(model)
    name = f"{DIT}joint_blocks.1.x_block.mlp.fc1."
    narrow = (before[f"{name}weight"] * 8).to(torch.float8_e4m3fn)
    scaled = {**before, f"{name}weight": narrow, f"{name}scale_weight": torch.tensor(0.125)}
    save_file(scaled, tmp_path / "scaled.safetensors")
    after = merge([of_the_mmdit], [1], tmp_path / "out.safetensors", model=tmp_path / "scaled.safetensors")
    wanted = changed({**before, f"{name}weight": narrow.float() / 8}, of_the_mmdit, 1)
    assert after.keys() == before.keys()
    torch.testing.assert_close(after[f"{name}weight"].double(), wanted[f"{name}weight"], rtol=0, atol=1e-6)


def test_the_merged_model_says_what_it_is_and_was_made_of(tmp_path, model, whole) -> None:
    merge([whole], [1], tmp_path / "my-sd3.safetensors", model=model)
    header = metadata_of(tmp_path / "my-sd3.safetensors")
    assert header["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    assert header["modelspec.title"] == "my-sd3"
    assert header["modelspec.merged_from"].endswith(", whole")
    merge([whole], [1], tmp_path / "bare.safetensors", "--no_metadata", model=model)
    assert metadata_of(tmp_path / "bare.safetensors") == {}


def test_files_are_merged_with_each_other_by_their_ratios_and_keep_the_base_models_name(tmp_path, model) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, file in enumerate(files):
        write_random(file, model, kind=SD3, seed=seed)
        header = {"ss_base_model_version": KIND, "ss_network_module": "networks.lora_sd3"}
        save_file(load_file(file), file, header)
    out = tmp_path / "out.safetensors"
    for more in ((), ("--concat",), ("--shuffle",)):
        merge(files, [0.7, -0.3], out, *more)
        assert worst_error(deltas(out), linear_sum(files, [0.7, -0.3])) < 1e-5
    header = metadata_of(out)
    assert header["ss_base_model_version"] == KIND
    assert header["ss_network_module"] == "networks.lora_sd3"
    assert header["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"


def test_a_split_qkv_keeps_its_strength_when_files_are_merged(tmp_path, model, trained) -> None:
    denoiser = build(Prefixed(open_tensors(model), DIT), torch.float32)
    network = lora_sd3.create_network(1.0, 2, 1.0, None, [], denoiser, split_qkv="True")
    trained(network)
    network.save_weights(tmp_path / "split.safetensors", None, {"ss_base_model_version": KIND})
    merge([tmp_path / "split.safetensors"], [0.5], tmp_path / "half.safetensors")
    half = {name: tensor / 2 for name, tensor in deltas(tmp_path / "split.safetensors").items()}
    assert worst_error(deltas(tmp_path / "half.safetensors"), half) < 1e-6


def test_a_split_qkv_of_sd_scripts_is_taken_as_it_is_with_a_warning(tmp_path, model, trained, caplog) -> None:
    denoiser = build(Prefixed(open_tensors(model), DIT), torch.float32)
    network = lora_sd3.create_network(1.0, 2, 1.0, None, [], denoiser, split_qkv="True")
    trained(network)
    network.save_weights(tmp_path / "ours.safetensors", None, None)
    merge([tmp_path / "ours.safetensors"], [1], tmp_path / "out.safetensors")
    assert "a third" not in caplog.text
    tensors = load_file(tmp_path / "ours.safetensors")
    theirs = {name: t / 3 if name.endswith("qkv.alpha") else t for name, t in tensors.items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    merge([tmp_path / "theirs.safetensors"], [1], tmp_path / "out.safetensors")
    assert "act with a third of the strength" in caplog.text
    assert worst_error(deltas(tmp_path / "out.safetensors"), deltas(tmp_path / "theirs.safetensors")) < 1e-6


def test_the_commands_that_need_no_model_take_files_for_sd3(tmp_path, whole) -> None:
    out = tmp_path / "out.safetensors"
    assert svd_merge_lora.main(f"--models {whole} --ratios 0.5 --new_rank 2 --save_to {out}".split()) == 0
    assert worst_error(deltas(out), linear_sum([whole], [0.5])) < 1e-5
    assert metadata_of(out)["ss_network_module"] == "networks.lora_sd3"
    assert resize_lora.main(f"--model {whole} --new_rank 2 --save_to {out}".split()) == 0
    assert worst_error(deltas(out), deltas(whole)) < 1e-5
    assert merge_lora.main(f"--models {whole} --ratios 0.5 --save_to {out}".split()) == 0
    assert worst_error(deltas(out), linear_sum([whole], [0.5])) < 1e-5


def test_weights_are_listed(capsys, whole) -> None:
    assert check_lora_weights.main([str(whole)]) == 0
    assert "lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_up.weight" in capsys.readouterr().out


def test_weights_of_blocks_are_refused(tmp_path, capsys, whole) -> None:
    lists = f"[{','.join(['1'] * 12)}]"
    argv = f"--models {whole} --ratios 1 --save_to {tmp_path / 'out.safetensors'} --lbws {lists}".split()
    for command in (svd_merge_lora, sdxl_merge_lora):
        assert command.main(argv) == 2
        assert "there are no lists for SD3's blocks" in error_line(capsys.readouterr().err)


def test_nothing_is_extracted_from_sd3_models(tmp_path, capsys, model) -> None:
    argv = f"--model_org {model} --model_tuned {model} --save_to {tmp_path / 'out.safetensors'}"
    assert extract_lora_from_models.main(argv.split()) == 2
    assert "A LoRA can be extracted from models of" in error_line(capsys.readouterr().err)


def test_a_lora_of_the_embedders_alone_is_known_for_sd3(tmp_path, whole) -> None:
    alone = {name: tensor for name, tensor in load_file(whole).items() if "_embedder" in name or "final_layer" in name}
    save_file(alone, tmp_path / "alone.safetensors")
    merge([tmp_path / "alone.safetensors"], [1], tmp_path / "out.safetensors")
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_module"] == "networks.lora_sd3"


@pytest.mark.parametrize("command", [merge_lora, sdxl_merge_lora])
def test_other_commands_name_this_one_for_an_sd3_model(command, tmp_path, capsys, model, whole) -> None:
    argv = f"--sd_model {model} --models {whole} --ratios 1 --save_to {tmp_path / 'out.safetensors'}"
    assert command.main(argv.split()) == 2
    assert "Merge into it with networks/sd3_merge_lora.py" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("made", "command"), [(tiny_sd15, "networks/merge_lora.py"), (tiny_sdxl, "networks/sdxl_merge_lora.py")]
)
def test_a_model_of_another_kind_is_refused_with_its_command(made, command, tmp_path, capsys, whole) -> None:
    out = tmp_path / "out.safetensors"
    line = refusal(capsys, "--sd_model", made(), "--models", whole, "--ratios", 1, "--save_to", out)
    assert f"Merge into it with {command}" in line


@pytest.mark.parametrize("model_name", ["clip_l", "t5xxl", "vae"])
def test_a_part_of_a_model_is_refused(model_name, tmp_path, capsys, whole) -> None:
    part = tiny_sd3_apart(KIND) / f"{model_name}.safetensors"
    line = refusal(
        capsys, "--sd_model", part, "--models", whole, "--ratios", 1, "--save_to", tmp_path / "o.safetensors"
    )
    assert "holds no MMDiT" in line


def test_a_lora_for_another_kind_of_model_is_refused(tmp_path, capsys, model) -> None:
    lora = write_random(tmp_path / "sd15.safetensors", tiny_sd15())
    for into in (["--sd_model", model], []):
        line = refusal(capsys, *into, "--models", lora, "--ratios", 1, "--save_to", tmp_path / "out.safetensors")
        assert "is for Stable Diffusion 1.x or 2.x, not for SD3" in line


def test_a_lora_for_an_sd3_of_another_size_is_refused(tmp_path, capsys, model, whole) -> None:
    tensors = load_file(whole)
    wide = {name: torch.cat([t, t], 1) if t.dim() == 2 and "down" in name else t for name, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    out = tmp_path / "out.safetensors"
    line = refusal(
        capsys, "--sd_model", model, "--models", tmp_path / "wide.safetensors", "--ratios", 1, "--save_to", out
    )
    assert "Is it for another model?" in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clip_l", "FILE"], "--clip_l_save_to is missing"),
        (["--clip_g_save_to", "x.safetensors"], "--clip_g is missing"),
        (["--t5xxl", "FILE", "--t5xxl_save_to", "OUT"], "is to be written twice"),
        (["--clip_g", "FILE", "--clip_g_save_to", "x.safetensors"], "--clip_g FILE: holds no CLIP-G text encoder"),
        (["--lbws", "[1]"], "there are no lists of weights for SD3's blocks"),
    ],
)
def test_options_that_do_not_fit_are_refused(more, message, tmp_path, capsys, model, whole) -> None:
    vae, out = tiny_sd3_apart(KIND) / "vae.safetensors", tmp_path / "out.safetensors"
    names = {"FILE": str(vae), "OUT": str(out), "x.safetensors": str(tmp_path / "x.safetensors")}
    argv = ["--sd_model", model, "--models", whole, "--ratios", 1, "--save_to", out]
    line = refusal(capsys, *argv, *(names.get(each, each) for each in more))
    assert message.replace("FILE", str(vae)) in line
    assert not out.exists()


def test_a_text_encoder_that_nothing_is_added_to_is_refused(tmp_path, capsys, of_the_mmdit) -> None:
    folder = tiny_sd3_apart(KIND)
    line = refusal(
        capsys, "--sd_model", folder / "model.safetensors", "--models", of_the_mmdit, "--ratios", 1, "--save_to",
        tmp_path / "out.safetensors", "--clip_l", folder / "clip_l.safetensors", "--clip_l_save_to",
        tmp_path / "clip_l.safetensors",
    )  # fmt: skip
    assert "none of --models adapts CLIP-L" in line


def test_a_text_encoder_needs_a_model(tmp_path, capsys, whole) -> None:
    clip = tiny_sd3_apart(KIND) / "clip_l.safetensors"
    line = refusal(
        capsys, "--models", whole, "--ratios", 1, "--save_to", tmp_path / "out.safetensors", "--clip_l", clip,
        "--clip_l_save_to", tmp_path / "clip_l.safetensors",
    )  # fmt: skip
    assert "--clip_l needs --sd_model" in line
