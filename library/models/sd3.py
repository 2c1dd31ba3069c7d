"""Stable Diffusion 3 and 3.5: medium and large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library import noise
from library.batch import Batch
from library.models import checkpointing, lora_targets, mmdit, recognition, sd3_files, sd3_text, t5, vae
from library.models.family import Absent, LatentSpace, LoraTarget, Parts, Plain
from library.models.mmdit import Mmdit
from library.models.sd3_text import Sd3Text
from library.objectives.flow import Flow
from library.options.flow import FlowOptions

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

SCALE, SHIFT = 1.5305, 0.0609  # of the latents: sd3-ref, SD3LatentFormat
CHANNELS = 16
T5 = "t5"  # its part of a text, in the cache


@dataclass(frozen=True)
class Sd3(Plain):
    """The SD3 family: how its files are loaded and its models called."""

    checkpoint: str = ""  # tells which of the models it is
    text_files: tuple[str | None, str | None, str | None] = (None, None, None)  # --clip_l, --clip_g, --t5xxl
    t5_device: torch.device | None = None  # None: the run's
    t5_dtype: torch.dtype | None = None  # None: as all
    t5_length: int = 256  # tokens
    masks_clip: bool = False  # whether padding is hidden from CLIP-L and CLIP-G
    masks_t5: bool = False
    dropout_rates: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of each text encoder
    random_crop_rate: float = 0.0  # of the window of positions
    scales_positions: bool = False
    trains_clip: bool = True  # then a cache of text holds what T5 makes of it, and no more
    saved_texts: tuple[str, ...] = ()  # of the text encoders, those that are saved at the end of a run
    flow: FlowOptions = field(default_factory=FlowOptions)
    tokenizer_cache_dir: str | None = None
    maps_files: bool = True  # whether model files are mapped into memory; otherwise read

    name = "sd3"
    latent_space = LatentSpace(channels=CHANNELS, scale=SCALE, shift=SHIFT)
    bucket_step_multiple = 32  # as sd-scripts; the MMDiT itself takes multiples of 16
    preview_side = 1024
    side_multiple = 16
    prediction_type = "flow"
    other_networks = recognition.other_networks(recognition.SD3)
    leaves_text_layers_out = False  # the pooled text is the last layer's

    @classmethod
    def from_options(cls, options: Any) -> Sd3:
        """Return the family as the options describe it."""
        model, own = options.model, options.sd3
        t5_device, t5_dtype = t5.placement(own.t5xxl_device, own.t5xxl_dtype)
        return cls(
            checkpoint=model.pretrained_model_name_or_path or "",
            text_files=(own.clip_l, own.clip_g, own.t5xxl),
            t5_device=t5_device,
            t5_dtype=t5_dtype,
            t5_length=own.t5xxl_max_token_length,
            masks_clip=own.apply_lg_attn_mask,
            masks_t5=own.apply_t5_attn_mask,
            dropout_rates=(own.clip_l_dropout_rate, own.clip_g_dropout_rate, own.t5_dropout_rate),
            random_crop_rate=own.pos_emb_random_crop_rate,
            scales_positions=own.enable_scaled_pos_embed,
            trains_clip=not options.network.network_train_unet_only,
            saved_texts=(*(sd3_files.CLIP if own.save_clip else ()), *(("t5xxl",) if own.save_t5xxl else ())),
            flow=options.flow,
            tokenizer_cache_dir=model.tokenizer_cache_dir,
            maps_files=not model.disable_mmap_load_safetensors,
        )

    # ---- files -------------------------------------------------------------------------------------------------
    @property
    def base_model_version(self) -> str:
        """The name of the base model in files: medium, 5-medium or 5-large, as its weights show."""
        return self._files_of(self.checkpoint).shape().name

    def load_denoiser(self, checkpoint: str, dtype: torch.dtype) -> nn.Module:
        """Return the MMDiT alone, as `load` does."""
        return sd3_files.load_denoiser(self._files_of(checkpoint), dtype)

    def load_text_encoders(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return CLIP-L, CLIP-G and T5 alone, on the CPU, frozen, in eval mode; `Absent` for one that is nowhere."""
        return sd3_files.load_text_encoders(self._files_of(checkpoint), dtype, self.t5_dtype)

    def load_beside_cache(self, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, ...]:
        """Return CLIP-L and CLIP-G where they are trained, without T5, whose outputs are cached."""
        if self.caches_all_text:
            return ()
        return sd3_files.load_text_encoders(self._files_of(checkpoint), dtype, which=sd3_files.CLIP)

    def beside_cache(self, text_encoders: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
        """Return CLIP-L and CLIP-G where they are trained, without T5."""
        return () if self.caches_all_text else (*text_encoders[:2], Absent())

    def text_device(self, index: int, device: torch.device) -> torch.device:
        """Return the run's device; of T5 that which was chosen for it."""
        is_t5 = index == sd3_text.ENCODERS.index("t5xxl")
        return self.t5_device if is_t5 and self.t5_device is not None else device

    def load_vae(self, checkpoint: str, vae_path: str | None, dtype: torch.dtype) -> nn.Module:
        """Return the VAE alone, as `load` does."""
        return vae.build(sd3_files.open_vae(checkpoint, vae_path, self.maps_files), dtype, CHANNELS)

    def text_identity(self, checkpoint: str) -> str:
        """Return what identifies the text encoders, how they are called and how captions become tokens.

        At most 8 rows of each tensor are read.

        Raises:
            CheckpointError: a file is not there, not readable or holds no text encoder.
        """
        called = [f"t5 {self.t5_length}", f"as {self.t5_dtype}"]
        called += [word for word, is_on in (("masked clip", self.masks_clip), ("masked t5", self.masks_t5)) if is_on]
        kept = "all" if self.caches_all_text else "t5"
        words = sd3_text.vocabulary_names(self.tokenizer_cache_dir)
        return " ".join([*sd3_files.text_fingerprints(self._files_of(checkpoint)), *called, kept, *words])

    def text_tensors(self, text_encoders: tuple[nn.Module, ...]) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of each text encoder that is saved at the end of a run, by the name its file ends in."""
        return {
            name: sd3_text.original_tensors(text_encoder, slot)
            for slot, (name, text_encoder) in enumerate(zip(sd3_text.ENCODERS, text_encoders, strict=True))
            if name in self.saved_texts and not isinstance(text_encoder, Absent)
        }

    def _files_of(self, checkpoint: str) -> sd3_files.Files:
        return sd3_files.Files(checkpoint, self.text_files, self.maps_files)

    # ---- text --------------------------------------------------------------------------------------------------
    @property
    def caches_all_text(self) -> bool:
        """Whether no text encoder is needed beside the cache: one that is trained is."""
        return not self.trains_clip

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the captions' tokens for the three text encoders, (B, 1, 77 + 77 + t5_length) int64."""
        return sd3_text.tokenize(captions, self.t5_length, self.tokenizer_cache_dir)

    def encode_text(self, parts: Parts, tokens: Tensor, known: Mapping[str, Tensor] | None = None) -> Sd3Text:
        """Return what the text encoders make of tokens; T5's part is what is known of it, if anything is."""
        which = sd3_text.ENCODERS if known is None else sd3_files.CLIP
        text = sd3_text.encode(
            parts.text_encoders, tokens, masks_clip=self.masks_clip, masks_t5=self.masks_t5, which=which
        )
        return text if known is None else replace(text, t5=known.get(T5))

    def text_outputs(self, text: Sd3Text) -> dict[str, Tensor]:
        """Return what the cache keeps: all, or T5's part alone where CLIP is trained."""
        outputs = sd3_text.outputs_of(text)
        return outputs if self.caches_all_text else {name: outputs[name] for name in outputs if name == T5}

    def text_of(self, outputs: Mapping[str, Tensor]) -> Sd3Text:
        """Return what `text_outputs` gave as `predict` takes it."""
        return sd3_text.text_of(outputs)

    # ---- images ------------------------------------------------------------------------------------------------
    def augmented(self, batch: Batch) -> Batch:
        """Return a batch with the text encoders that are not heard, and where the window of positions lies.

        Draws from torch's generator on the CPU, and only for what is asked for: (images, 3) numbers for the texts,
        then 3 for the window.
        """
        share = batch.share
        dropped, offset = batch.dropped_texts, batch.crop_offset
        if any(self.dropout_rates):
            drawn = torch.rand(len(batch.names) if share is None else share.num_images, len(self.dropout_rates))
            is_dropped = drawn < torch.tensor(self.dropout_rates)
            dropped = noise.moved(is_dropped if share is None else is_dropped[share.rows], batch.weights.device)
        if self.random_crop_rate:
            chance, top, left = torch.rand(3).tolist()
            offset = (top, left) if chance < self.random_crop_rate else None
        return replace(batch, dropped_texts=dropped, crop_offset=offset)

    def fit_to(self, denoiser: nn.Module, resolutions: Sequence[tuple[int, int]]) -> None:
        """Scale the MMDiT's positions to pictures of these (width, height), in pixels, where that is asked for."""
        if self.scales_positions:
            assert isinstance(denoiser, Mmdit)
            denoiser.scale_positions(resolutions)

    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: Sd3Text, batch: Batch) -> Tensor:
        """Return the MMDiT's output (B, 16, h, w): the velocity, noise minus picture.

        Args:
            parts: only the denoiser is used.
            noisy: (B, 16, h, w) in latent space.
            timesteps: (B,) in [0, 1000].
            text: from `encode_text`.
            batch: for the texts that are not heard, the window of positions, and the tokens that are computed.
        """
        denoiser = parts.denoiser
        assert isinstance(denoiser, Mmdit)
        context, pooled = sd3_text.context_of(
            text, denoiser.shape.context_width, denoiser.shape.pooled_width, batch.dropped_texts
        )
        output: Tensor = denoiser(
            noisy, timesteps, context, pooled, crop_offset=batch.crop_offset, kept_tokens=batch.kept_tokens
        )
        return output

    # ---- training ----------------------------------------------------------------------------------------------
    def objective(self, noise: NoiseOptions, loss: LossOptions) -> Flow:
        """Return how latents are noised and what the MMDiT's output is compared with."""
        return Flow.from_options(self.flow, noise)

    def lora_targets(self, parts: Parts) -> Iterator[LoraTarget]:
        """Yield every module that a LoRA can adapt, in the order of LoRA files: text encoders, then MMDiT."""
        yield from lora_targets.of_sd3(parts.text_encoders, parts.denoiser)

    def enable_gradient_checkpointing(
        self, parts: Parts, train_text_encoder: bool, *, is_offloaded: bool = False
    ) -> None:
        """Compute the MMDiT's, and on demand the text encoders', activations twice; see `checkpointing.enable`."""
        present = [each for each in parts.text_encoders if not isinstance(each, Absent)]
        checkpointing.enable(parts.denoiser, present if train_text_encoder else (), is_offloaded=is_offloaded)

    def set_attention(self, parts: Parts, kind: str) -> None:
        """Return at once: the MMDiT computes with torch's scaled_dot_product_attention, whatever is asked for."""


def original_tensors(parts: Parts) -> dict[str, Tensor]:
    """Return all weights under their names in a single file with everything in it, as other tools expect them."""
    assert parts.vae is not None, "only whole models are written"
    assert isinstance(parts.denoiser, Mmdit)
    tensors = mmdit.original_tensors(parts.denoiser) | vae.original_tensors(parts.vae)
    for slot, text_encoder in enumerate(parts.text_encoders):
        prefix = sd3_files.EMBEDDED[sd3_text.ENCODERS[slot]]
        own = sd3_text.original_tensors(text_encoder, slot)
        tensors |= {f"{prefix}{name}": tensor for name, tensor in own.items()}
    return tensors
