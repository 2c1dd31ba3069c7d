"""What one training step needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one process has of a batch that several processes share: every num_processes-th image.

    All draw noise for the whole batch and keep what belongs to their images, so that several processes train as one
    would with the whole batch.
    """

    num_images: int  # of the whole batch
    process_index: int
    num_processes: int

    @property
    def is_idle(self) -> bool:
        """Whether there are too few images: the process then keeps step with another's image, which does not count."""
        return self.process_index >= self.num_images

    @property
    def rows(self) -> slice:
        """Where the images of this process stand in the whole batch."""
        return slice(0, 1) if self.is_idle else slice(self.process_index, None, self.num_processes)

    def whole(self, own: Tensor) -> Tensor:
        """Return (num_images, ...): own (B, ...) in its rows, 0 in those of other processes."""
        spread = own.new_zeros(self.num_images, *own.shape[1:])
        spread[self.rows] = own
        return spread

    def mean(self, per_image: Tensor) -> Tensor:
        """Return what, averaged over the processes, is the mean over the whole batch; per_image: (B,)."""
        return per_image.sum() * (0.0 if self.is_idle else self.num_processes / self.num_images)


@dataclass(frozen=True)
class Batch:
    """One batch of one bucket. Letters: B batch, C latent channels, H W pixels, h w latent cells (H/8, W/8)."""

    names: tuple[str, ...]  # paths of the images, for messages
    captions: tuple[str, ...]  # after dropout, shuffling and wildcards
    tokens: Tensor | None  # family.tokenize(captions): SD (B, num_windows, 77) int64; None when text is given
    images: Tensor | None  # (B, 3, H, W) float32 in [-1, 1]; None when latents are given
    latents: Tensor | None  # (B, C, h, w) VAE sample, not yet scaled; None when images are given
    masks: Tensor | None  # (B, 1, h, w) float32 in [0, 1]: what cells weigh; None: every image weighs 1 everywhere
    weights: Tensor  # (B,) float32: 1, or a regularisation image's prior loss weight; times what masks.area_scale gives
    original_sizes: Tensor  # (B, 2) int64: height, width of the file
    crop_top_lefts: Tensor  # (B, 2) int64: top, left of the crop in the resized image, as made
    target_sizes: Tensor  # (B, 2) int64: height, width of the bucket
    preserved: Tensor | None = None  # (B,) bool: the target is the untrained model's prediction; None: of no image
    share: Share | None = None  # of several processes; None: these are all images of the batch
    text: Mapping[str, Tensor] | None = None  # cached outputs of the text encoders (B, ...), see family.text_of
    dropped_texts: Tensor | None = None  # (B, text encoders) bool: which are not heard in this step; None: none
    crop_offset: tuple[float, float] | None = None  # top, left in [0, 1): of the window of positions; None: the middle
    kept_tokens: Tensor | None = None  # (B, K) int64: the picture's tokens that are computed; None: all
    regions: Tensor | None = None  # (B, 2, h, w) float32: inside and outside of masks, see masks.figures; None: no mask
    prior: Tensor | None = None  # (B, 1, h, w) float32: how strongly cells are held to the untrained prediction

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on device; copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if self.text is not None:
            changed["text"] = {name: change(tensor) for name, tensor in self.text.items()}
        return replace(self, **changed)
