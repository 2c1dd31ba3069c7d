import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import CheckpointError
from library.models import clip, clip_tokens
from library.models.family import ModelFamily
from library.models.sd import Sd
from tests.tiny_models import tiny_sd15, tiny_sd15_folder, tiny_sd21, tiny_sd21_folder

CAPTIONS = ["a photo of a cat", "a very big dog, on the grass"]


def load(family=None):
    family = family or Sd()
    return family.load(str(tiny_sd21() if family.v2 else tiny_sd15()), None, torch.float32)


@pytest.fixture(scope="module")
def parts():
    return load()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("v2", [False, True])
@torch.no_grad()
def test_text_unet_and_vae_agree_with_diffusers_own_single_file_loading(v2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' and transformers' own
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_single_file(
            str(tiny_sd21() if v2 else tiny_sd15()),
            config=str(tiny_sd21_folder() if v2 else tiny_sd15_folder()),
            local_files_only=True,
            safety_checker=None,
        )
    family = Sd(v2=v2)
    parts = load(family)
    tokens = family.tokenize(CAPTIONS)
    theirs = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokens[:, 0], theirs)
    text = family.encode_text(parts, tokens)
    torch.testing.assert_close(text, pipeline.text_encoder(theirs)[0], atol=1e-5, rtol=1e-5)
    # float64, because SD 2.x's projections are convolutions here and linear layers there, which round differently
    noisy, timesteps = draw(2, 4, 8, 8).double(), torch.tensor([7, 900])
    parts.denoiser.double()
    torch.nn.Module.double(pipeline.unet)
    output = family.predict(parts, noisy, timesteps, text.double(), None)
    torch.testing.assert_close(output, pipeline.unet(noisy, timesteps, text.double()).sample, atol=1e-9, rtol=1e-9)
    images = draw(2, 3, 64, 64).clamp(-1, 1)
    latents = family.encode_images(parts, images, torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(latents, pipeline.vae.encode(images).latent_dist.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.vae.decode(latents).sample, pipeline.vae.decode(latents).sample)


def test_sd_is_a_model_family():
    family: ModelFamily = Sd()
    assert (family.name, family.latent_space.channels, family.latent_space.scale) == ("sd", 4, 0.18215)


def test_the_family_is_built_from_the_model_options():
    model = types.SimpleNamespace(
        v2=True,
        v_parameterization=True,
        clip_skip=2,
        max_token_length=225,
        weighted_captions=True,
        tokenizer_cache_dir="somewhere",
        no_token_padding=True,
    )
    expected = Sd(True, True, 2, 225, True, "somewhere", pads_tokens=False)
    assert Sd.from_options(types.SimpleNamespace(model=model)) == expected


@torch.no_grad()
def test_clip_skip_2_is_the_last_layer_but_one_with_the_final_norm(parts):
    tokens = Sd().tokenize(CAPTIONS)
    encoder = clip.inner(parts.text_encoders[0])
    seen = []
    handle = encoder.encoder.layers[10].register_forward_hook(
        lambda module, arguments, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    skipped = Sd(clip_skip=2).encode_text(parts, tokens)
    handle.remove()
    torch.testing.assert_close(skipped, encoder.final_layer_norm(seen[0]))
    assert not torch.allclose(skipped, Sd().encode_text(parts, tokens), atol=1e-3)


@torch.no_grad()
def test_clip_skip_1_is_the_last_layer(parts):
    tokens = Sd().tokenize(CAPTIONS)
    assert torch.equal(Sd(clip_skip=1).encode_text(parts, tokens), Sd().encode_text(parts, tokens))


@torch.no_grad()
def test_every_window_of_a_long_caption_is_encoded_alone(parts):
    family = Sd(max_token_length=225)
    tokens = family.tokenize(["cat dog " * 60])
    text = family.encode_text(parts, tokens)
    assert text.shape == (1, 227, 32)
    windows = [clip.hidden_states(parts.text_encoders[0], tokens[:, index], None) for index in range(3)]
    torch.testing.assert_close(text[:, :76], windows[0][:, :76])
    torch.testing.assert_close(text[:, 76:151], windows[1][:, 1:76])
    torch.testing.assert_close(text[:, 151:], windows[2][:, 1:])


@torch.no_grad()
def test_a_weight_multiplies_its_tokens_states_and_no_others(parts):
    family = Sd(weighted_captions=True)
    plain = family.encode_text(parts, family.tokenize(["a cat sat"]))
    weighted = family.encode_text(parts, family.tokenize(["a (cat:1.5) sat"]))
    factor = torch.ones(77)
    factor[2] = 1.5
    torch.testing.assert_close(weighted, plain * factor[:, None])


@torch.no_grad()
def test_the_noise_decides_the_draw_of_a_latent(parts):
    images, noise = draw(1, 3, 64, 64), draw(1, 4, 8, 8)
    mean = Sd().encode_images(parts, images, torch.zeros_like(noise))
    drawn = Sd().encode_images(parts, images, noise)
    std = parts.vae.encode(images).latent_dist.std
    torch.testing.assert_close(drawn, mean + std * noise)
    assert not torch.equal(Sd().encode_images(parts, images), Sd().encode_images(parts, images))


def test_gradients_reach_the_text_encoder_through_the_unet():
    parts = load()
    weight = clip.inner(parts.text_encoders[0]).encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    text = Sd(max_token_length=150, clip_skip=2).encode_text(parts, Sd(max_token_length=150).tokenize(["a cat"]))
    Sd().predict(parts, draw(1, 4, 8, 8), torch.tensor([10]), text, None).square().mean().backward()
    assert weight.grad.abs().max() > 0


def gradient(parts):
    target = clip.inner(parts.text_encoders[0]).encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    text = Sd().encode_text(parts, Sd().tokenize(CAPTIONS))
    Sd().predict(parts, draw(2, 4, 8, 8), torch.tensor([10, 500]), text, None).square().mean().backward()
    return target.grad


def test_gradient_checkpointing_runs_the_blocks_twice_and_changes_no_gradient():
    expected = gradient(load())
    parts = load()
    Sd().enable_gradient_checkpointing(parts, train_text_encoder=True)
    runs = {"unet": 0, "text": 0}

    def count(name):
        def hook(module, arguments):
            runs[name] += 1

        return hook

    parts.denoiser.up_blocks[1].resnets[1].register_forward_pre_hook(count("unet"))
    clip.inner(parts.text_encoders[0]).encoder.layers[0].mlp.register_forward_pre_hook(count("text"))
    torch.testing.assert_close(gradient(parts), expected)
    assert runs == {"unet": 2, "text": 2}


@torch.no_grad()
def test_xformers_that_cannot_be_used_is_warned_about_and_sdpa_takes_over(caplog):
    parts = load()
    before = Sd().predict(parts, draw(1, 4, 8, 8), torch.tensor([10]), draw(1, 77, 32), None)
    Sd().set_attention(parts, "xformers")
    assert "--xformers cannot be used here" in caplog.text
    assert {type(processor).__name__ for processor in parts.denoiser.attn_processors.values()} == {"AttnProcessor2_0"}
    after = Sd().predict(parts, draw(1, 4, 8, 8), torch.tensor([10]), draw(1, 77, 32), None)
    assert torch.equal(before, after)


# ---- which VAE ----------------------------------------------------------------------------------------------------
def test_one_vae_has_one_identity_in_every_layout(tmp_path):
    tensors = load_file(tiny_sd15())
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    expected = Sd().vae_identity(str(tiny_sd15()), None)
    assert len(expected) == 32
    for checkpoint, vae in (
        (tiny_sd15_folder(), None),
        (tmp_path / "model.ckpt", None),
        (tiny_sd21(), tiny_sd15_folder() / "vae"),
    ):
        assert Sd().vae_identity(str(checkpoint), vae and str(vae)) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("first_stage_model.encoder.conv_out.weight", True),
        ("first_stage_model.quant_conv.bias", True),
        ("first_stage_model.encoder.mid.attn_1.q.weight", True),
        ("first_stage_model.decoder.conv_out.weight", False),
        ("model.diffusion_model.out.2.weight", False),
    ],
)
def test_the_identity_changes_with_the_encoder_only(tmp_path, name, changes):
    tensors = load_file(tiny_sd15())
    tensors[name] = tensors[name] * 1.01 + 0.001
    save_file(tensors, tmp_path / "changed.safetensors")
    identity = Sd().vae_identity(str(tmp_path / "changed.safetensors"), None)
    assert (identity != Sd().vae_identity(str(tiny_sd15()), None)) is changes


