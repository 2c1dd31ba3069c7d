"""Make the embedded model: a small Stable Diffusion 1.x checkpoint, in the original single-file layout, from a seed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # started as a file: the project's folder is two levels up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.embedded_model.starting_weights import CARRYING_WIDTH, shape_unet, shape_vae
from library.models.checkpoint import write_safetensors
from library.models.clip_tokens import BOS, EOS, shipped_vocabulary, write_vocabulary
from library.models.family import Parts
from library.models.sd import original_tensors

PRECISIONS = {"float": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """How wide the parts are; block structure, heads and names are Stable Diffusion's own."""

    # 64 at the depth: with one channel a group, the norms cannot take a picture of 64 pixels, one cell there
    unet: tuple[int, ...] = (96, 32, 64, 64)
    vae: tuple[int, ...] = (96, 32, 96, 96)
    text: int = 32  # the 49,408 words alone are 3 MB
    text_layers: int = 12
    v2: bool = False


def build(seed: int = 0, size: Size | None = None) -> Parts:
    """Return the model's parts in float32, with weights that depend on nothing but seed and size."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    size = size or Size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(clip_config(size.text, size.text_layers, "gelu" if size.v2 else "quick_gelu"))
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=size.unet,
            cross_attention_dim=size.text,
            attention_head_dim=[max(1, width // 64) for width in size.unet] if size.v2 else 8,
            use_linear_projection=size.v2,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.vae,
            layers_per_block=2,
            latent_channels=4,
        )
    if size.unet[0] % CARRYING_WIDTH == 0:
        shape_unet(unet)
    if size.vae[0] % CARRYING_WIDTH == 0 and size.vae[-1] % CARRYING_WIDTH == 0:
        shape_vae(vae)
    return Parts(unet.eval(), (text_encoder.eval(),), vae.eval())


def clip_config(width: int, layers: int, activation: str) -> Any:
    """Return the configuration of a CLIP text encoder with CLIP's words."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def write(path: Path, seed: int = 0, precision: str = "fp16", size: Size | None = None) -> Path:
    """Write the checkpoint to path and return path."""
    size = size or Size()
    tensors = original_tensors(build(seed, size), v2=size.v2)
    dtype = PRECISIONS[precision]
    write_safetensors(path, {name: tensor.to(dtype) for name, tensor in tensors.items()}, {"format": "pt"})
    return path


def write_diffusers(folder: Path, seed: int = 0, precision: str = "fp16", size: Size | None = None) -> Path:
    """Write the same model as a diffusers folder, readable by transformers 4 and 5 alike, and return the folder."""
    from diffusers import DDIMScheduler

    size = size or Size()
    parts = build(seed, size)
    dtype = PRECISIONS[precision]
    for part, module in (("unet", parts.denoiser), ("vae", parts.vae), ("text_encoder", parts.text_encoders[0])):
        torch.nn.Module.to(module, dtype).save_pretrained(folder / part)  # diffusers' own .to warns about dtypes
    text_encoder = parts.text_encoders[0].state_dict()
    nested = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text_encoder.items()}
    write_safetensors(folder / "text_encoder" / "model.safetensors", nested, {"format": "pt"})
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", v2=size.v2)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, v2: bool) -> None:
    """Write CLIP's tokenizer as transformers reads it."""
    write_vocabulary(folder, shipped_vocabulary())
    words = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    words["pad_token"] = "!" if v2 else "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **words}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", words)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
