"""What a model family provides; nothing else in the project knows a family's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.batch import Batch
from library.models import folders, vae
from library.models.checkpoint import open_tensors
from library.objectives.objective import Objective

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions


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


class Absent(nn.Module):
    """Stands where a text encoder is missing, so that the others keep their places."""


@dataclass(frozen=True)
class Parts:
    """The loaded models of one family."""

    denoiser: nn.Module
    text_encoders: tuple[nn.Module, ...]  # none where all captions are encoded already
    vae: nn.Module | None  # None where all images are, and nothing is to be decoded


@dataclass(frozen=True)
class LoraTarget:
    """A module that a LoRA can adapt, under the name it has in LoRA files."""

    name: str  # "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    module: nn.Module  # Linear or Conv2d
    group: str  # "unet" or "text_encoder": which learning rate applies
    # "attention" (inside transformer blocks or CLIP layers), "resnet" (needs conv_dim), or what is adapted only when
    # asked for by name: "embedding" (outside the blocks) and "t5"
    kind: str
    block: int | None  # position in block_dims / block lr weights, or the joint block; None for text encoders
    encoder: int = 0  # which of several text encoders it belongs to, for their learning rates
    alias: str | None = None  # another name that files may have it under


class ModelFamily(Protocol):
    """One file a family; a frozen value built from its own options."""

    name: str  # "sd": cache suffix, metadata
    latent_space: LatentSpace
    bucket_step_multiple: int  # what the sides of a bucket are multiples of
    preview_side: int  # pixels, of previews whose prompts name no size
    side_multiple: int  # pixels, what the sides of pictures are multiples of
    # of other families: how a name in a LoRA file starts, what such a file is, its training script
    other_networks: tuple[tuple[str, str, str], ...]

    @property
    def base_model_version(self) -> str:
        """The name of the base model in the metadata of files, "sd_v1"."""

    @property
    def saved_texts(self) -> tuple[str, ...]:
        """The names of text encoders that are saved at the end of a run."""

    def text_tensors(self, text_encoders: tuple[nn.Module, ...]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each text encoder that is saved, by the name that its file ends in."""

    @property
    def caches_all_text(self) -> bool:
        """Whether what the cache keeps of a caption is all that `predict` takes as text."""

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, in the words of samplers: "epsilon", "v_prediction" or "flow"."""

    @property
    def leaves_text_layers_out(self) -> bool:
        """Whether the last of a text encoder's layers have no part in what `encode_text` returns."""

    def objective(self, noise: NoiseOptions, loss: LossOptions) -> Objective:
        """Return how latents are noised, and what the denoiser's output is compared with."""

    def load(
        self, checkpoint: str, vae_path: str | None, dtype: torch.dtype, vae_dtype: torch.dtype | None = None
    ) -> Parts:
        """Return the models on the CPU, frozen, in eval mode; vae_dtype is the VAE's where it differs."""

    def load_denoiser(self, checkpoint: str, dtype: torch.dtype) -> nn.Module:
        """Return the denoiser alone, on the CPU, frozen, in eval mode."""

    def load_text_encoders(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return the text encoders alone, on the CPU, frozen, in eval mode."""

    def load_beside_cache(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return, likewise, those of the text encoders that are needed although captions are cached."""

    def beside_cache(self, text_encoders: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
        """Return those of loaded text encoders that are needed although captions are cached."""

    def text_device(self, index: int, device: torch.device) -> torch.device:
        """Return where a text encoder is to stand, in a run on device."""

    def load_vae(self, checkpoint: str, vae_path: str | None, dtype: torch.dtype) -> nn.Module:
        """Return the VAE alone, on the CPU, frozen, in eval mode."""

    def vae_identity(self, checkpoint: str, vae_path: str | None) -> str:
        """Return a fingerprint of the VAE's encoder, read without loading the model."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the captions' tokens, first axis B, as `encode_text` takes them."""

    def encode_text(self, parts: Parts, tokens: Tensor, known: Mapping[str, Tensor] | None = None) -> Any:
        """Return what `predict` takes as text; differentiable in the text encoders.

        known: what the cache kept, for a family whose cache does not keep all of it.
        """

    def text_identity(self, checkpoint: str) -> str:
        """Return a fingerprint of the text encoders and of all that decides what `encode_text` makes of a caption.

        Read without loading the models.
        """

    def text_outputs(self, text: Any) -> dict[str, Tensor]:
        """Return what the cache keeps of what `encode_text` returned, by name; first axis B."""

    def text_of(self, outputs: Mapping[str, Tensor]) -> Any:
        """Return what `predict` takes as text, of what `text_outputs` gave."""

    def encode_images(self, parts: Parts, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return VAE samples (B, C, h, w), not yet scaled, of images (B, 3, H, W), float32; noise decides the draw."""

    def augmented(self, batch: Batch) -> Batch:
        """Return a batch with what is drawn anew at each step of training, for all images of the common batch."""

    def fit_to(self, denoiser: nn.Module, resolutions: Sequence[tuple[int, int]]) -> None:
        """Prepare the denoiser for pictures of these (width, height), in pixels."""

    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: Any, batch: Batch) -> Tensor:
        """Return the denoiser's output (B, C, h, w)."""

    def lora_targets(self, parts: Parts) -> Iterable[LoraTarget]:
        """Return every module that a LoRA can adapt, in the order of LoRA files."""

    def enable_gradient_checkpointing(
        self, parts: Parts, train_text_encoder: bool, *, is_offloaded: bool = False
    ) -> None:
        """Make the denoiser, and on demand the text encoders, recompute activations in the backward pass.

        is_offloaded: what the denoiser recomputes from waits in main memory, see `checkpointing.offloaded`.
        """

    def set_attention(self, parts: Parts, kind: str) -> None:
        """Choose the denoiser's attention: "sdpa" or "xformers" (a warning and sdpa where that cannot be used)."""


class Plain:
    """What families have in common, and the answers of one to which nothing special applies."""

    saved_texts: tuple[str, ...] = ()

    def load(
        self: ModelFamily,
        checkpoint: str,
        vae_path: str | None,
        dtype: torch.dtype,
        vae_dtype: torch.dtype | None = None,
    ) -> Parts:
        """Return the models of a single file, a diffusers folder or a hub id, on the CPU, frozen, in eval mode.

        Args:
            checkpoint: --pretrained_model_name_or_path.
            vae_path: --vae: a VAE file, a full checkpoint, a folder or a hub id; None for the checkpoint's own.
            dtype: of the denoiser and the text encoders.
            vae_dtype: of the VAE, where it differs.

        Raises:
            CheckpointError: says what is wrong with the file and what to do.
        """
        return Parts(
            self.load_denoiser(checkpoint, dtype),
            self.load_text_encoders(checkpoint, dtype),
            self.load_vae(checkpoint, vae_path, vae_dtype or dtype),
        )

    def vae_identity(self, checkpoint: str, vae_path: str | None) -> str:
        """Return 32 hex digits that identify the VAE's encoder, read without loading the model.

        Raises:
            CheckpointError: the file is not there, not readable or holds no VAE.
        """
        return vae.fingerprint(open_tensors(folders.vae_file(vae_path or checkpoint)))

    def encode_images(self, parts: Parts, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents (B, C, h, w), not scaled, of images (B, 3, H, W) in [-1, 1].

        Args:
            parts: only the VAE is used.
            images: on the VAE's device.
            noise: (B, C, h, w) standard normal, which decides the draw from the VAE's distribution; None: fresh.
        """
        assert parts.vae is not None, "images are encoded while there is a VAE"
        return vae.encode(parts.vae, images, noise)

    @property
    def caches_all_text(self) -> bool:
        """Say that nothing but the cache is needed."""
        return True

    def text_tensors(self, text_encoders: tuple[nn.Module, ...]) -> dict[str, dict[str, Tensor]]:
        """Return no tensors: no text encoder is saved."""
        return {}

    def load_beside_cache(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return no text encoder: cached captions need none."""
        return ()

    def beside_cache(self, text_encoders: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
        """Return no text encoder: cached captions need none."""
        return ()

    def text_device(self, index: int, device: torch.device) -> torch.device:
        """Return the run's device."""
        return device

    def augmented(self, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch

    def fit_to(self, denoiser: nn.Module, resolutions: Sequence[tuple[int, int]]) -> None:
        """Return at once: the denoiser takes pictures of every size."""
