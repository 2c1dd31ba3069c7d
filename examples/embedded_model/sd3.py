"""Make a small SD3 or SD3.5 checkpoint, in the original single-file layout, from a seed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

if __package__ in (None, ""):  # started as a file: the project's folder is two levels up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.embedded_model.make import PRECISIONS, clip_config, write_tokenizer
from examples.embedded_model.starting_weights import CARRYING_WIDTH, shape_vae
from library.models import sd3_text
from library.models.checkpoint import write_safetensors
from library.models.family import Parts
from library.models.layout.mmdit import DiffusersNames, MmditShape
from library.models.mmdit import Mmdit
from library.models.mmdit import original_tensors as original_mmdit_tensors
from library.models.mmdit_positions import scaled_axis
from library.models.sd3 import CHANNELS, SCALE, SHIFT, original_tensors
from library.models.sd3_text import ENCODERS

T5_WORDS = 32128  # rows of its table; the tokenizer knows 32,100


@dataclass(frozen=True)
class Sd3Size:
    """How wide and deep the parts are; heads and names are SD3's own."""

    kind: str = "medium"  # or "5-medium", "5-large"
    depth: int = 4  # of 3-medium: 24
    width: int = 128  # of 3-medium: 1536
    position_side: int = 64  # of 3-medium: 192
    text: tuple[int, int, int] = (32, 48, 96)  # widths of the three text encoders
    text_layers: tuple[int, int, int] = (3, 4, 2)  # of SD3: 12, 32, 24
    vae: tuple[int, ...] = (96, 32, 96, 96)

    @property
    def mmdit(self) -> MmditShape:
        """Return the MMDiT's size."""
        return MmditShape(
            depth=self.depth,
            width=self.width,
            channels=CHANNELS,
            patch=2,
            context_width=self.text[2],
            pooled_width=self.text[0] + self.text[1],
            mlp_width=4 * self.width,
            has_qk_norm=self.kind != "medium",
            num_dual=(self.depth + 1) // 2 if self.kind == "5-medium" else 0,
            position_side=self.position_side,
        )


