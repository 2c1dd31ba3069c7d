"""Options of the caches of latents and text."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option, settle
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class CachingOptions:
    """Whether images and captions are encoded once, before training, and where the results are kept."""

    cache_latents: bool = option(False, "Encode every image once, before training, instead of at each step.")
    cache_latents_to_disk: bool = option(
        False, "Keep the encoded images in files, for later runs too. Includes --cache_latents."
    )
    cache_dir: str | None = option(None, "Folder for the cache files. Unset: beside the images.", is_path=True)
    skip_cache_check: bool = option(
        False, "Take cache files as valid without comparing them with their images and captions."
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "Encode every caption once, before training, and let go of the text encoders. The U-Net alone is trained; of "
        "SD3 CLIP too, unless --network_train_unet_only is given.",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "Keep the encoded captions in files, for later runs too. Includes --cache_text_encoder_outputs."
    )
    text_encoder_batch_size: int | None = option(
        None,
        "Captions per call of the text encoders while they are cached. Unset or 0: --train_batch_size.",
        bounds=Bounds(min=0),
    )
    vae_batch_size: int = option(1, "Images per call of the VAE. 0 is 1.", bounds=Bounds(min=0))

    def __post_init__(self) -> None:
        """Check the values; a cache on disk is a cache, and the VAE takes one image at least."""
        check_values(self)
        if self.cache_latents_to_disk:
            settle(self, "cache_latents", True)
        if self.cache_text_encoder_outputs_to_disk:
            settle(self, "cache_text_encoder_outputs", True)
        settle(self, "vae_batch_size", max(1, self.vae_batch_size))
