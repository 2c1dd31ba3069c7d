"""SD's VAE: built from a file of either layout, identified without loading, used to encode images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.models.checkpoint import (
    Prefixed,
    TensorSource,
    build_on_meta,
    has_prefix,
    load_onto,
    require,
    sampled_rows,
)
from library.models.layout import vae as layout

SD_CHANNELS = 4  # of the latents of SD 1.x, 2.x and XL
QUANT = "quant_conv.weight"


def build(file: TensorSource, dtype: torch.dtype, channels: int = SD_CHANNELS) -> nn.Module:
    """Return diffusers' AutoencoderKL with the weights of a VAE file or full checkpoint.

    Args:
        file: original names, under "first_stage_model." or not, or diffusers' names.
        dtype: of the weights in memory.
        channels: of the family's latents.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape, or it is another family's VAE.
    """
    source, names = stored_names(file)
    check_channels(source, names, channels)
    from diffusers import AutoencoderKL

    module = build_on_meta(lambda: AutoencoderKL(**_config(source, names)))
    require(source, (names.get(name, _expected(name, names)) for name in module.state_dict()), "VAE")
    tensors = ((name, source.read(names[name])) for name in module.state_dict())
    load_onto(module, tensors, dtype, str(source.path), "VAE")
    return module


def stored_names(file: TensorSource) -> tuple[TensorSource, Mapping[str, str]]:
    """Return the VAE's tensors in a file, and for each library name the name there.

    Raises:
        CheckpointError: the file holds no VAE.
    """
    source = Prefixed(file, layout.PREFIX) if has_prefix(file, layout.PREFIX) else file
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in source.shapes:
        return source, {layout.modern_name(name): name for name in source.shapes}
    try:
        table = layout.vae_table(layout.blocks_of(source.shapes))
    except KeyError as error:
        raise CheckpointError(
            f"{file.path}: holds no VAE (tensor {error} is missing). Give a VAE file, a full checkpoint or a folder."
        ) from error
    named = ((table.to_library(name), name) for name in source.shapes)
    return source, {library: name for library, name in named if library is not None}


def weight_names(file: TensorSource) -> set[str]:
    """Return the names of the VAE's tensors among those of a full checkpoint; none where it has no VAE."""
    if not has_prefix(file, layout.PREFIX):
        return set()
    return {f"{layout.PREFIX}{stored}" for stored in stored_names(file)[1].values()}


def _expected(library_name: str, names: Mapping[str, str]) -> str:
    """Return how a missing tensor would be called in this file, for the message."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in names.values():
        return library_name
    levels = len({name.split(".")[2] for name in names if name.startswith("encoder.down_blocks.")})
    layers = len({name.split(".")[4] for name in names if name.startswith("encoder.down_blocks.0.resnets.")})
    return layout.vae_table(layout.VaeBlocks(levels, layers)).to_original(library_name) or library_name


def _config(source: TensorSource, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL that fit the tensors."""
    widths: list[int] = []
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in names:
        widths.append(source.shapes[names[key]][0])
    layers = 0
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in names:
        layers += 1
    channels = _channels(source, names)
    has_quant = channels == SD_CHANNELS or QUANT in names  # SD3's has none
    if has_quant:
        require(source, [names.get(QUANT, QUANT)], "VAE")
    return {
        "use_quant_conv": has_quant,
        "use_post_quant_conv": has_quant,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": channels,
    }


def check_channels(source: TensorSource, names: Mapping[str, str], channels: int) -> None:
    """Raise CheckpointError if a VAE's latents have other channels than the family's."""
    found = _channels(source, names)
    if found != channels:
        raise CheckpointError(
            f"{source.path}: this VAE's latents have {found} channels, the model's have {channels}. "
            "Give the model's own VAE."
        )


def _channels(source: TensorSource, names: Mapping[str, str]) -> int:
    """Return how many channels the latents have; the encoder's output is their mean and log variance."""
    last = "encoder.conv_out.weight"
    require(source, [names.get(last, last)], "VAE")
    return source.shapes[names[last]][0] // 2


def fingerprint(file: TensorSource) -> str:
    """Return 32 hex digits that identify the VAE's encoder: names, shapes, dtypes and a sample of every tensor.

    The decoder does not count, nor how the file lays the weights out: the same VAE bare, in a full checkpoint or in
    a diffusers folder has one fingerprint. At most 8 rows of each tensor are read.
    """
    source, names = stored_names(file)
    digest = hashlib.blake2b(digest_size=16)
    for library_name in sorted(name for name in names if name.startswith(layout.ENCODER_ONLY)):
        stored = names[library_name]
        shape = source.shapes[stored]
        if layout.is_attention_weight(library_name):
            shape = shape[:2]  # 1x1 convolution or linear layer: the same numbers
        sample = sampled_rows(source, stored)
        digest.update(f"{library_name} {list(shape)} {sample.dtype}\n".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encode(vae: nn.Module, images: Tensor, noise: Tensor | None) -> Tensor:
    """Return a latent (B, C, h, w) drawn from the VAE's distribution of each image, not scaled.

    Args:
        vae: diffusers' AutoencoderKL.
        images: (B, 3, H, W) in [-1, 1].
        noise: (B, C, h, w) standard normal; None draws it.
    """
    model: Any = vae
    distribution = model.encode(images.to(model.dtype)).latent_dist
    if noise is None:
        noise = torch.randn_like(distribution.mean)
    return distribution.mean + distribution.std * noise.to(distribution.mean)


def original_tensors(vae: nn.Module) -> dict[str, Tensor]:
    """Return the VAE's weights under their names in a full checkpoint."""
    model: Any = vae
    blocks = layout.VaeBlocks(len(model.encoder.down_blocks), len(model.encoder.down_blocks[0].resnets))
    table = layout.vae_table(blocks)
    written: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        if layout.is_attention_weight(name):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        written[f"{layout.PREFIX}{table.to_original(name)}"] = tensor
    return written
