"""The parts of an SD3 model put into one file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.sd3 import Sd3
from tests.lora_samples import error_line, metadata_of
from tests.tiny_models import tiny_sd3, tiny_sd3_apart, tiny_sd15, tiny_sdxl
from tools import merge_sd3_safetensors

KIND = "5-medium"
DIT = "model.diffusion_model."
PARTS = ("vae", "clip_l", "clip_g", "t5xxl")


def pack(out: Path, *more, dit: Path | None = None) -> dict[str, torch.Tensor]:
    """Return what is written of a denoiser and more."""
    argv = ["--dit", dit or tiny_sd3_apart(KIND) / "model.safetensors", "--output", out, *more]
    assert merge_sd3_safetensors.main([str(each) for each in argv]) == 0
    return load_file(out)


def refusal(capsys, out: Path, *argv) -> str:
    """Return the one line in which the arguments are refused."""
    assert merge_sd3_safetensors.main([str(each) for each in (*argv, "--output", out)]) == 2
    assert not out.exists()
    return error_line(capsys.readouterr().err)


def all_parts(folder: Path) -> list[str | Path]:
    """Return the options for all parts but the denoiser."""
    return [each for name in PARTS for each in (f"--{name}", folder / f"{name}.safetensors")]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize("kind", ["medium", "5-medium", "5-large"])
def test_the_parts_make_the_whole_model_bit_for_bit(kind, out) -> None:
    folder = tiny_sd3_apart(kind)
    found, wanted = pack(out, *all_parts(folder), dit=folder / "model.safetensors"), load_file(tiny_sd3(kind))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_the_file_loads_as_a_model(out) -> None:
    pack(out, *all_parts(tiny_sd3_apart(KIND)))
    parts = Sd3().load(str(out), None, torch.float32)
    whole = Sd3().load(str(tiny_sd3(KIND)), None, torch.float32)
    for ours, theirs in zip(
        (parts.denoiser, *parts.text_encoders), (whole.denoiser, *whole.text_encoders), strict=True
    ):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


def test_a_denoiser_without_prefix_gets_it(out, tmp_path) -> None:
    bare = load_file(tiny_sd3_apart(KIND) / "model.safetensors")
    save_file({name.removeprefix(DIT): tensor for name, tensor in bare.items()}, tmp_path / "bare.safetensors")
    assert pack(out, dit=tmp_path / "bare.safetensors").keys() == {f"{DIT}{n.removeprefix(DIT)}" for n in bare}


def test_what_the_denoisers_file_holds_is_kept_and_a_part_that_is_named_wins(out, tmp_path) -> None:
    before = load_file(tiny_sd3(KIND))
    other = {n: t + 1 for n, t in load_file(tiny_sd3_apart(KIND) / "clip_l.safetensors").items()}
    save_file(other, tmp_path / "clip_l.safetensors")
    found = pack(out, "--clip_l", tmp_path / "clip_l.safetensors", dit=tiny_sd3(KIND))
    prefix = "text_encoders.clip_l.transformer."
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        wanted = other[name.removeprefix(prefix)] if name.startswith(prefix) else before[name]
        assert torch.equal(tensor, wanted)


def test_parts_may_come_out_of_whole_models(out) -> None:
    whole = tiny_sd3(KIND)
    found = pack(out, *(each for name in PARTS for each in (f"--{name}", whole)))
    assert found.keys() == load_file(whole).keys()


def test_the_denoisers_metadata_are_kept(out, tmp_path) -> None:
    dit = tmp_path / "dit.safetensors"
    save_file(load_file(tiny_sd3_apart(KIND) / "model.safetensors"), dit, {"modelspec.title": "mine"})
    pack(out, dit=dit)
    assert metadata_of(out) == {"modelspec.title": "mine"}


def test_each_tensor_keeps_its_format_float8_included_unless_one_is_asked_for(out, tmp_path) -> None:
    t5 = load_file(tiny_sd3_apart(KIND) / "t5xxl.safetensors")
    for float8 in (torch.float8_e4m3fn, torch.float8_e5m2):
        narrow = {name: tensor.to(float8) for name, tensor in t5.items()}
        save_file(narrow, tmp_path / "t5.safetensors")
        found = pack(out, "--t5xxl", tmp_path / "t5.safetensors")
        prefix = "text_encoders.t5xxl.transformer."
        for name, tensor in narrow.items():
            assert found[prefix + name].dtype == float8
            assert torch.equal(found[prefix + name].float(), tensor.float())
        assert {t.dtype for n, t in found.items() if n.startswith(DIT)} == {torch.float32}
    found = pack(out, "--t5xxl", tmp_path / "t5.safetensors", "--save_precision", "bf16")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_names_without_their_text_model_level_get_it(out, tmp_path) -> None:
    clip = load_file(tiny_sd3_apart(KIND) / "clip_l.safetensors")
    save_file({name.removeprefix("text_model."): t for name, t in clip.items()}, tmp_path / "clip_l.safetensors")
    found = pack(out, "--clip_l", tmp_path / "clip_l.safetensors")
    assert {n for n in found if "text_encoders" in n} == {f"text_encoders.clip_l.transformer.{name}" for name in clip}


def test_factors_of_float8_weights_are_copied_or_worked_in(out, tmp_path) -> None:
    t5 = load_file(tiny_sd3_apart(KIND) / "t5xxl.safetensors")
    layer = "encoder.block.0.layer.0.SelfAttention.q."
    scaled = {**t5, f"{layer}weight": (t5[f"{layer}weight"] * 8).to(torch.float8_e4m3fn)}
    save_file({**scaled, f"{layer}scale_weight": torch.tensor(0.125)}, tmp_path / "t5.safetensors")
    prefix = f"text_encoders.t5xxl.transformer.{layer}"
    copied = pack(out, "--t5xxl", tmp_path / "t5.safetensors")
    assert copied[f"{prefix}weight"].dtype == torch.float8_e4m3fn
    assert float(copied[f"{prefix}scale_weight"]) == 0.125
    cast = pack(out, "--t5xxl", tmp_path / "t5.safetensors", "--save_precision", "float")
    assert f"{prefix}scale_weight" not in cast
    assert torch.equal(cast[f"{prefix}weight"], scaled[f"{layer}weight"].float() / 8)


def test_the_device_is_said_to_have_no_effect(out, caplog) -> None:
    pack(out, "--device", "cuda")
    assert "--device has no effect" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--dit is missing"),
        (("--dit", "clip_l"), "holds no MMDiT"),
        (("--dit", "model", "--vae", "clip_l"), "is no VAE"),
        (("--dit", "model", "--clip_l", "vae"), "holds no CLIP-L text encoder"),
        (("--dit", "model", "--clip_g", "t5xxl"), "holds no CLIP-G text encoder"),
        (("--dit", "model", "--t5xxl", "clip_g"), "holds no T5-XXL text encoder"),
        (("--dit", "model", "--clip_l", "clip_g", "--clip_g", "clip_l"), "They seem to be swapped"),
        (("--dit", "model", "--clip_l", "clip_l", "--clip_g", "clip_l"), "not CLIP-L of 32 and CLIP-G of 32"),
        (("--dit", "model", "--vae", "missing"), "there is no file"),
    ],
)
def test_a_wrong_part_is_refused_in_one_line(more, message, out, capsys) -> None:
    folder = tiny_sd3_apart(KIND)
    argv = [each if each.startswith("--") else folder / f"{each}.safetensors" for each in more]
    assert message in refusal(capsys, out, *argv)


@pytest.mark.parametrize("made", [tiny_sd15, tiny_sdxl])
def test_a_model_of_another_kind_is_refused(made, out, capsys) -> None:
    assert "Give a Stable Diffusion 3 model" in refusal(capsys, out, "--dit", made())
    dit = tiny_sd3_apart(KIND) / "model.safetensors"
    assert "latents of 4 channels, SD3's have 16" in refusal(capsys, out, "--dit", dit, "--vae", made())


def test_the_output_is_a_safetensors_file(tmp_path, capsys) -> None:
    dit = tiny_sd3_apart(KIND) / "model.safetensors"
    assert "the ending must be .safetensors" in refusal(capsys, tmp_path / "out.ckpt", "--dit", dit)
