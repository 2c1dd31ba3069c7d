import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.batch import Batch
from library.errors import CheckpointError
from library.models import clip, lora_targets, unet, vae
from library.models.family import ModelFamily, Parts
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout
from library.models.sd import Sd
from library.models.sdxl import Sdxl, original_tensors
from networks.blocks import layout_of
from tests.models.reference import Shapes, base_keys, read
from tests.tiny_models import tiny_sd15, tiny_sd15_folder, tiny_sdxl, tiny_sdxl_folder

CAPTIONS = ["a photo of a cat", "a very big dog, on the grass"]


def load(family=None, checkpoint=None):
    return (family or Sdxl()).load(str(checkpoint or tiny_sdxl()), None, torch.float32)


@pytest.fixture(scope="module")
def parts():
    return load()


@pytest.fixture(scope="module")
def pipeline():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' and transformers' own
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline.from_single_file(
            str(tiny_sdxl()), config=str(tiny_sdxl_folder()), local_files_only=True, add_watermarker=False
        )


@pytest.fixture(scope="module")
def true_size():
    """Return SDXL's parts without memory, built from nothing but the reference's names and shapes."""
    shapes = base_keys("sdxl")
    first, second = (Shapes(shapes, prefix) for prefix in clip_layout.SDXL_PREFIXES)
    text_encoders = clip.build(first, torch.float32), clip.build_openclip(second, torch.float32, has_projection=True)
    denoiser = unet.build(Shapes(shapes, unet_layout.PREFIX), True, torch.float32, pooled_width=1280)
    return Parts(denoiser, text_encoders, vae.build(Shapes(shapes, ""), torch.float32))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sized(original, top_left, target):
    """Return a batch of two images of which only the sizes are known."""
    pair = [torch.tensor([size, size]) for size in (original, top_left, target)]
    return Batch(("",) * 2, ("",) * 2, None, None, None, None, torch.ones(2), *pair)


BATCH = sized((900, 1600), (0, 52), (64, 96))


