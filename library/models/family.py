"""What a model family provides; nothing else in the project knows a family's name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from library.batch import Batch


@dataclass(frozen=True)
class LatentSpace:
    """The space the denoiser works in: z = (latent - shift) * scale, at 1/reduction of the image's size."""

    channels: int
    scale: float
    shift: float = 0.0
    reduction: int = 8

    def normalise(self, latents: Tensor) -> Tensor:
        """Return VAE samples (B, C, h, w) as the denoiser expects them."""
        return (latents - self.shift) * self.scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents (B, C, h, w) as the VAE decoder expects them."""
        return latents / self.scale + self.shift


@dataclass(frozen=True)
class Parts:
    """The loaded models of one family."""

    denoiser: nn.Module
    text_encoders: tuple[nn.Module, ...]
    vae: nn.Module


@dataclass(frozen=True)
class LoraTarget:
    """A module that a LoRA can adapt, under the name it has in LoRA files."""

    name: str  # "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    module: nn.Module  # Linear or Conv2d
    group: str  # "unet" or "text_encoder": which learning rate applies
    kind: str  # "attention" (inside transformer blocks or CLIP layers) or "resnet" (needs conv_dim)
    block: int | None  # position in block_dims / block lr weights; None for text encoders


class ModelFamily(Protocol):
    """One file a family; a frozen value built from its own options."""

    name: str  # "sd": cache suffix, metadata
    latent_space: LatentSpace

    def load(self, checkpoint: str, vae: str | None, dtype: torch.dtype) -> Parts: ...
    def vae_identity(self, checkpoint: str, vae: str | None) -> str: ...
    def tokenize(self, captions: Sequence[str]) -> Tensor: ...
    def encode_text(self, parts: Parts, tokens: Tensor) -> Any: ...
    def encode_images(self, parts: Parts, images: Tensor, noise: Tensor | None = None) -> Tensor: ...
    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: Any, batch: Batch) -> Tensor: ...
    def lora_targets(self, parts: Parts) -> Iterable[LoraTarget]: ...
