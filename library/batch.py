"""What one training step needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One batch of one bucket. Letters: B batch, C latent channels, H W pixels, h w latent cells (H/8, W/8)."""

    names: tuple[str, ...]  # paths of the images, for messages
    captions: tuple[str, ...]  # after dropout, shuffling and wildcards
    tokens: Tensor | None  # family.tokenize(captions): SD (B, num_windows, 77) int64
    images: Tensor | None  # (B, 3, H, W) float32 in [-1, 1]; None when latents are given
    latents: Tensor | None  # (B, C, h, w) VAE sample, not yet scaled; None when images are given
    masks: Tensor | None  # (B, 1, h, w) float32 in [0, 1]; None: every image weighs 1 everywhere
    weights: Tensor  # (B,) float32: 1, or the prior loss weight of a regularisation image
    original_sizes: Tensor  # (B, 2) int64: height, width of the file
    crop_top_lefts: Tensor  # (B, 2) int64: top, left of the crop in the resized image, as made
    target_sizes: Tensor  # (B, 2) int64: height, width of the bucket
    preserved: Tensor | None = None  # (B,) bool: the target is the untrained model's prediction; None: of no image

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on device; copies from pinned memory do not wait."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)
