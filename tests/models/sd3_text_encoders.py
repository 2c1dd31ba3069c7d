"""Tiny text encoders of SD3, made and written with transformers alone, and diffusers' pipeline around them."""

import warnings
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from library.models import clip_tokens, t5_tokens

L_WIDTH, G_WIDTH, T5_WIDTH = 64, 128, 256


def seeded(make, seed, spread=0.05):
    """Return a model of transformers with weights that differ from encoder to encoder."""
    model = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.dim() == 1))
    return model.eval()


def clip_encoder(width, activation, seed):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=width // 64, projection_dim=width, hidden_act=activation,
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    return seeded(lambda: CLIPTextModelWithProjection(config), seed)


def t5_encoder(seed=3, **changed):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": T5_WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4} | changed
    config = T5Config(
        vocab_size=32128, feed_forward_proj="gated-gelu", dropout_rate=0.1, is_encoder_decoder=False, **sizes
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def make_encoders():
    """Return CLIP-L, CLIP-G and T5, tiny."""
    return clip_encoder(L_WIDTH, "quick_gelu", 1), clip_encoder(G_WIDTH, "gelu", 2), t5_encoder()


def write_encoder(model, path, dtype=None):
    """Write a model as a file of its own, as its transformers has it, and return the path."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}, path)
    return path


def _clip_tokenizer(kind):
    from transformers import CLIPTokenizer

    vocabulary = clip_tokens.shipped_vocabulary()
    words = ["!" if kind is clip_tokens.OPENCLIP_G else clip_tokens.END_WORD]
    return CLIPTokenizer(
        vocab=dict(vocabulary.ids), merges=list(vocabulary.merges), model_max_length=77, pad_token=words[0]
    )


def pipeline_of(encoders):
    """Return diffusers' StableDiffusion3Pipeline with tokenizers, these text encoders and nothing else that works."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusion3Pipeline
        from transformers import PreTrainedTokenizerFast

        t5_words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_buffer(t5_tokens.shipped_tokenizer()), pad_token="<pad>", eos_token="</s>"
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=None, scheduler=None, vae=None,
            text_encoder=encoders[0], tokenizer=_clip_tokenizer(clip_tokens.CLIP_L),
            text_encoder_2=encoders[1], tokenizer_2=_clip_tokenizer(clip_tokens.OPENCLIP_G),
            text_encoder_3=encoders[2], tokenizer_3=t5_words,
        )  # fmt: skip
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=T5_WIDTH))
    return pipeline


def tiny_denoiser():
    """Return a denoiser to stand beside text encoders that are checkpointed."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, cross_attention_dim=8,
    )  # fmt: skip
