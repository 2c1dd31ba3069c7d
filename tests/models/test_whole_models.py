"""What is trained whole is written so that it loads again, here and elsewhere, and nothing of the source is lost."""

import itertools
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import largest_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import CheckpointError, UserError
from library.models import clip, pickling, whole_model
from library.models.family import Parts
from library.models.sd import Sd
from library.models.whole_model import FORMS, Kept
from library.training.saving import saved_file, saved_folder
from tests.models.reference import base_keys, full_size, read
from tests.models.whole_models import (
    FAMILIES,
    OPENCLIP,
    TEXT,
    assert_same,
    loaded,
    pipeline_of,
    save,
    source,
    tensors_of,
    trained,
)
from tests.tiny_models import tiny_sd15, tiny_sd21

EXTRAS = {  # as files of SD 1.x have them
    f"{TEXT}text_model.embeddings.position_ids": torch.arange(77)[None],
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelinput_blocks00bias": torch.randn(5).half(),
    "alphas_cumprod": torch.linspace(1, 0, 9, dtype=torch.float64),
    "model.diffusion_model.of_a_later_version": torch.randn(3).bfloat16(),
    "first_stage_model.loss.logvar": torch.zeros(()),
}


def with_extras(path: Path, extras: dict[str, torch.Tensor] = EXTRAS) -> Path:
    save_file(load_file(tiny_sd15()) | extras, path)
    return path


# ---- the round trip -----------------------------------------------------------------------------------------------
# each model, each kind of source and each form at least once; the others are slow
QUICK = (
    ("1", False, "safetensors"), ("1", True, "ckpt"), ("2v", False, "diffusers"), ("2v", True, "safetensors"),
    ("xl", False, "safetensors"), ("xl", True, "diffusers_safetensors"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "is_folder", "form"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(["1", "2v", "xl"], [False, True], FORMS)
    ],
)
def test_what_is_written_loads_again_with_equal_tensors(tmp_path, model, is_folder, form):
    family, place = FAMILIES[model], source(model, is_folder)
    parts = trained(family, place)
    path = save(family, parts, family.kept(str(place)), tmp_path, form)
    assert_same(loaded(family, path), tensors_of(family, parts))


@pytest.mark.parametrize("form", FORMS)
def test_a_ckpt_is_a_source_as_any_other(tmp_path, form):
    torch.save({"state_dict": load_file(tiny_sd15())}, tmp_path / "source.ckpt")
    parts = trained(Sd(), tmp_path / "source.ckpt")
    path = save(Sd(), parts, Sd().kept(str(tmp_path / "source.ckpt")), tmp_path, form)
    assert_same(loaded(Sd(), path), tensors_of(Sd(), parts))


@pytest.mark.parametrize("form", FORMS)
def test_the_source_is_not_read_again(tmp_path, form):
    checkpoint = with_extras(tmp_path / "source.safetensors")
    parts, kept = trained(Sd(), checkpoint), Sd().kept(str(checkpoint))
    wanted = {name: tensor.clone() for name, tensor in tensors_of(Sd(), parts).items()}
    checkpoint.unlink()
    assert_same(loaded(Sd(), save(Sd(), parts, kept, tmp_path, form)), wanted)


def test_what_is_kept_does_not_change_with_the_file(tmp_path):
    checkpoint = with_extras(tmp_path / "source.safetensors")
    kept = Sd().kept(str(checkpoint))
    size = checkpoint.stat().st_size
    with checkpoint.open("rb+") as file:
        file.seek(size - 3_000_000)
        file.write(bytes(3_000_000))
    assert_same(dict(kept.tensors), EXTRAS)


def test_a_folder_that_is_gone_is_not_missed(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source("1", is_folder=True), folder)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**scheduler, "beta_end": 0.02}))
    parts, kept = trained(Sd(), folder), Sd().kept(str(folder))
    shutil.rmtree(folder)
    path = save(Sd(), parts, kept, tmp_path, "diffusers_safetensors")
    assert pipeline_of(path).scheduler.config.beta_end == 0.02
    assert_same(loaded(Sd(), path), tensors_of(Sd(), parts))