def build(seed: int = 0, size: Sd3Size | None = None) -> Parts:
    """Return the model's parts in float32, with weights that depend on nothing but seed and size."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    size = size or Sd3Size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clips = [
            CLIPTextModelWithProjection(clip_config(width, layers, activation))
            for width, layers, activation in zip(size.text, size.text_layers, ("quick_gelu", "gelu"), strict=False)
        ]
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=T5_WORDS,
                d_model=size.text[2],
                d_kv=64,
                num_heads=max(1, size.text[2] // 64),
                d_ff=size.text[2] * 2,
                num_layers=size.text_layers[2],
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        mmdit = Mmdit(size.mmdit, positions(size))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            latent_channels=CHANNELS,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=SCALE,
            shift_factor=SHIFT,
        )
    if size.vae[0] % CARRYING_WIDTH == 0 and size.vae[-1] % CARRYING_WIDTH == 0:
        shape_vae(vae)
    return Parts(mmdit.eval(), (*(clip.eval() for clip in clips), t5.eval()), vae.eval())


def positions(size: Sd3Size) -> Tensor:
    """Return a table of positions (1, side * side, D): sines and cosines of the column, then of the row."""
    side, half = size.position_side, size.width // 2
    axis = scaled_axis(-(-side * 2 // 3), half)[:side]
    across, down = axis[None, :].expand(side, side, half), axis[:, None].expand(side, side, half)
    return torch.cat([across, down], dim=-1).reshape(1, side * side, size.width)


def tensors(seed: int = 0, precision: str = "fp16", size: Sd3Size | None = None) -> dict[str, Tensor]:
    """Return everything under its name in a single file."""
    dtype = PRECISIONS[precision]
    return {name: tensor.to(dtype) for name, tensor in original_tensors(build(seed, size)).items()}


def write(path: Path, seed: int = 0, precision: str = "fp16", size: Sd3Size | None = None) -> Path:
    """Write the checkpoint, with its text encoders and VAE, to path and return path."""
    write_safetensors(path, tensors(seed, precision, size), {"format": "pt"})
    return path


def write_apart(folder: Path, seed: int = 0, precision: str = "fp16", size: Sd3Size | None = None) -> Path:
    """Write the same model as files of their own, model, clip_l, clip_g, t5xxl and vae, and return the folder."""
    everything = tensors(seed, precision, size)
    prefixes = {name: f"text_encoders.{name}.transformer." for name in ENCODERS} | {"vae": "first_stage_model."}
    for name, prefix in prefixes.items():
        own = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
        write_safetensors(folder / f"{name}.safetensors", own, {"format": "pt"})
    rest = {key: value for key, value in everything.items() if not key.startswith(tuple(prefixes.values()))}
    write_safetensors(folder / "model.safetensors", rest, {"format": "pt"})
    return folder


def write_diffusers(folder: Path, seed: int = 0, precision: str = "fp16", size: Sd3Size | None = None) -> Path:
    """Write the same model as a diffusers folder, readable by transformers 4 and 5 alike, and return the folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    size = size or Sd3Size()
    parts = build(seed, size)
    dtype = PRECISIONS[precision]
    assert isinstance(parts.denoiser, Mmdit)
    transformer = SD3Transformer2DModel(
        sample_size=size.position_side,
        num_layers=size.depth,
        num_attention_heads=size.mmdit.heads,
        joint_attention_dim=size.mmdit.context_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=size.mmdit.pooled_width,
        pos_embed_max_size=size.position_side,
        qk_norm="rms_norm" if size.mmdit.has_qk_norm else None,
        dual_attention_layers=tuple(range(size.mmdit.num_dual)),
    )
    transformer.load_state_dict(diffusers_tensors(parts.denoiser))
    modules = {"transformer": transformer, "vae": parts.vae}
    modules |= dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), parts.text_encoders, strict=True))
    for part, module in modules.items():
        assert module is not None
        torch.nn.Module.to(module, dtype).save_pretrained(folder / part)  # diffusers' own .to warns about dtypes
    for slot, part in enumerate(("text_encoder", "text_encoder_2", "text_encoder_3")):
        tensors_of_part = sd3_text.original_tensors(parts.text_encoders[slot], slot)
        write_safetensors(folder / part / "model.safetensors", tensors_of_part, {"format": "pt"})
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", v2=False)
    write_tokenizer(folder / "tokenizer_2", v2=True)
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def diffusers_tensors(denoiser: Mmdit) -> dict[str, Tensor]:
    """Return the MMDiT's weights under diffusers' names."""
    names = DiffusersNames(denoiser.shape.depth)
    written: dict[str, Tensor] = {}
    for name, tensor in original_mmdit_tensors(denoiser, "").items():
        stored = names.of(name)
        if stored.is_swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        written |= dict(zip(stored.names, tensor.chunk(len(stored.names)), strict=True))
    return written


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the checkpoint to write, ending in .safetensors")
    parser.add_argument("--kind", choices=("medium", "5-medium", "5-large"), default="5-medium")
    parser.add_argument("--seed", type=int, default=0, help="decides every weight (default 0)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp16")
    parser.add_argument("--apart", type=Path, metavar="DIR", help="also write the parts as files of their own")
    parser.add_argument("--diffusers", type=Path, metavar="DIR", help="also write the model as a diffusers folder")
    arguments = parser.parse_args()
    size = Sd3Size(arguments.kind)
    write(arguments.output, arguments.seed, arguments.precision, size)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")
    if arguments.apart:
        print(write_apart(arguments.apart, arguments.seed, arguments.precision, size))
    if arguments.diffusers:
        print(write_diffusers(arguments.diffusers, arguments.seed, arguments.precision, size))


if __name__ == "__main__":
    main()
