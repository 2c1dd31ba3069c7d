"""Small pictures on disk and their samples, for the tests of the store and the loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from library.dataset.config import SubsetConfig
from library.dataset.geometry import Transform
from library.dataset.latents import LatentSettings
from library.dataset.scan import Sample
from library.masks import MaskSource

CUT = Transform(source=(96, 80), resized=(77, 64), crop=(6, 0), target=(64, 64))
ALPHA = MaskSource("alpha")


def save_picture(path: Path, seed: int = 0, channels: int = 4, size: tuple[int, int] = (96, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if channels == 1 else (size[1], size[0], channels)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def sample_of(path: Path, mask: MaskSource = ALPHA, **changes) -> Sample:
    subset = changes.pop("subset", SubsetConfig(path.parent))
    sample = Sample(path, ("a cat",), subset, 0, False, 1, 1, CUT, mask)
    return replace(sample, **changes)


class StubEncoder:
    """An encoder that tells images apart by their colours, adds seeded noise, and counts what it encodes."""

    def __init__(self) -> None:
        self.num_encoded = 0

    def __call__(self, images, seeds):
        self.num_encoded += len(seeds)
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        noise = [torch.randn(pooled.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat((pooled, pooled[:, :1]), dim=1) + 0.001 * torch.cat((torch.stack(noise),) * 2, dim=1)[:, :4]

    def taken(self) -> int:
        """Return how many images were encoded since the last call."""
        number, self.num_encoded = self.num_encoded, 0
        return number


def settings_of(**changes) -> LatentSettings:
    return replace(
        LatentSettings("sd", "vae", torch.float16, torch.device("cpu"), batch_size=2, to_disk=True), **changes
    )
