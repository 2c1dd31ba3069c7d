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
from library.models import checkpointing, clip, clip_tokens, folders, unet, vae
from library.models.checkpoint import Prefixed, TensorSource, has_prefix, open_tensors
from library.models.family import LatentSpace, LoraTarget, Parts
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout
from library.models.prompt_weights import parse
from library.objectives.ddpm import Ddpm

if TYPE_CHECKING:
    from library.options.loss import LossOptions
    from library.options.noise import NoiseOptions

SCALE = 0.18215  # v1-inference.yaml and v2-inference.yaml, scale_factor
OTHER_FAMILIES = (  # (a part of a tensor's name, what such a file is, its training script)
    ("conditioner.embedders.", "an SDXL model", "sdxl_train_network.py"),
    ("joint_blocks.", "a Stable Diffusion 3 model", "sd3_train_network.py"),
)
OF_SDXL = ("a network for SDXL", "sdxl_train_network.py")
OTHER_NETWORKS = (  # (the start of a tensor's name, what such a file is, its training script)
    ("lora_te1_", *OF_SDXL),
    ("lora_te2_", *OF_SDXL),
    ("lora_unet_input_blocks_", *OF_SDXL),
    ("lora_unet_middle_block_", *OF_SDXL),
    ("lora_unet_output_blocks_", *OF_SDXL),
    ("lora_unet_joint_blocks_", "a network for Stable Diffusion 3", "sd3_train_network.py"),
)


@dataclass(frozen=True)
class Sd:
    """The SD 1.x / 2.x family: how its files are loaded and its models called."""

    v2: bool = False
    v_parameterization: bool = False
    clip_skip: int | None = None  # None or 1: the last layer
    max_token_length: int | None = None  # None and 75: one window; 150: two; 225: three
    weighted_captions: bool = False
    tokenizer_cache_dir: str | None = None

    name = "sd"
    latent_space = LatentSpace(channels=4, scale=SCALE)
    bucket_step_multiple = 64  # the U-Net halves latents three times
    other_networks = OTHER_NETWORKS

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
        )

    # ---- files -------------------------------------------------------------------------------------------------
    def load(
        self, checkpoint: str, vae_path: str | None, dtype: torch.dtype, vae_dtype: torch.dtype | None = None
    ) -> Parts:
        """Return the models of a single file, a diffusers folder or a hub id, on the CPU, frozen, in eval mode.

        Args:
            checkpoint: --pretrained_model_name_or_path.
            vae_path: --vae: a VAE file, a full checkpoint, a folder or a hub id; None for the checkpoint's own.
            dtype: of the U-Net and the text encoder.
            vae_dtype: of the VAE, where it differs.

        Raises:
            CheckpointError: says what is wrong with the file and what to do.
        """
        return Parts(
            self.load_denoiser(checkpoint, dtype),
            self.load_text_encoders(checkpoint, dtype),
            self.load_vae(checkpoint, vae_path, vae_dtype or dtype),
        )

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
        _check_family(file)
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

    def vae_identity(self, checkpoint: str, vae_path: str | None) -> str:
        """Return 32 hex digits that identify the VAE's encoder, read without loading the model.

        Raises:
            CheckpointError: the file is not there, not readable or holds no VAE.
        """
        return vae.fingerprint(open_tensors(folders.vae_file(vae_path or checkpoint)))

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
        words = clip_tokens.vocabulary_name(self.tokenizer_cache_dir, self._tokenizer[0])
        return " ".join([clip.fingerprint(file), *called, words])

    # ---- text --------------------------------------------------------------------------------------------------
    @property
    def num_windows(self) -> int:
        """Return how many windows of 77 tokens a caption gets."""
        return (self.max_token_length or clip_tokens.CONTENT) // clip_tokens.CONTENT

    @property
    def _tokenizer(self) -> tuple[str, str, int]:
        """The tokenizer's folder in --tokenizer_cache_dir, the word that pads, and its token."""
        if self.v2:
            return "stabilityai_stable-diffusion-2", "!", 0
        return "openai_clip-vit-large-patch14", clip_tokens.END_WORD, clip_tokens.EOS

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the captions' tokens, (B, windows, 77) int64.

        With weighted_captions (B, windows, 2, 77) float32: the tokens, which float32 holds exactly, and their weights.
        """
        name, pad_word, pad = self._tokenizer
        encode = clip_tokens.tokenizer(self.tokenizer_cache_dir, name, pad_word).encode_batch
        if not self.weighted_captions:
            encoded = encode(list(captions), add_special_tokens=False)
            return torch.tensor([clip_tokens.windows(entry.ids, self.num_windows, pad) for entry in encoded])
        rows = []
        for caption in captions:
            pieces = parse(caption)
            encoded = encode([text for text, _ in pieces], add_special_tokens=False)
            ids = [token for entry in encoded for token in entry.ids]
            weights = [
                weight for entry, (_, weight) in zip(encoded, pieces, strict=True) for _ in range(len(entry.ids))
            ]
            tokens = clip_tokens.windows(ids, self.num_windows, pad)
            factors = clip_tokens.weight_windows(weights, self.num_windows)
            rows.append(torch.stack([torch.tensor(tokens, dtype=torch.float32), torch.tensor(factors)], dim=1))
        return torch.stack(rows)

    def encode_text(self, parts: Parts, tokens: Tensor) -> Tensor:
        """Return hidden states (B, N, D), N = 75 * windows + 2, of what `tokenize` returned.

        Each window is encoded alone. Weights multiply a token's hidden state, without renormalising.
        """
        weights = None
        if tokens.dim() == 4:
            tokens, weights = tokens[:, :, 0].long(), tokens[:, :, 1]
        batch, num_windows, length = tokens.shape
        states = clip.hidden_states(parts.text_encoders[0], tokens.reshape(-1, length), self.clip_skip)
        states = states.reshape(batch, num_windows, length, -1)
        if weights is not None:
            states = states * weights.to(states).unsqueeze(-1)
        return clip.join_windows(states)

    def text_outputs(self, text: Tensor) -> dict[str, Tensor]:
        """Return the hidden states (B, N, D) by their name in the cache."""
        return {"hidden_states": text}

    def text_of(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states (B, N, D) of what `text_outputs` gave."""
        return outputs["hidden_states"]

    # ---- images ------------------------------------------------------------------------------------------------
    def encode_images(self, parts: Parts, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents (B, 4, h, w), not scaled, of images (B, 3, H, W) in [-1, 1].

        Args:
            parts: only the VAE is used.
            images: on the VAE's device.
            noise: (B, 4, h, w) standard normal, which decides the draw from the VAE's distribution; None: fresh.
        """
        assert parts.vae is not None, "cached images are not encoded"
        return vae.encode(parts.vae, images, noise)

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
    def base_model_version(self) -> str:
        """The name of the base model in files: sd_v1 or sd_v2, with _v for velocity prediction."""
        return ("sd_v2" if self.v2 else "sd_v1") + ("_v" if self.v_parameterization else "")

    def objective(self, noise: NoiseOptions, loss: LossOptions) -> Ddpm:
        """Return how latents are noised and what the U-Net's output is compared with."""
        return Ddpm.from_options(noise, loss, self.v_parameterization)

    def lora_targets(self, parts: Parts) -> Iterator[LoraTarget]:
        """Yield every module that a LoRA can adapt, in the order of LoRA files: text encoder, then U-Net."""
        return lora_targets_of(parts.text_encoders, parts.denoiser)

    def enable_gradient_checkpointing(
        self, parts: Parts, train_text_encoder: bool, *, is_offloaded: bool = False
    ) -> None:
        """Trade time for memory: the U-Net's, and on demand the text encoder's, activations are computed twice.

        Both are put in train mode, without which transformers ignores the setting; neither has dropout. is_offloaded
        is for the U-Net: the text encoder's checkpoints are some 100 kB each.
        """
        denoiser: Any = parts.denoiser
        denoiser.enable_gradient_checkpointing(checkpointing.offloaded if is_offloaded else None)
        denoiser.train()
        if train_text_encoder:
            text_encoder: Any = parts.text_encoders[0]
            enable = getattr(text_encoder, "activation_checkpointing_enable", None)  # its name from transformers 5 on
            (enable or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})
            text_encoder.train()

    def set_attention(self, parts: Parts, kind: str) -> None:
        """Choose the U-Net's attention: "sdpa" or "xformers" (a warning and sdpa where that cannot be used)."""
        unet.set_attention(parts.denoiser, kind)


