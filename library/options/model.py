"""Options of the base model."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option, settle
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained on, and how its text encoder reads captions."""

    pretrained_model_name_or_path: str | None = option(
        None, "Base model: a single file (.safetensors or .ckpt) or a diffusers folder.", is_path=True
    )
    vae: str | None = option(
        None, "VAE to use instead of the base model's: a single file or a diffusers folder.", is_path=True
    )
    tokenizer_cache_dir: str | None = option(
        None,
        "Folder of tokenizers, one sub-folder each, like openai_clip-vit-large-patch14. Read before the shipped ones.",
        is_path=True,
    )
    v2: bool = option(False, "The base model is Stable Diffusion 2.x.")
    v_parameterization: bool = option(
        False, "Learn the velocity instead of the noise, for base models made with v-prediction."
    )
    clip_skip: int | None = option(
        None, "Use the text encoder's N-th layer from the end; 1 is the last, 2 the one before.", bounds=Bounds(min=1)
    )
    max_token_length: int | None = option(
        None, "Longest caption in tokens; unset is 75. Longer ones are encoded in pieces of 75.", choices=(75, 150, 225)
    )
    weighted_captions: bool = option(
        False, "Read (word:1.2), (word) and [word] in captions as weights of the words' embeddings."
    )
    no_token_padding: bool = option(
        False, "Pad captions to the longest of their batch, instead of to 75 tokens, as the first DreamBooth did."
    )
    disable_mmap_load_safetensors: bool = option(
        False, "Read model files instead of mapping them into memory; faster on some network drives."
    )
    no_half_vae: bool = option(False, "Run the VAE in float32 whatever --mixed_precision says.")
    lowram: bool = option(False, "Leave a VAE that previews need on the GPU after --cache_latents: spares main memory.")

    def __post_init__(self) -> None:
        """Check the values; 75 tokens are what unset means."""
        check_values(self)
        if self.max_token_length == 75:
            settle(self, "max_token_length", None)
