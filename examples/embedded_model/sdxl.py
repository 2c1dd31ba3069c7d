"""Make a small SDXL checkpoint, in the original single-file layout, from a seed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

if __package__ in (None, ""):  # started as a file: the project's folder is two levels up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.embedded_model.make import PRECISIONS, clip_config, write_tokenizer
from examples.embedded_model.starting_weights import CARRYING_WIDTH, shape_unet, shape_vae
from library.models.checkpoint import write_safetensors
from library.models.family import Parts
from library.models.sdxl import original_tensors

NUM_SIZES = 6  # what the U-Net is told of a picture


@dataclass(frozen=True)
class SdxlSize:
    """How wide and deep the parts are; levels, heads and names are SDXL's own."""

    unet: tuple[int, ...] = (96, 32, 64)
    depths: tuple[int, ...] = (0, 1, 2)  # of SDXL: 0, 2, 10
    vae: tuple[int, ...] = (96, 32, 96, 96)
    text: tuple[int, int] = (32, 64)  # widths of the two text encoders
    text_layers: tuple[int, int] = (3, 4)  # of SDXL: 12, 32
    size_width: int = 32  # how wide each of the sizes that the U-Net is told becomes; of SDXL: 256


def build(seed: int = 0, size: SdxlSize | None = None) -> Parts:
    """Return the model's parts in float32, with weights that depend on nothing but seed and size."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    size = size or SdxlSize()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configs = [
            clip_config(width, layers, activation)
            for width, layers, activation in zip(size.text, size.text_layers, ("quick_gelu", "gelu"), strict=True)
        ]
        text_encoders = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=size.unet,
            down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in size.depths],
            up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(size.depths)],
            transformer_layers_per_block=[max(1, depth) for depth in size.depths],
            cross_attention_dim=sum(size.text),
            attention_head_dim=[max(1, width // 64) for width in size.unet],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size.size_width,
            projection_class_embeddings_input_dim=size.text[1] + NUM_SIZES * size.size_width,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
    if size.unet[0] % CARRYING_WIDTH == 0:
        shape_unet(unet)
    if size.vae[0] % CARRYING_WIDTH == 0 and size.vae[-1] % CARRYING_WIDTH == 0:
        shape_vae(vae)
    return Parts(unet.eval(), tuple(text_encoder.eval() for text_encoder in text_encoders), vae.eval())


def write(path: Path, seed: int = 0, precision: str = "fp16", size: SdxlSize | None = None) -> Path:
    """Write the checkpoint to path and return path."""
    dtype = PRECISIONS[precision]
    tensors = {name: tensor.to(dtype) for name, tensor in original_tensors(build(seed, size)).items()}
    write_safetensors(path, tensors, {"format": "pt"})
    return path


def write_diffusers(folder: Path, seed: int = 0, precision: str = "fp16", size: SdxlSize | None = None) -> Path:
    """Write the same model as a diffusers folder, readable by transformers 4 and 5 alike, and return the folder."""
    from diffusers import EulerDiscreteScheduler

    parts = build(seed, size)
    dtype = PRECISIONS[precision]
    modules = {"unet": parts.denoiser, "vae": parts.vae}
    modules |= {"text_encoder": parts.text_encoders[0], "text_encoder_2": parts.text_encoders[1]}
    for part, module in modules.items():
        torch.nn.Module.to(module, dtype).save_pretrained(folder / part)  # diffusers' own .to warns about dtypes
    first = parts.text_encoders[0].state_dict()
    nested = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in first.items()}
    write_safetensors(folder / "text_encoder" / "model.safetensors", nested, {"format": "pt"})
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", v2=False)
    write_tokenizer(folder / "tokenizer_2", v2=True)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.36.0",
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the checkpoint to write, ending in .safetensors")
    parser.add_argument("--seed", type=int, default=0, help="decides every weight (default 0)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp16")
    parser.add_argument("--diffusers", type=Path, metavar="DIR", help="also write the model as a diffusers folder")
    arguments = parser.parse_args()
    write(arguments.output, arguments.seed, arguments.precision)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")
    if arguments.diffusers:
        print(write_diffusers(arguments.diffusers, arguments.seed, arguments.precision))


if __name__ == "__main__":
    main()