def lora_targets_of(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> Iterator[LoraTarget]:
    """Yield the LoRA targets of a text encoder and a U-Net, under the names that LoRA files use.

    Args:
        text_encoders: none or one transformers CLIPTextModel.
        denoiser: a U-Net with diffusers' module structure.
    """
    for text_encoder in text_encoders:
        model: Any = clip.inner(text_encoder)
        for path in clip_layout.lora_paths(len(model.encoder.layers)):
            name = f"lora_te_text_model_{path.replace('.', '_')}"
            yield LoraTarget(name, model.get_submodule(path), "text_encoder", "attention", None)
    modules = dict(denoiser.named_modules())
    for entry in unet_layout.lora_paths():
        if entry.path in modules:
            name = f"lora_unet_{entry.path.replace('.', '_')}"
            yield LoraTarget(name, modules[entry.path], "unet", entry.kind, entry.block)


def original_tensors(parts: Parts, v2: bool) -> dict[str, Tensor]:
    """Return all weights under their names in a single-file checkpoint, as other tools expect them."""
    assert parts.vae is not None, "only whole models are written"
    return (
        unet.original_tensors(parts.denoiser, linear_projection=v2)
        | vae.original_tensors(parts.vae)
        | clip.original_tensors(parts.text_encoders[0], openclip=v2)
    )


def _check_family(file: TensorSource) -> None:
    """Raise CheckpointError where the file is not an SD 1.x or 2.x checkpoint, and name the right script."""
    for part, kind, script in OTHER_FAMILIES:
        if any(part in name for name in file.shapes):
            raise CheckpointError(f"{file.path}: is {kind}. Train it with {script}.")
    if any(name.startswith(("lora_unet_", "lora_te_")) for name in file.shapes):
        raise CheckpointError(
            f"{file.path}: is a LoRA file. --pretrained_model_name_or_path needs the model it was trained on."
        )
    if not has_prefix(file, unet_layout.PREFIX):
        raise CheckpointError(
            f"{file.path}: holds no U-Net (no tensor starts with {unet_layout.PREFIX}). "
            "Give a full Stable Diffusion checkpoint."
        )
