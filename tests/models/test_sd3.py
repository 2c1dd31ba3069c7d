"""SD3 from its files: one with everything, files of their own, a diffusers folder; beside diffusers' pipeline."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.embedded_model import sd3 as maker
from library.batch import Batch, Share
from library.errors import CheckpointError
from library.models.family import Absent, Parts
from library.models.sd3 import Sd3
from library.models.sd3_text import ENCODERS
from tests.tiny_models import SD3, tiny_sd3, tiny_sd3_apart, tiny_sd3_folder, tiny_sd15, tiny_sdxl

CAPTIONS = ["a photo of a cat", "a very big dog, on the grass"]
KIND = "5-medium"
SIZES = torch.tensor([[64, 64]] * 2)
BATCH = Batch(("",) * 2, ("",) * 2, None, None, None, None, torch.ones(2), SIZES, SIZES, SIZES)


def family_of(checkpoint, **own) -> Sd3:
    return Sd3(checkpoint=str(checkpoint), **own)


def apart(kind=KIND, **changed) -> Sd3:
    """Return the family of a model whose parts have files of their own."""
    folder = tiny_sd3_apart(kind)
    files = {name: str(folder / f"{name}.safetensors") for name in ENCODERS} | changed
    return family_of(folder / "model.safetensors", text_files=tuple(files[name] for name in ENCODERS))


def load(family: Sd3, vae=None) -> Parts:
    return family.load(family.checkpoint, vae and str(vae), torch.float32)


@torch.no_grad()
def predicted(family: Sd3, parts: Parts, batch: Batch = BATCH) -> torch.Tensor:
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    text = family.encode_text(parts, family.tokenize(CAPTIONS))
    return family.predict(parts, noisy, torch.tensor([20, 700]), text, batch)


@pytest.fixture(scope="module")
def family() -> Sd3:
    return family_of(tiny_sd3(KIND))


@pytest.fixture(scope="module")
def parts(family: Sd3) -> Parts:
    return load(family)


# ---- beside diffusers ---------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("kind", SD3)
def test_text_and_prediction_are_those_of_diffusers_pipeline(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' and transformers' own
        from diffusers import SD3Transformer2DModel

        theirs = SD3Transformer2DModel.from_pretrained(tiny_sd3_folder(kind), subfolder="transformer").eval()
    family = family_of(tiny_sd3(kind))
    parts = load(family)
    text = family.encode_text(parts, family.tokenize(CAPTIONS))
    lg = torch.cat([text.clip_l, text.clip_g], dim=-1)
    states = torch.cat([torch.nn.functional.pad(lg, (0, text.t5.shape[-1] - lg.shape[-1])), text.t5], dim=1)
    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = torch.cat([text.pooled_l, text.pooled_g], dim=-1)
    expected = theirs(noisy, states, pooled, torch.tensor([20, 700])).sample
    torch.testing.assert_close(predicted(family, parts), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pictures_are_encoded_as_by_diffusers_vae(parts, family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL

        theirs = AutoencoderKL.from_pretrained(tiny_sd3_folder(KIND), subfolder="vae").eval()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = family.encode_images(parts, images, torch.zeros(1, 16, 8, 8))
    torch.testing.assert_close(mean, theirs.encode(images).latent_dist.mean)
    normalised = family.latent_space.normalise(mean)
    torch.testing.assert_close(normalised, (mean - theirs.config.shift_factor) * theirs.config.scaling_factor)


# ---- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SD3)
def test_one_file_files_of_their_own_and_a_folder_are_the_same_model(kind):
    whole, own, folder = family_of(tiny_sd3(kind)), apart(kind), family_of(tiny_sd3_folder(kind))
    expected = predicted(whole, load(whole))
    assert torch.equal(predicted(own, load(own, tiny_sd3_apart(kind) / "vae.safetensors")), expected)
    torch.testing.assert_close(predicted(folder, load(folder)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SD3)
@pytest.mark.parametrize("made", [tiny_sd3, tiny_sd3_folder])
def test_the_weights_tell_which_model_it_is(kind, made):
    assert family_of(made(kind)).base_model_version == kind


def test_a_bare_mmdit_without_prefix_is_the_same_model(family, parts, tmp_path):
    start = "model.diffusion_model."
    tensors = {k.removeprefix(start): v for k, v in load_file(tiny_sd3(KIND)).items() if k.startswith(start)}
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = family.load_denoiser(str(tmp_path / "bare.safetensors"), torch.float32)
    assert torch.equal(predicted(family, replace(parts, denoiser=bare)), predicted(family, parts))


def test_a_folder_may_keep_weights_in_several_files(family, parts, tmp_path):
    source = load_file(tiny_sd3_folder(KIND) / "text_encoder_3" / "model.safetensors")
    names = sorted(source)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (tmp_path / part).symlink_to(tiny_sd3_folder(KIND) / part)
    (tmp_path / "model_index.json").symlink_to(tiny_sd3_folder(KIND) / "model_index.json")
    (tmp_path / "text_encoder_3").mkdir()
    for file, own in shards.items():
        save_file({name: source[name] for name in own}, tmp_path / "text_encoder_3" / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(predicted(family_of(tmp_path), load(family_of(tmp_path))), predicted(family, parts))


def test_a_shard_that_is_missing_is_named(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    index = {"weight_map": {"proj_out.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model-00001-of-00001\.safetensors: no such file"):
        family_of(tmp_path).load_denoiser(str(tmp_path), torch.float32)


def test_a_file_that_is_named_wins_over_what_the_model_holds(family, parts, tmp_path):
    other = maker.write_apart(tmp_path, seed=1, precision="float", size=SD3[KIND])
    named = replace(family, text_files=(None, str(other / "clip_g.safetensors"), None))
    ours, theirs = (each.encode_text(load(each), each.tokenize(CAPTIONS)) for each in (family, named))
    same = {name: torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("clip_l", "clip_g", "t5")}
    assert same == {"clip_l": True, "clip_g": False, "t5": True}
    assert family.text_identity(family.checkpoint) != named.text_identity(family.checkpoint)


def test_a_missing_text_encoder_is_named_and_gives_zeros(caplog):
    family = apart(t5xxl=None)
    parts = replace(load(family, tiny_sd3_apart(KIND) / "vae.safetensors"))
    assert isinstance(parts.text_encoders[2], Absent)
    assert "T5-XXL is not in" in caplog.text
    assert "--t5xxl" in caplog.text
    with_zeros = apart()
    whole = load(with_zeros, tiny_sd3_apart(KIND) / "vae.safetensors")
    dropped = replace(BATCH, dropped_texts=torch.tensor([[False, False, True]] * 2))
    short = replace(with_zeros, t5_length=77)  # as many rows of zeros as stand for a missing T5
    torch.testing.assert_close(predicted(family, parts), predicted(short, whole, dropped))


def test_a_model_without_any_text_encoder_is_refused():
    family = apart(clip_l=None, clip_g=None, t5xxl=None)
    with pytest.raises(CheckpointError, match=r"holds no text encoder.*--clip_l, --clip_g and --t5xxl"):
        family.load_text_encoders(family.checkpoint, torch.float32)


def test_swapped_clips_are_recognised():
    own = apart()
    swapped = replace(own, text_files=(own.text_files[1], own.text_files[0], own.text_files[2]))
    with pytest.raises(CheckpointError, match="swapped"):
        swapped.load_text_encoders(swapped.checkpoint, torch.float32)


def test_a_t5_of_another_width_is_refused(tmp_path):
    size = replace(SD3[KIND], text=(32, 48, 128))
    other = maker.write_apart(tmp_path, precision="float", size=size) / "t5xxl.safetensors"
    family = apart(t5xxl=str(other))
    with pytest.raises(CheckpointError, match=r"96.*128"):
        family.load_text_encoders(family.checkpoint, torch.float32)


def test_a_file_of_another_encoder_is_refused():
    own = apart()
    family = replace(own, text_files=(own.text_files[2], *own.text_files[1:]))
    with pytest.raises(CheckpointError, match=r"--clip_l .*t5xxl\.safetensors: holds no CLIP-L"):
        family.load_text_encoders(family.checkpoint, torch.float32)


def test_another_familys_vae_is_refused(family):
    with pytest.raises(CheckpointError, match="4 channels, the model's have 16"):
        family.load_vae(family.checkpoint, str(tiny_sd15()), torch.float32)


@pytest.mark.parametrize(("file", "script"), [(tiny_sd15, "train_network"), (tiny_sdxl, "sdxl_train_network")])
def test_a_model_of_another_family_is_named_with_its_script(file, script):
    with pytest.raises(CheckpointError, match=script):
        Sd3().load_denoiser(str(file()), torch.float32)


def test_everything_that_is_written_is_read_again(family, parts, tmp_path):
    again = maker.write(tmp_path / "again.safetensors", precision="float", size=SD3[KIND])
    assert torch.equal(predicted(family, load(family_of(again))), predicted(family, parts))


# ---- what is drawn at each step -----------------------------------------------------------------------------------
def test_nothing_is_drawn_unless_asked_for(family):
    before = torch.get_rng_state()
    assert family.augmented(BATCH) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert (family.augmented(BATCH).dropped_texts, family.augmented(BATCH).crop_offset) == (None, None)


def test_each_encoder_is_left_out_at_its_own_rate():
    family = Sd3(dropout_rates=(0.0, 0.25, 1.0))
    torch.manual_seed(0)
    many = replace(BATCH, names=("",) * 4000)
    dropped = family.augmented(many).dropped_texts.float().mean(dim=0)
    assert dropped[0] == 0
    assert dropped[1] == pytest.approx(0.25, abs=0.03)
    assert dropped[2] == 1


def test_processes_that_share_a_batch_draw_what_one_would():
    family = Sd3(dropout_rates=(0.5, 0.5, 0.5), random_crop_rate=0.9)
    torch.manual_seed(3)
    whole = family.augmented(replace(BATCH, names=("",) * 5))
    for index in range(2):
        torch.manual_seed(3)
        share = Share(5, index, 2)
        own = family.augmented(replace(BATCH, names=("",) * 2, share=share))
        assert torch.equal(own.dropped_texts, whole.dropped_texts[share.rows])
        assert own.crop_offset == whole.crop_offset


def test_the_window_of_positions_lies_elsewhere_at_its_rate(family, parts):
    crops = [Sd3(random_crop_rate=0.5).augmented(BATCH).crop_offset for _ in range(400)]
    assert sum(crop is not None for crop in crops) == pytest.approx(200, abs=50)
    moved = replace(BATCH, crop_offset=next(crop for crop in crops if crop is not None))
    assert not torch.equal(predicted(family, parts, moved), predicted(family, parts))


# ---- cached text --------------------------------------------------------------------------------------------------
def test_the_cache_holds_all_text_where_no_encoder_is_trained(family, parts):
    frozen = replace(family, trains_clip=False)
    text = frozen.encode_text(parts, frozen.tokenize(CAPTIONS))
    again = frozen.text_of(frozen.text_outputs(text))
    assert all(torch.equal(getattr(text, name), getattr(again, name)) for name in ("clip_l", "pooled_g", "t5"))
    assert frozen.beside_cache(parts.text_encoders) == ()
    assert frozen.load_beside_cache(frozen.checkpoint, torch.float32) == ()


def test_clip_is_trained_beside_t5s_cached_part(family, parts):
    text = family.encode_text(parts, family.tokenize(CAPTIONS))
    known = family.text_outputs(text)
    assert list(known) == ["t5"]
    for left in (
        family.beside_cache(parts.text_encoders),
        family.load_beside_cache(family.checkpoint, torch.float32),
    ):
        assert [isinstance(each, Absent) for each in left] == [False, False, True]
        again = family.encode_text(replace(parts, text_encoders=left), family.tokenize(CAPTIONS), known)
        assert all(torch.equal(getattr(text, name), getattr(again, name)) for name in ("clip_l", "pooled_g", "t5"))


def test_t5_stands_where_it_is_told_to(family):
    elsewhere = replace(family, t5_device=torch.device("cpu"))
    gpu = torch.device("cuda:1")
    assert [elsewhere.text_device(i, gpu) for i in range(3)] == [gpu, gpu, torch.device("cpu")]
    assert family.text_device(2, gpu) == gpu


def test_encoders_to_be_saved_come_under_their_files_names(parts):
    family = family_of(tiny_sd3(KIND), saved_texts=("clip_l", "t5xxl"))
    tensors = family.text_tensors(parts.text_encoders)
    assert list(tensors) == ["clip_l", "t5xxl"]
    stored = load_file(tiny_sd3_apart(KIND) / "clip_l.safetensors")
    assert tensors["clip_l"].keys() == stored.keys()
    assert all(torch.equal(tensors["clip_l"][name], stored[name]) for name in stored)
