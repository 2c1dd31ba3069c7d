"""The names, shapes and order of SD 1.5 files, and what diffusers makes of them."""

import pytest
import torch

from library.models import lora_targets
from library.models.sd import Sd
from networks import lora

VARIANTS = {
    "default": (True, {}),
    "conv": (True, {"conv_dim": "4", "conv_alpha": "1"}),
    "unet_only": (False, {}),
    "unet_only+conv": (False, {"conv_dim": "4", "conv_alpha": "1"}),
}


@pytest.fixture(scope="module")
def sd15():
    """SD 1.5's text encoder and U-Net at full size, without memory."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)), unet


def shapes(network):
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_shapes_and_order_are_the_references(variant, sd15, read_json):
    with_text_encoder, arguments = VARIANTS[variant]
    text_encoder, unet = sd15
    network = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet, **arguments)
    network.apply_to(text_encoder, unet, with_text_encoder, True)
    expected = read_json("lora_keys_sd15.json.gz")["variants"][variant]
    assert list(shapes(network).items()) == list(expected.items())
    network.detach()


def test_a_network_made_from_a_real_files_names_has_exactly_these(sd15, read_json):
    names = read_json("real_lora_sd15_names.json.gz")
    types = {"F16": torch.float16}
    tensors = {name: torch.zeros(shape, dtype=types[dtype]) for name, (dtype, shape) in names.items()}
    network, _ = lora.create_network_from_weights(1.0, None, None, list(sd15[:1]), sd15[1], tensors)
    assert shapes(network) == {name: shape for name, (_, shape) in names.items()}


def test_a_block_list_reaches_the_end_of_the_unet(sd15):
    dims = ",".join(str(1 + i) for i in range(25))
    network = lora.create_network(1.0, 4, 1.0, None, *sd15, conv_dim="2", block_dims=dims)
    ranks = {layer.target.name: layer.rank for layer in network.layers}
    assert ranks["lora_unet_down_blocks_0_attentions_0_proj_in"] == 2
    assert ranks["lora_unet_down_blocks_2_resnets_1_time_emb_proj"] == 9
    assert ranks["lora_unet_mid_block_attentions_0_proj_out"] == 13
    assert ranks["lora_unet_up_blocks_3_attentions_2_proj_out"] == 25


@pytest.fixture(scope="module")
def tiny():
    """The tiny model's folder, and its parts as we load them."""
    import tiny_models

    folder = tiny_models.tiny_sd15_folder()
    return folder, Sd().load(str(folder), None, torch.float32)


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["default", "conv"])
@pytest.mark.filterwarnings("ignore")  # of peft and diffusers
def test_diffusers_gives_our_own_forward(arguments, tiny, trained, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder, parts = tiny
    torch.manual_seed(0)
    targets = tuple(lora_targets.of(parts.text_encoders, parts.denoiser))
    network = lora.create_network(1.0, 4, 2.0, None, None, None, targets=targets, **arguments)
    trained(network, std=0.2)
    network.save_weights(tmp_path / "ours.safetensors", None, {})
    latents, tokens = torch.randn(1, 4, 8, 8), torch.randint(0, 49000, (1, 77))

    def outputs(text_encoder, unet):
        with torch.no_grad():
            text = text_encoder(tokens).last_hidden_state
            return text, unet(latents, torch.tensor([500]), text).sample

    plain = outputs(parts.text_encoders[0], parts.denoiser)
    with network.eval().attached():
        ours = outputs(parts.text_encoders[0], parts.denoiser)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    for name in ("text_encoder", "unet"):
        getattr(pipeline, name).eval()
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    theirs = outputs(pipeline.text_encoder, pipeline.unet)
    for before, own, other in zip(plain, ours, theirs, strict=True):
        assert (own - before).abs().max() > 0.01
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
