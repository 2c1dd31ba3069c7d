"""The reference's numbers that the tests of models use."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from library.models import clip, unet, vae
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout

DATA = Path(__file__).resolve().parents[1] / "data"


def read(name: str) -> Any:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


def base_keys(architecture: str) -> dict[str, list[int]]:
    return read(f"models/base_keys_{architecture}.json.gz")["required"]


class Shapes:
    """A file of which only the shapes are known."""

    path = "shapes only"

    def __init__(self, shapes, prefix):
        self.shapes = {name[len(prefix) :]: tuple(shape) for name, shape in shapes.items() if name.startswith(prefix)}

    def read(self, name):
        return torch.empty(self.shapes[name], device="meta")

    def rows(self, name, start, stop):
        return self.read(name)[start:stop]


def full_size(architecture):
    """Return the real architecture's parts without memory, built from nothing but the reference's names and shapes."""
    shapes, v2 = base_keys(architecture), architecture == "sd21"
    denoiser = unet.build(Shapes(shapes, unet_layout.PREFIX), v2, torch.float32)
    text = (
        clip.build_openclip(Shapes(shapes, clip_layout.SD2_PREFIX), torch.float32)
        if v2
        else clip.build(Shapes(shapes, clip_layout.SD1_PREFIX), torch.float32)
    )
    return denoiser, text, vae.build(Shapes(shapes, ""), torch.float32)