def test_a_vae_in_another_precision_is_another_vae(tmp_path):
    halved = {name: tensor.half() for name, tensor in load_file(tiny_sd15()).items()}
    save_file(halved, tmp_path / "half.safetensors")
    assert Sd().vae_identity(str(tmp_path / "half.safetensors"), None) != Sd().vae_identity(str(tiny_sd15()), None)


# ---- what identifies a text encoder ----------------------------------------------------------------------------


def test_whatever_decides_what_captions_become_is_in_the_text_identity(tmp_path):
    place = str(tiny_sd15())
    own = tmp_path / "tokenizers" / "openai_clip-vit-large-patch14"
    clip_tokens.write_vocabulary(own, clip_tokens.shipped_vocabulary())
    same = [Sd(), Sd(clip_skip=1), Sd(max_token_length=75), Sd(tokenizer_cache_dir=str(own.parent))]
    assert len({family.text_identity(place) for family in same}) == 1
    shipped = clip_tokens.shipped_vocabulary()
    shorter = clip_tokens.Vocabulary(shipped.ids, shipped.merges[:1000])
    clip_tokens.write_vocabulary(tmp_path / "others" / own.name, shorter)
    others = [Sd(clip_skip=2), Sd(max_token_length=150), Sd(weighted_captions=True)]
    others += [Sd(tokenizer_cache_dir=str(tmp_path / "others"))]
    assert len({family.text_identity(place) for family in [Sd(), *others]}) == 5


