"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.batch import Batch
from library.errors import CheckpointError
from library.models import (
    checkpointing,
    clip,
    clip_tokens,
    diffusers_folder,
    folders,
    lora_targets,
    recognition,
    unet,
    vae,
    whole_model,
)
from library.models.checkpoint import Prefixed, TensorSource, has_prefix, open_tensors, require
from library.models.diffusers_folder import FolderKind
from library.models.family import LatentSpace, LoraTarget, Parts, Plain
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout
from library.models.whole_model import Kept, Pieces
from library.models.writing import Written
from library.objectives.ddpm import Ddpm

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

CELLS = 128  # sides of the latents that the base model was made for
SCALE = 0.13025  # sd_xl_base.yaml, scale_factor
TOKENIZERS = (clip_tokens.CLIP_L, clip_tokens.OPENCLIP_G)
TEXT_FOLDERS = ("text_encoder", "text_encoder_2")  # of a diffusers folder
OUTPUTS = ("hidden_states_1", "hidden_states_2", "pooled")  # of the text encoders, in the cache

Text = tuple[Tensor, Tensor, Tensor]  # states of both text encoders (B, N, 768), (B, N, 1280); pooled text (B, 1280)


@dataclass(frozen=True)
class Sdxl(Plain, Written):
    """The SDXL family: how its files are loaded and its models called."""

    v_parameterization: bool = False
    max_token_length: int | None = None  # None and 75: one window; 150: two; 225: three
    weighted_captions: bool = False
    tokenizer_cache_dir: str | None = None
    maps_files: bool = True  # whether model files are mapped into memory; otherwise read

    name = "sdxl"
    latent_space = LatentSpace(channels=4, scale=SCALE)
    bucket_step_multiple = 32  # the U-Net halves latents twice
    preview_side = 1024
    side_multiple = 8
    other_networks = recognition.other_networks(recognition.SDXL)
    leaves_text_layers_out = True  # of the first text encoder the last
    base_model_version = "sdxl_base_v1-0"

    @classmethod
    def from_options(cls, options: Any) -> Sdxl:
        """Return the family as the model options describe it."""
        model = options.model
        return cls(
            v_parameterization=model.v_parameterization,
            max_token_length=model.max_token_length,
            weighted_captions=model.weighted_captions,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
            maps_files=not model.disable_mmap_load_safetensors,
        )

    # ---- files -------------------------------------------------------------------------------------------------
    def load_denoiser(self, checkpoint: str, dtype: torch.dtype) -> nn.Module:
        """Return the U-Net alone, as `load` does."""
        if not folders.is_file(checkpoint):
            return folders.load_denoiser(_base_folder(checkpoint), dtype, is_mapped=self.maps_files)
        file = self._open(checkpoint)
        second = Prefixed(file, clip_layout.SDXL_PREFIXES[1])
        require(second, (clip_layout.OPENCLIP_PROJECTION,), "second text encoder")
        pooled_width = second.shapes[clip_layout.OPENCLIP_PROJECTION][1]
        return unet.build(Prefixed(file, unet_layout.PREFIX), True, dtype, pooled_width=pooled_width)

    def load_text_encoders(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return both text encoders alone, as `load` does."""
        if folders.is_file(checkpoint):
            file = self._open(checkpoint)
            first, second = (Prefixed(file, prefix) for prefix in clip_layout.SDXL_PREFIXES)
            return clip.build(first, dtype), clip.build_openclip(second, dtype, has_projection=True)
        folder = _base_folder(checkpoint)
        return tuple(
            folders.load_text_encoder(folder, dtype, part, has_projection=has_projection, is_mapped=self.maps_files)
            for part, has_projection in zip(TEXT_FOLDERS, (False, True), strict=True)
        )

    def load_vae(self, checkpoint: str, vae_path: str | None, dtype: torch.dtype) -> nn.Module:
        """Return the VAE alone, as `load` does."""
        return vae.build(open_tensors(folders.vae_file(vae_path or checkpoint), is_mapped=self.maps_files), dtype)

    def _open(self, checkpoint: str) -> TensorSource:
        """Return the tensors of a base model's checkpoint in the original layout."""
        file = open_tensors(Path(checkpoint), is_mapped=self.maps_files)
        recognition.check(file, recognition.SDXL)
        if has_prefix(file, "conditioner.embedders.0.model."):
            raise CheckpointError(f"{checkpoint}: is SDXL's refiner, which has another U-Net. Give the base model.")
        return file

    def kept(self, checkpoint: str) -> Kept:
        """Return what the model's source holds besides the weights, for `save_whole`; the source is not read again.

        Raises:
            CheckpointError: as `load` does.
        """
        if not folders.is_file(checkpoint):
            return diffusers_folder.kept(_base_folder(checkpoint))
        file = self._open(checkpoint)
        first, second = (Prefixed(file, prefix) for prefix in clip_layout.SDXL_PREFIXES)
        parts = (
            (unet_layout.PREFIX, unet.weight_names(Prefixed(file, unet_layout.PREFIX))),
            ("", vae.weight_names(file)),
            (clip_layout.SDXL_PREFIXES[0], clip.weight_names(first, openclip=False)),
            (clip_layout.SDXL_PREFIXES[1], clip.weight_names(second, openclip=True, has_projection=True)),
        )
        written = {f"{prefix}{name}" for prefix, names in parts for name in names}
        return whole_model.kept_of_file(file, written, clip.names_today(first, clip_layout.SDXL_PREFIXES[0]))

    def whole_pieces(self, parts: Parts, kept: Kept) -> Pieces:
        """Return what each tensor of a single file is joined of."""
        absent = {name: own for name, own in _scale().items() if name not in kept.tensors}
        return original_pieces(parts) | absent

    @property
    def folder_kind(self) -> FolderKind:
        """What the family's diffusers folders hold besides weights, where the source was a single file."""
        return FolderKind(
            pipeline=recognition.SDXL.pipelines[0],
            scheduler=diffusers_folder.EULER,
            prediction_type=self.prediction_type,
            text_folders=TEXT_FOLDERS,
            tokenizers=TOKENIZERS,
            has_linear_projections=True,
            latent_scale=SCALE,
            cells=CELLS,
            absent=("feature_extractor", "image_encoder"),
            more={"force_zeros_for_empty_prompt": True},
            tokenizer_cache_dir=self.tokenizer_cache_dir,
        )

    def text_identity(self, checkpoint: str) -> str:
        """Return what identifies the text encoders, how they are called and how captions become tokens.

        At most 8 rows of each tensor are read.

        Raises:
            CheckpointError: the file is not there, not readable or holds no text encoders.
        """
        if folders.is_file(checkpoint):
            file = self._open(checkpoint)
            sources: list[TensorSource] = [Prefixed(file, prefix) for prefix in clip_layout.SDXL_PREFIXES]
        else:
            folder = _base_folder(checkpoint)
            sources = [open_tensors(folders.text_encoder_file(folder, part)) for part in TEXT_FOLDERS]
        called = [f"windows {clip_tokens.num_windows(self.max_token_length)}", *(["weights"] * self.weighted_captions)]
        words = [clip_tokens.vocabulary_name(self.tokenizer_cache_dir, kind.name) for kind in TOKENIZERS]
        return " ".join([*map(clip.fingerprint, sources), *called, *words])

    # ---- text --------------------------------------------------------------------------------------------------
    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the captions' tokens for both text encoders, (B, windows, 2, 77) int64.

        With weighted_captions (B, windows, 2, 2, 77) float32: of each the tokens and their weights.
        """
        tokens = [
            clip_tokens.tokenize(
                captions,
                kind,
                clip_tokens.num_windows(self.max_token_length),
                has_weights=self.weighted_captions,
                cache_dir=self.tokenizer_cache_dir,
            )
            for kind in TOKENIZERS
        ]
        return torch.stack(tokens, dim=2)

    def encode_text(self, parts: Parts, tokens: Tensor, known: Mapping[str, Tensor] | None = None) -> Text:
        """Return the states of both text encoders, N = 75 * windows + 2, and the pooled text of the first window.

        Each window is encoded alone. Weights multiply a token's hidden states, without renormalising; the pooled text
        has none.
        """
        tokens, weights = clip_tokens.split_weights(tokens)
        num_windows = tokens.shape[1]
        joined = []
        for index, text_encoder in enumerate(parts.text_encoders):
            own = tokens[:, :, index].flatten(0, 1)
            states, last = clip.penultimate_states(text_encoder, own)
            joined.append(clip.join(states, num_windows, None if weights is None else weights[:, :, index]))
        pooled = clip.pooled_text(text_encoder, last[::num_windows], own[::num_windows])
        return joined[0], joined[1], pooled

    def text_outputs(self, text: Text) -> dict[str, Tensor]:
        """Return the states of both text encoders and the pooled text by their names in the cache."""
        return dict(zip(OUTPUTS, text, strict=True))

    def text_of(self, outputs: Mapping[str, Tensor]) -> Text:
        """Return what `text_outputs` gave as `predict` takes it."""
        first, second, pooled = (outputs[name] for name in OUTPUTS)
        return first, second, pooled

    # ---- images ------------------------------------------------------------------------------------------------
    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: Text, batch: Batch) -> Tensor:
        """Return the U-Net's output (B, 4, h, w): noise, or velocity for a v-parameterised model.

        Args:
            parts: only the denoiser is used.
            noisy: (B, 4, h, w) in latent space.
            timesteps: (B,) int64 in [0, 1000).
            text: from `encode_text`.
            batch: for the sizes of the pictures and where they were cropped.
        """
        first, second, pooled = text
        sizes = torch.cat([batch.original_sizes, batch.crop_top_lefts, batch.target_sizes], dim=1)  # (B, 6)
        told = {"text_embeds": pooled, "time_ids": sizes.to(noisy.device)}
        states = torch.cat([first, second], dim=-1)
        return parts.denoiser(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=told).sample

    # ---- training ----------------------------------------------------------------------------------------------
    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: the noise, or the velocity."""
        return "v_prediction" if self.v_parameterization else "epsilon"

    def objective(self, noise: NoiseOptions, loss: LossOptions) -> Ddpm:
        """Return how latents are noised and what the U-Net's output is compared with."""
        return Ddpm.from_options(noise, loss, self.v_parameterization)

    def lora_targets(self, parts: Parts) -> Iterator[LoraTarget]:
        """Yield every module that a LoRA can adapt, in the order of LoRA files: text encoders, then U-Net."""
        for index, text_encoder in enumerate(parts.text_encoders):
            yield from lora_targets.of_text_encoder(text_encoder, f"lora_te{index + 1}", index)
        yield from lora_targets.of_unet_by_original_names(parts.denoiser)

    def enable_gradient_checkpointing(
        self, parts: Parts, train_text_encoder: bool, *, is_offloaded: bool = False
    ) -> None:
        """Compute the U-Net's, and on demand the text encoders', activations twice; see `checkpointing.enable`."""
        trained = parts.text_encoders if train_text_encoder else ()
        checkpointing.enable(parts.denoiser, trained, is_offloaded=is_offloaded)

    def set_attention(self, parts: Parts, kind: str) -> None:
        """Choose the U-Net's attention: "sdpa" or "xformers" (a warning and sdpa where that cannot be used)."""
        unet.set_attention(parts.denoiser, kind)


def _base_folder(checkpoint: str) -> Path:
    """Return the folder of SDXL's base model in diffusers' layout. Raises: CheckpointError: it is another's."""
    folder = folders.model_folder(checkpoint, recognition.SDXL)
    if not all((folder / part).is_dir() for part in TEXT_FOLDERS):
        raise CheckpointError(
            f"{folder}: has no two text encoders, so it is not SDXL's base model. "
            "Give a folder with text_encoder and text_encoder_2."
        )
    return folder


def original_pieces(parts: Parts) -> dict[str, tuple[Tensor, ...]]:
    """Return what each tensor of a single-file checkpoint is joined of, see `clip.original_pieces`."""
    assert parts.vae is not None, "only whole models are written"
    (first, second), (first_prefix, second_prefix) = parts.text_encoders, clip_layout.SDXL_PREFIXES
    singles = unet.original_tensors(parts.denoiser, linear_projection=True) | vae.original_tensors(parts.vae)
    texts = clip.original_pieces(first, openclip=False, prefix=first_prefix)
    texts |= clip.original_pieces(second, openclip=True, prefix=second_prefix)
    return {name: (tensor,) for name, tensor in singles.items()} | texts


def original_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return all weights under their names in a single-file checkpoint, as other tools expect them."""
    return {name: clip.joined(own) for name, own in (original_pieces(parts) | _scale()).items()}


def _scale() -> dict[str, tuple[Tensor, ...]]:
    """Return the second text encoder's scale, which files have and nothing here reads."""
    return {f"{clip_layout.SDXL_PREFIXES[1]}{clip_layout.LOGIT_SCALE}": (torch.tensor(clip_layout.LOGIT_SCALE_START),)}