# ---- what is in the file ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_what_is_not_trained_is_kept_bit_for_bit(tmp_path, form):
    checkpoint = with_extras(tmp_path / "source.safetensors")
    kept = Sd().kept(str(checkpoint))
    path = save(Sd(), trained(Sd(), checkpoint), kept, tmp_path, form, torch.float16)
    written = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert written.keys() == load_file(checkpoint).keys()
    assert_same({name: written[name] for name in EXTRAS}, EXTRAS)
    assert {tensor.dtype for name, tensor in written.items() if name not in EXTRAS} == {torch.float16}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_cast_to_the_dtype_of_the_file(tmp_path, form):
    parts = trained(Sd(), tiny_sd15())
    path = save(Sd(), parts, Sd().kept(str(tiny_sd15())), tmp_path, form, torch.bfloat16)
    half = {name: tensor.bfloat16().float() for name, tensor in tensors_of(Sd(), parts).items()}
    assert_same(loaded(Sd(), path), half)
    if form == "diffusers_safetensors":
        for file in path.glob("*/*.safetensors"):
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
        assert json.loads((path / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_names_of_a_true_size_model_are_the_references(tmp_path):
    denoiser, text, vae = full_size("sd15")
    pieces = Sd().whole_pieces(Parts(denoiser, (text,), vae), Kept())
    layout = whole_model.layout_of(pieces, torch.float16)
    assert {name: list(shape) for name, (_, shape) in layout.items()} == base_keys("sd15")


def test_sd2s_text_encoder_is_written_whole_where_the_source_had_only_what_is_used():
    denoiser, text, vae = full_size("sd21")
    layout = whole_model.layout_of(Sd(v2=True).whole_pieces(Parts(denoiser, (text,), vae), Kept()), None)
    wanted = base_keys("sd21") | read("models/base_keys_sd21.json.gz")["optional_ignored_by_kohya"]
    assert {name: list(shape) for name, (_, shape) in layout.items()} == wanted


def test_the_unused_layer_is_a_copy_of_the_one_before_it(tmp_path):
    family = FAMILIES["2"]
    parts = trained(family, tiny_sd21())
    written = load_file(save(family, parts, family.kept(str(tiny_sd21())), tmp_path, "safetensors"))
    start = f"{OPENCLIP}transformer.resblocks."
    last = {name.removeprefix(f"{start}23."): tensor for name, tensor in written.items() if f"{start}23." in name}
    assert len(last) == 12
    assert_same(last, {name: written[f"{start}22.{name}"] for name in last})
    assert torch.equal(written[f"{OPENCLIP}text_projection"], torch.eye(32))


def test_the_unused_layer_of_the_source_is_kept(tmp_path):
    tail = {
        f"{OPENCLIP}transformer.resblocks.23.{name}": torch.randn(tensor.shape).half()
        for name, tensor in (
            (name.partition("resblocks.22.")[2], tensor)
            for name, tensor in load_file(tiny_sd21()).items()
            if ".resblocks.22." in name
        )
    } | {f"{OPENCLIP}text_projection": torch.randn(32, 32).half(), f"{OPENCLIP}logit_scale": torch.tensor(4.0)}
    save_file(load_file(tiny_sd21()) | tail, tmp_path / "source.safetensors")
    family = FAMILIES["2"]
    parts = trained(family, tmp_path / "source.safetensors")
    assert len(clip.inner(parts.text_encoders[0]).encoder.layers) == 23
    path = save(family, parts, family.kept(str(tmp_path / "source.safetensors")), tmp_path, "safetensors")
    written = load_file(path)
    assert written.keys() == load_file(tmp_path / "source.safetensors").keys()
    assert_same({name: written[name] for name in tail}, tail)


def test_an_old_files_names_are_written_as_they_are_today(tmp_path):
    today = load_file(with_extras(tmp_path / "a.safetensors"))
    old = {name.replace("text_model.", ""): tensor for name, tensor in today.items()}
    save_file(old, tmp_path / "old.safetensors")
    parts = trained(Sd(), tmp_path / "old.safetensors")
    path = save(Sd(), parts, Sd().kept(str(tmp_path / "old.safetensors")), tmp_path, "safetensors")
    assert load_file(path).keys() == load_file(tmp_path / "a.safetensors").keys()


def test_sdxls_logit_scale_is_the_sources(tmp_path):
    family, name = FAMILIES["xl"], "conditioner.embedders.1.model.logit_scale"
    save_file(load_file(source("xl")) | {name: torch.tensor(3.0)}, tmp_path / "source.safetensors")
    parts = trained(family, tmp_path / "source.safetensors")
    path = save(family, parts, family.kept(str(tmp_path / "source.safetensors")), tmp_path, "safetensors")
    assert load_file(path)[name] == 3.0
    assert load_file(path).keys() == load_file(source("xl")).keys()


def test_the_metadata_is_in_the_header_of_safetensors(tmp_path):
    parts = trained(Sd(), tiny_sd15())
    path = save(Sd(), parts, Sd().kept(str(tiny_sd15())), tmp_path, "safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"modelspec.title": "cat"}


def test_a_ckpt_counts_on_from_its_source(tmp_path):
    torch.save({"state_dict": load_file(tiny_sd15()), "epoch": 10, "global_step": 1000}, tmp_path / "source.ckpt")
    parts = trained(Sd(), tmp_path / "source.ckpt")
    kept = Sd().kept(str(tmp_path / "source.ckpt"))
    path = save(Sd(), parts, kept, tmp_path, "ckpt", place=(7, 2))
    content = torch.load(path, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (12, 1007)
    other = Sd().kept(str(tiny_sd15()))
    (tmp_path / "other").mkdir()
    content = torch.load(save(Sd(), parts, other, tmp_path / "other", "ckpt", place=(7, 2)), weights_only=True)
    assert (content["epoch"], content["global_step"]) == (2, 7)


def test_a_source_without_a_whole_unet_is_told(tmp_path):
    broken = {name: tensor for name, tensor in load_file(tiny_sd15()).items() if ".input_blocks.1." not in name}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"broken.safetensors: the U-Net's tensors do not have the structure"):
        Sd().kept(str(tmp_path / "broken.safetensors"))


# ---- other programs -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form == "safetensors" else pytest.mark.slow) for form in FORMS]
)
@pytest.mark.parametrize("model", ["1", "2v", "xl"])
@torch.no_grad()
def test_diffusers_makes_the_same_of_what_is_written(tmp_path, model, form):
    family = FAMILIES[model]
    parts = trained(family, source(model))
    path = save(family, parts, family.kept(str(source(model))), tmp_path, form)
    if form in whole_model.FOLDERS:
        pipeline = pipeline_of(path)
        assert pipeline.scheduler.config.prediction_type == family.prediction_type
        assert pipeline.vae.config.scaling_factor == family.latent_space.scale
        wide = {"1": 64, "2v": 96, "xl": 128}[model]
        assert pipeline.unet.config.sample_size == wide
    else:
        pipeline = pipeline_of(path, source(model, is_folder=True))
    tokens = family.tokenize(["a photo of a cat!"])
    text = family.encode_text(parts, tokens)
    own = tokens[:, 0] if model != "xl" else tokens[:, 0, 0]
    theirs = pipeline.tokenizer(["a photo of a cat!"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(theirs, own)
    if model == "xl":
        states, _, pooled, _ = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
        text = family.encode_text(parts, family.tokenize(["a cat"]))
        torch.testing.assert_close(states, torch.cat(text[:2], dim=-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, text[2], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(pipeline.text_encoder(theirs)[0], text, atol=1e-5, rtol=1e-5)
    sizes = torch.tensor([[64, 64]])
    batch = SimpleNamespace(original_sizes=sizes, crop_top_lefts=sizes * 0, target_sizes=sizes)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    predictions = [
        family.predict(Parts(denoiser, (), None), noisy, torch.tensor([500]), text, batch)
        for denoiser in (parts.denoiser, pipeline.unet)
    ]
    torch.testing.assert_close(*predictions, atol=1e-4, rtol=1e-4)
    theirs, ours = pipeline.unet.state_dict(), parts.denoiser.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].reshape(theirs[name].shape)) for name in ours)
    assert_same(pipeline.vae.state_dict(), parts.vae.state_dict())


def test_every_version_of_transformers_finds_its_names_in_a_folder(tmp_path):
    parts = trained(Sd(), tiny_sd15())
    path = save(Sd(), parts, Sd().kept(str(tiny_sd15())), tmp_path, "diffusers_safetensors")
    names = load_file(path / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (path / "tokenizer").iterdir()}


def test_a_tokenizer_that_newer_versions_saved_is_written_for_older_ones_too(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source("1", is_folder=True), folder)
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path / "new")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tmp_path / "new", folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    parts = trained(Sd(), folder)
    path = save(Sd(), parts, Sd().kept(str(folder)), tmp_path, "diffusers")
    words = json.loads((path / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert words == json.loads((source("1", is_folder=True) / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))


def test_no_file_says_where_the_source_was(tmp_path):
    folder = source("1", is_folder=True)
    path = save(Sd(), trained(Sd(), folder), Sd().kept(str(folder)), tmp_path, "diffusers")
    assert not [file for file in path.rglob("*.json") if str(folder.parent) in file.read_text(encoding="utf-8")]


# ---- the pickled file ---------------------------------------------------------------------------------------------
DTYPES = [*pickling.STORAGES, torch.float8_e4m3fn, torch.float8_e5m2]


def test_torch_reads_every_kind_of_tensor_from_a_pickled_file(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"one": torch.tensor(2.5), "none": torch.empty(0, 4), "wide": torch.rand(3, 4, 5, 1)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pickling.fill(tmp_path / "a.bin", layout, tensors.__getitem__, None, "save")
    for is_mapped in (False, True):
        read_back = torch.load(tmp_path / "a.bin", weights_only=True, mmap=is_mapped)
        assert list(read_back) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(read_back[name].float(), tensor.float()), name
            assert (read_back[name].dtype, read_back[name].stride()) == (tensor.dtype, tensor.stride()), name


def test_a_pickled_file_is_a_sound_zip_archive_with_aligned_tensors(tmp_path):
    tensors = {"a": torch.rand(5), "b": torch.rand(7)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    pickling.fill(tmp_path / "a.ckpt", layout, tensors.__getitem__, {"epoch": 1}, "save")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
        assert b"builtins" not in archive.read("archive/data.pkl")
    content = (tmp_path / "a.ckpt").read_bytes()
    for tensor in tensors.values():
        assert content.index(tensor.numpy().tobytes()) % pickling.ALIGNMENT == 0


# ---- failures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_a_write_that_fails_half_way_leaves_the_old_model_whole(tmp_path, form):
    parts, kept = trained(Sd(), tiny_sd15()), Sd().kept(str(tiny_sd15()))
    old = save(Sd(), parts, kept, tmp_path, form)
    before = {file: file.read_bytes() for file in (old.rglob("*") if old.is_dir() else [old]) if file.is_file()}
    place = saved_folder(old) if old.is_dir() else saved_file(old)
    with pytest.raises(UserError, match="cannot be saved: File too large"), largest_file(2_500_000), place as partial:
        Sd().save_whole(parts, kept, partial, form=form, dtype=None, metadata={}, place=(1, 1))
    assert list(tmp_path.iterdir()) == [old]
    assert {file: file.read_bytes() for file in before} == before