def test_a_text_encoder_is_the_same_in_a_file_and_a_folder_and_other_weights_are_another(tmp_path):
    identity = Sd().text_identity(str(tiny_sd15()))
    assert Sd().text_identity(str(tiny_sd15_folder())) == identity
    tensors = load_file(tiny_sd15())
    torch.save({"state_dict": tensors}, tmp_path / "pickled.ckpt")
    assert Sd().text_identity(str(tmp_path / "pickled.ckpt")) == identity
    old_names = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    assert old_names.keys() != tensors.keys()
    save_file(old_names, tmp_path / "old.safetensors")
    assert Sd().text_identity(str(tmp_path / "old.safetensors")) == identity
    name = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias"
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "other.safetensors")
    assert Sd().text_identity(str(tmp_path / "other.safetensors")) != identity


def test_the_text_encoder_of_sd2_has_its_identity_and_the_wrong_version_is_refused():
    assert Sd(v2=True).text_identity(str(tiny_sd21())) == Sd(v2=True).text_identity(str(tiny_sd21()))
    assert Sd(v2=True).text_identity(str(tiny_sd21_folder()))
    with pytest.raises(CheckpointError, match="--v2"):
        Sd().text_identity(str(tiny_sd21()))


def test_a_file_without_text_encoder_has_no_text_identity(tmp_path):
    tensors = {name: t for name, t in load_file(tiny_sd15()).items() if not name.startswith("cond_stage_model")}
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="text encoder"):
        Sd().text_identity(str(tmp_path / "bare.safetensors"))


def test_models_loaded_one_by_one_are_those_loaded_together(parts):
    place = str(tiny_sd15())
    alone = (
        Sd().load_denoiser(place, torch.float32),
        *Sd().load_text_encoders(place, torch.float32),
        Sd().load_vae(place, None, torch.float32),
    )
    for one, other in zip(alone, (parts.denoiser, *parts.text_encoders, parts.vae), strict=True):
        weights = other.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())