# ---- beside diffusers ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_both_texts_and_the_pooled_text_are_those_of_diffusers_pipeline(parts, pipeline):
    states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    first, second, ours = Sdxl().encode_text(parts, Sdxl().tokenize(CAPTIONS))
    torch.testing.assert_close(torch.cat([first, second], dim=-1), states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_prediction_is_that_of_diffusers_pipeline(parts, pipeline):
    text = Sdxl().encode_text(parts, Sdxl().tokenize(CAPTIONS))
    ids = pipeline._get_add_time_ids(
        (900, 1600), (0, 52), (64, 96), torch.float32, parts.text_encoders[1].config.projection_dim
    )
    noisy, timesteps = draw(2, 4, 8, 12), torch.tensor([7, 900])
    theirs = pipeline.unet(
        noisy,
        timesteps,
        encoder_hidden_states=torch.cat(text[:2], dim=-1),
        added_cond_kwargs={"text_embeds": text[2], "time_ids": ids.repeat(2, 1)},
    ).sample
    torch.testing.assert_close(Sdxl().predict(parts, noisy, timesteps, text, BATCH), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latents_are_those_of_diffusers_vae(parts, pipeline):
    images = draw(2, 3, 64, 64).clamp(-1, 1)
    latents = Sdxl().encode_images(parts, images, torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(latents, pipeline.vae.encode(images).latent_dist.mean, atol=1e-5, rtol=1e-5)
    assert Sdxl.latent_space.scale == pipeline.vae.config.scaling_factor


# ---- true size ----------------------------------------------------------------------------------------------------
def test_a_real_checkpoints_names_and_shapes_come_out_as_they_went_in(true_size):
    written = {name: list(tensor.shape) for name, tensor in original_tensors(true_size).items()}
    assert written == base_keys("sdxl")


def test_every_name_of_the_unet_translates_there_and_back():
    shapes = Shapes(base_keys("sdxl"), unet_layout.PREFIX).shapes
    table = unet_layout.unet_table(unet_layout.blocks_of(shapes))
    assert [table.to_original(table.to_library(name)) for name in shapes] == list(shapes)


def test_the_architecture_is_read_from_the_shapes(true_size):
    config = true_size.denoiser.config
    assert config.block_out_channels == [320, 640, 1280]
    assert config.transformer_layers_per_block == [1, 2, 10]
    assert config.attention_head_dim == [5, 10, 20]
    assert (config.cross_attention_dim, config.projection_class_embeddings_input_dim) == (2048, 2816)
    assert config.addition_time_embed_dim == 256
    first, second = (text_encoder.config for text_encoder in true_size.text_encoders)
    assert (first.num_hidden_layers, first.num_attention_heads, first.hidden_act) == (12, 12, "quick_gelu")
    assert (second.num_hidden_layers, second.num_attention_heads, second.hidden_act) == (32, 20, "gelu")
    assert second.projection_dim == 1280


@pytest.mark.parametrize("variant", ["default", "conv", "unet_only", "unet_only+conv"])
def test_lora_targets_are_the_references_in_its_order(true_size, variant):
    wanted = read("networks/lora_keys_sdxl.json.gz")["variants"][variant]
    targets = [
        target
        for target in Sdxl().lora_targets(true_size)
        if ("conv" in variant or target.kind == "attention") and ("only" not in variant or target.group == "unet")
    ]
    assert [target.name for target in targets] == [n.removesuffix(".alpha") for n in wanted if n.endswith(".alpha")]
    for target in targets:
        down = wanted[f"{target.name}.lora_down.weight"]
        assert list(target.module.weight.shape[1:]) == down[1:], target.name


def test_the_targets_of_models_of_unknown_family_are_the_same(true_size):
    found = list(lora_targets.of(true_size.text_encoders, true_size.denoiser))
    assert [(each.name, each.encoder) for each in found] == [
        (each.name, each.encoder) for each in Sdxl().lora_targets(true_size)
    ]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_unet_input_blocks_1_0_in_layers_2", 2),
        ("lora_unet_input_blocks_3_0_op", 4),
        ("lora_unet_input_blocks_8_1_proj_in", 9),
        ("lora_unet_middle_block_0_in_layers_2", 10),
        ("lora_unet_middle_block_1_proj_in", 11),
        ("lora_unet_middle_block_2_out_layers_3", 12),
        ("lora_unet_output_blocks_0_1_proj_in", 13),
        ("lora_unet_output_blocks_5_2_conv", 18),
        ("lora_unet_output_blocks_8_0_skip_connection", 21),
    ],
)
def test_a_target_stands_at_its_place_among_the_23_blocks(true_size, name, block):
    blocks = {target.name: target.block for target in Sdxl().lora_targets(true_size)}
    assert blocks[name] == block
    assert layout_of(blocks).num_blocks == 23


def test_a_target_goes_by_diffusers_name_too(true_size):
    aliases = {target.name: target.alias for target in Sdxl().lora_targets(true_size)}
    assert aliases["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    )
    assert aliases["lora_unet_output_blocks_2_2_conv"] == "lora_unet_up_blocks_0_upsamplers_0_conv"
    assert aliases["lora_te1_text_model_encoder_layers_0_mlp_fc1"] is None


# ---- the family ---------------------------------------------------------------------------------------------------
def test_sdxl_is_a_model_family():
    family: ModelFamily = Sdxl()
    assert (family.name, family.latent_space.channels, family.latent_space.scale) == ("sdxl", 4, 0.13025)
    assert (family.base_model_version, family.bucket_step_multiple) == ("sdxl_base_v1-0", 32)


def test_the_family_is_built_from_the_model_options():
    model = types.SimpleNamespace(
        v_parameterization=True,
        max_token_length=225,
        weighted_captions=True,
        tokenizer_cache_dir="somewhere",
        disable_mmap_load_safetensors=True,
    )
    assert Sdxl.from_options(types.SimpleNamespace(model=model)) == Sdxl(True, 225, True, "somewhere", False)


def test_captions_give_the_references_tokens_of_both_tokenizers():
    cases = read("models/tokens_sdxl.json.gz")["tokenize"]
    assert len(cases) > 20
    for case in cases:
        tokens = Sdxl(max_token_length=case["max_token_length"]).tokenize([case["text"]])[0]
        assert tokens[:, 0].tolist() == case["ids"], case["text"]
        assert tokens[:, 1].tolist() == case["ids2"], case["text"]


@torch.no_grad()
def test_every_window_is_encoded_alone_and_the_first_is_pooled(parts):
    long = Sdxl(max_token_length=225)
    caption = "cat dog " * 60
    first, second, pooled = long.encode_text(parts, long.tokenize([caption]))
    assert (first.shape, second.shape, pooled.shape) == ((1, 227, 32), (1, 227, 48), (1, 48))
    one = Sdxl().encode_text(parts, Sdxl().tokenize([caption]))
    torch.testing.assert_close(first[:, :76], one[0][:, :76])
    torch.testing.assert_close(second[:, :76], one[1][:, :76])
    torch.testing.assert_close(pooled, one[2])


@torch.no_grad()
def test_a_weight_multiplies_its_tokens_states_in_both_texts_and_not_the_pooled_one(parts):
    family = Sdxl(weighted_captions=True)
    plain = family.encode_text(parts, family.tokenize(["a cat sat"]))
    weighted = family.encode_text(parts, family.tokenize(["a (cat:1.5) sat"]))
    factor = torch.ones(77)
    factor[2] = 1.5
    torch.testing.assert_close(weighted[0], plain[0] * factor[:, None])
    torch.testing.assert_close(weighted[1], plain[1] * factor[:, None])
    torch.testing.assert_close(weighted[2], plain[2])


@pytest.mark.parametrize(
    "other",
    [
        sized((901, 1600), (0, 52), (64, 96)),
        sized((900, 1600), (1, 52), (64, 96)),
        sized((900, 1600), (0, 52), (64, 97)),
    ],
    ids=["file", "crop", "bucket"],
)
@torch.no_grad()
def test_sizes_and_crop_are_told_to_the_unet(parts, other):
    text = Sdxl().encode_text(parts, Sdxl().tokenize(CAPTIONS))
    noisy, timesteps = draw(2, 4, 8, 12), torch.tensor([7, 900])
    here, there = (Sdxl().predict(parts, noisy, timesteps, text, batch) for batch in (BATCH, other))
    assert not torch.allclose(here, there, atol=1e-6)


def gradients(parts):
    encoders = [clip.inner(text_encoder).encoder.layers[0].mlp.fc1.weight for text_encoder in parts.text_encoders]
    for weight in encoders:
        weight.requires_grad_(True)
    text = Sdxl().encode_text(parts, Sdxl().tokenize(CAPTIONS))
    Sdxl().predict(parts, draw(2, 4, 8, 12), torch.tensor([10, 500]), text, BATCH).square().mean().backward()
    return [weight.grad for weight in encoders]


def test_gradients_reach_both_text_encoders_and_checkpointing_changes_none():
    expected = gradients(load())
    assert all(gradient.abs().max() > 0 for gradient in expected)
    parts = load()
    Sdxl().enable_gradient_checkpointing(parts, train_text_encoder=True)
    torch.testing.assert_close(gradients(parts), expected)


# ---- files --------------------------------------------------------------------------------------------------------
def weights(parts):
    modules = (parts.denoiser, *parts.text_encoders, parts.vae)
    return {f"{i}.{name}": tensor for i, module in enumerate(modules) for name, tensor in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_diffusers_folder_loads_the_same_weights(parts):
    assert_same(weights(load(checkpoint=tiny_sdxl_folder())), weights(parts))


@pytest.mark.parametrize("checkpoint", [tiny_sdxl, tiny_sdxl_folder])
def test_a_file_that_is_not_mapped_loads_the_same_weights(parts, checkpoint):
    assert_same(weights(load(Sdxl(maps_files=False), checkpoint())), weights(parts))


def test_what_is_written_is_what_was_read(parts):
    assert_same(original_tensors(parts), load_file(tiny_sdxl()))


def test_another_vae_is_used_where_one_is_given():
    parts = Sdxl().load(str(tiny_sdxl()), str(tiny_sd15()), torch.float32)
    wanted = Sd().load(str(tiny_sd15()), None, torch.float32).vae
    assert_same(parts.vae.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("checkpoint", [tiny_sd15, tiny_sd15_folder])
def test_another_familys_model_names_its_script(checkpoint):
    with pytest.raises(
        CheckpointError, match=r"is a Stable Diffusion 1.x or 2.x model. Train it with train_network.py"
    ):
        load(checkpoint=checkpoint())


@pytest.mark.parametrize("checkpoint", [tiny_sdxl, tiny_sdxl_folder])
def test_the_script_of_sd_names_that_of_sdxl(checkpoint):
    with pytest.raises(CheckpointError, match=r"is an SDXL model. Train it with sdxl_train_network.py"):
        Sd().load(str(checkpoint()), None, torch.float32)


def changed(tmp_path, change):
    tensors = load_file(tiny_sdxl())
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def without(name):
    return lambda tensors: tensors.pop(name)


def narrow_pooling(tensors):
    name = f"{unet_layout.PREFIX}label_emb.0.0.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()


def as_refiner(tensors):
    for name in [name for name in tensors if name.startswith("conditioner.")]:
        tensor = tensors.pop(name)
        if name.startswith("conditioner.embedders.1."):
            tensors[name.replace("embedders.1", "embedders.0")] = tensor


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("conditioner.embedders.1.model.text_projection"), "text_projection"),
        (without("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"), "final_layer_norm.weight"),
        (without(f"{unet_layout.PREFIX}label_emb.0.0.weight"), "label_emb"),
        (narrow_pooling, "does not fit a pooled text of 48"),
        (as_refiner, "refiner"),
    ],
    ids=["projection", "norm", "sizes", "other sizes", "refiner"],
)
def test_a_file_that_does_not_fit_says_why(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words) as refusal:
        load(checkpoint=changed(tmp_path, change))
    assert "\n" not in str(refusal.value)
