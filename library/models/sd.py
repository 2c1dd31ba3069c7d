"""Stable Diffusion 1.x and 2.x."""

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
from library.models.checkpoint import Prefixed, TensorSource, has_prefix, open_tensors
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

V2_V_CELLS = 96  # 768 pixels, which the v-predicting models of SD 2.x were made for
SCALE = 0.18215  # v1-inference.yaml and v2-inference.yaml, scale_factor


@dataclass(frozen=True)
class Sd(Plain, Written):
    """The SD 1.x / 2.x family: how its files are loaded and its models called."""

    v2: bool = False
    v_parameterization: bool = False
    clip_skip: int | None = None  # None or 1: the last layer
    max_token_length: int | None = None  # None and 75: one window; 150: two; 225: three
    weighted_captions: bool = False
    tokenizer_cache_dir: str | None = None
    pads_tokens: bool = True  # to a whole window; otherwise a batch is as long as its longest caption

    name = "sd"
    latent_space = LatentSpace(channels=4, scale=SCALE)
    bucket_step_multiple = 64  # the U-Net halves latents three times
    preview_side = 512
    side_multiple = 8
    other_networks = recognition.other_networks(recognition.SD)

    @classmethod
    def from_options(cls, options: Any) -> Sd:
        """Return the family as the model options describe it."""
        model = options.model
        return cls(
            v2=model.v2,
            v_parameterization=model.v_parameterization,
            clip_skip=model.clip_skip,
            max_token_length=model.max_token_length,
            weighted_captions=model.weighted_captions,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
            pads_tokens=not model.no_token_padding,
        )

    # ---- files -------------------------------------------------------------------------------------------------
    def load_denoiser(self, checkpoint: str, dtype: torch.dtype) -> nn.Module:
        """Return the U-Net alone, as `load` does."""
        if not folders.is_file(checkpoint):
            return folders.load_denoiser(folders.model_folder(checkpoint), dtype)
        file = self._open(Path(checkpoint))
        return unet.build(Prefixed(file, unet_layout.PREFIX), self.v2, dtype)

    def load_text_encoders(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return the text encoder alone, as `load` does."""
        if folders.is_file(checkpoint):
            file = self._open(Path(checkpoint))
            build = clip.build_openclip if self.v2 else clip.build
            text_encoder = build(Prefixed(file, self._text_prefix), dtype)
        else:
            text_encoder = folders.load_text_encoder(folders.model_folder(checkpoint), dtype)
            config: Any = text_encoder.config
            # the activation is what tells the two text encoders apart at any size
            self._check_version(config.hidden_act != "quick_gelu", checkpoint)
        clip.check_skip(text_encoder, self.clip_skip)
        return (text_encoder,)

    def load_vae(self, checkpoint: str, vae_path: str | None, dtype: torch.dtype) -> nn.Module:
        """Return the VAE alone, as `load` does."""
        return vae.build(open_tensors(folders.vae_file(vae_path or checkpoint)), dtype)

    @property
    def _text_prefix(self) -> str:
        return clip_layout.SD2_PREFIX if self.v2 else clip_layout.SD1_PREFIX

    def _open(self, path: Path) -> TensorSource:
        """Return the tensors of a checkpoint in the original layout, which is of this family and version."""
        file = open_tensors(path)
        recognition.check(file, recognition.SD)
        found_v2 = has_prefix(file, clip_layout.SD2_PREFIX)
        if found_v2 or has_prefix(file, clip_layout.SD1_PREFIX):
            self._check_version(found_v2, str(path))
        return file

    def _check_version(self, found_v2: bool, checkpoint: str) -> None:
        """Raise CheckpointError where the checkpoint is SD 2.x without --v2, or SD 1.x with it."""
        if found_v2 and not self.v2:
            raise CheckpointError(f"{checkpoint}: is a Stable Diffusion 2.x model. Add --v2.")
        if self.v2 and not found_v2:
            raise CheckpointError(f"{checkpoint}: is a Stable Diffusion 1.x model. Leave out --v2.")

    def kept(self, checkpoint: str) -> Kept:
        """Return what the model's source holds besides the weights, for `save_whole`; the source is not read again.

        Raises:
            CheckpointError: as `load` does.
        """
        if not folders.is_file(checkpoint):
            return diffusers_folder.kept(folders.model_folder(checkpoint))
        file = self._open(Path(checkpoint))
        text = Prefixed(file, self._text_prefix)
        parts = (
            (unet_layout.PREFIX, unet.weight_names(Prefixed(file, unet_layout.PREFIX))),
            ("", vae.weight_names(file)),
            (self._text_prefix, clip.weight_names(text, openclip=self.v2)),
        )
        written = {f"{prefix}{name}" for prefix, names in parts for name in names}
        return whole_model.kept_of_file(file, written, clip.names_today(text, self._text_prefix))

    def whole_pieces(self, parts: Parts, kept: Kept) -> Pieces:
        """Return what each tensor of a single file is joined of; SD 2.x's text encoder is whole in it."""
        weights = original_pieces(parts, self.v2)
        tail = clip.unused_tail(parts.text_encoders[0]) if self.v2 else {}
        return weights if tail.keys() & kept.tensors.keys() else tail | weights

    @property
    def folder_kind(self) -> FolderKind:
        """What the family's diffusers folders hold besides weights, where the source was a single file."""
        return FolderKind(
            pipeline=recognition.SD.pipelines[0],
            scheduler=diffusers_folder.DDIM if self.v2 else diffusers_folder.PNDM,
            prediction_type=self.prediction_type,
            text_folders=("text_encoder",),
            tokenizers=(self._tokenizer,),
            has_linear_projections=self.v2,
            latent_scale=SCALE,
            cells=V2_V_CELLS if self.v2 and self.v_parameterization else unet.SAMPLE_CELLS,
            absent=("feature_extractor", "image_encoder", "safety_checker"),
            more={"requires_safety_checker": False},
            tokenizer_cache_dir=self.tokenizer_cache_dir,
        )

    def text_identity(self, checkpoint: str) -> str:
        """Return what identifies the text encoder, how it is called and how captions become tokens.

        At most 8 rows of each tensor are read.

        Raises:
            CheckpointError: the file is not there, not readable or holds no text encoder.
        """
        if folders.is_file(checkpoint):
            file: TensorSource = Prefixed(self._open(Path(checkpoint)), self._text_prefix)
        else:
            file = open_tensors(folders.text_encoder_file(folders.model_folder(checkpoint)))
        called = [f"windows {self.num_windows}", f"skip {self.clip_skip or 1}", *(["weights"] * self.weighted_captions)]
        words = clip_tokens.vocabulary_name(self.tokenizer_cache_dir, self._tokenizer.name)
        return " ".join([clip.fingerprint(file), *called, words])

    # ---- text --------------------------------------------------------------------------------------------------
    @property
    def num_windows(self) -> int:
        """Return how many windows of 77 tokens a caption gets."""
        return clip_tokens.num_windows(self.max_token_length)

    @property
    def _tokenizer(self) -> clip_tokens.Kind:
        return clip_tokens.OPENCLIP_H if self.v2 else clip_tokens.CLIP_L

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the captions' tokens, (B, windows, 77) int64.

        With weighted_captions (B, windows, 2, 77) float32: the tokens, which float32 holds exactly, and their weights.
        Without padding the last axis of a single window is as long as the longest caption.
        """
        tokens = clip_tokens.tokenize(
            captions,
            self._tokenizer,
            self.num_windows,
            has_weights=self.weighted_captions,
            cache_dir=self.tokenizer_cache_dir,
        )
        return tokens if self.pads_tokens or self.num_windows > 1 else clip_tokens.without_padding(tokens)

    def encode_text(self, parts: Parts, tokens: Tensor, known: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return hidden states (B, N, D), N = 75 * windows + 2, of what `tokenize` returned.

        Each window is encoded alone. Weights multiply a token's hidden state, without renormalising.
        """
        tokens, weights = clip_tokens.split_weights(tokens)
        states = clip.hidden_states(parts.text_encoders[0], tokens.flatten(0, 1), self.clip_skip)
        return clip.join(states, tokens.shape[1], weights)

    def text_outputs(self, text: Tensor) -> dict[str, Tensor]:
        """Return the hidden states (B, N, D) by their name in the cache."""
        return {"hidden_states": text}

    def text_of(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states (B, N, D) of what `text_outputs` gave."""
        return outputs["hidden_states"]

    # ---- images ------------------------------------------------------------------------------------------------
    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """Return the U-Net's output (B, 4, h, w): noise, or velocity for a v-parameterised model.

        Args:
            parts: only the denoiser is used.
            noisy: (B, 4, h, w) in latent space.
            timesteps: (B,) int64 in [0, 1000).
            text: (B, N, D) from `encode_text`.
            batch: not needed by this family.
        """
        return parts.denoiser(noisy, timesteps, encoder_hidden_states=text).sample

    # ---- training ----------------------------------------------------------------------------------------------
    @property
    def leaves_text_layers_out(self) -> bool:
        """Whether the last of the text encoder's layers have no part in what it returns."""
        return (self.clip_skip or 1) > 1

    @property
    def base_model_version(self) -> str:
        """The name of the base model in files: sd_v1 or sd_v2, with _v for velocity prediction."""
        return ("sd_v2" if self.v2 else "sd_v1") + ("_v" if self.v_parameterization else "")

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: the noise, or the velocity."""
        return "v_prediction" if self.v_parameterization else "epsilon"

    def objective(self, noise: NoiseOptions, loss: LossOptions) -> Ddpm:
        """Return how latents are noised and what the U-Net's output is compared with."""
        return Ddpm.from_options(noise, loss, self.v_parameterization)

    def lora_targets(self, parts: Parts) -> Iterator[LoraTarget]:
        """Yield every module that a LoRA can adapt, in the order of LoRA files: text encoder, then U-Net."""
        for text_encoder in parts.text_encoders:  # none where all captions are encoded already
            yield from lora_targets.of_text_encoder(text_encoder, "lora_te")
        yield from lora_targets.of_unet(parts.denoiser)

    def enable_gradient_checkpointing(
        self, parts: Parts, train_text_encoder: bool, *, is_offloaded: bool = False
    ) -> None:
        """Compute the U-Net's, and on demand the text encoder's, activations twice; see `checkpointing.enable`."""
        trained = parts.text_encoders if train_text_encoder else ()
        checkpointing.enable(parts.denoiser, trained, is_offloaded=is_offloaded)

    def set_attention(self, parts: Parts, kind: str) -> None:
        """Choose the U-Net's attention: "sdpa" or "xformers" (a warning and sdpa where that cannot be used)."""
        unet.set_attention(parts.denoiser, kind)


def original_pieces(parts: Parts, v2: bool) -> dict[str, tuple[Tensor, ...]]:
    """Return what each tensor of a single-file checkpoint is joined of, see `clip.original_pieces`."""
    assert parts.vae is not None, "only whole models are written"
    singles = unet.original_tensors(parts.denoiser, linear_projection=v2) | vae.original_tensors(parts.vae)
    text = clip.original_pieces(parts.text_encoders[0], openclip=v2)
    return {name: (tensor,) for name, tensor in singles.items()} | text


def original_tensors(parts: Parts, v2: bool) -> dict[str, Tensor]:
    """Return all weights under their names in a single-file checkpoint, as other tools expect them."""
    return {name: clip.joined(own) for name, own in original_pieces(parts, v2).items()}
