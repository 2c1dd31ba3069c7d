"""Bytes, write time and read time of one entry of the latent cache: a picture of 1024x1024, with and without mask.

The entry is what --cache_latents_to_disk keeps with a half-precision VAE: 4x128x128 float16 latents and the exact mask
weights. Reading is measured with the file in the system's page cache, writing without waiting for the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import Figure, conclude, load, make_parser, timed

from library.cache import latents
from library.cache.latents import CachedLatents, Fingerprint, Stamp
from library.masks import CELL, MaskKind, shrink

SIDE = 1024
MAX_BYTES = 170_000
MAX_READ_MS = 0.3


def entry(mask_kind: MaskKind) -> tuple[CachedLatents, Fingerprint]:
    """Return an entry with plausible contents, and the fingerprint of an image in a folder of usual depth."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, SIDE // CELL, SIDE // CELL, generator=generator).half()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    mask = None if mask_kind == "none" else shrink(pixels)
    image = Stamp(
        "datasets/characters/cat/images/cat_on_a_chair_0001.png", 1_700_000_000_000_000_000, 1_500_000, "0" * 32
    )
    cut = f"{SIDE}x{SIDE} {SIDE}x{SIDE} 0x0 {SIDE}x{SIDE} default"
    return CachedLatents(values, None, mask), Fingerprint(image, cut, "0" * 32, "F16", mask_kind, None)


def measure(folder: Path, mask_kind: MaskKind, runs: int) -> list[Figure]:
    """Return the figures of an entry."""
    path = folder / f"{mask_kind}.safetensors"
    cached, fingerprint = entry(mask_kind)
    label = "without mask" if mask_kind == "none" else "with mask"
    warm_up = min(20, runs)
    writes = timed(lambda: latents.write(path, cached, fingerprint), runs=runs, warm_up=warm_up)
    reads = timed(lambda: latents.read(path, flip=False, mask_kind=mask_kind), runs=runs, warm_up=warm_up)
    return [
        Figure(f"entry {label}", "bytes", (path.stat().st_size,), at_most=MAX_BYTES),
        Figure(f"write {label}", "ms", tuple(1000 * each for each in writes), warm_up),
        Figure(f"read {label}", "ms", tuple(1000 * each for each in reads), warm_up, at_most=MAX_READ_MS),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="reads and writes that count (default 1000)")
    arguments = parser.parse_args(argv)
    runs, load_before = 5 if arguments.quick else arguments.runs, load()
    with tempfile.TemporaryDirectory() as folder:
        figures = [figure for kind in ("none", "alpha") for figure in measure(Path(folder), kind, runs)]
    conclude(arguments, figures, load_before)


if __name__ == "__main__":
    main()
