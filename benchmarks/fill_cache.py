"""Filling the latent cache with an encoder that costs nothing: what reading, masks, hashing and writing allow.

For RGBA pictures (alpha masks) and for JPEG with mask images it measures a first start, a second start (all entries up
to date), and starts after the masks were switched off and on (only masks are renewed). The rate counts the whole of
build_store: judging, decoding, converting, encoding, writing.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import Figure, busy_s, conclude, load, make_parser, timed, wait_until_quiet
from pictures import dataset_config, write_pictures
from torch import Tensor

from library.dataset import config, images, latents
from library.dataset.latents import LatentSettings
from library.dataset.scan import Sample, scan
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.masks import MaskOptions

MIN_IMAGES_PER_S = 25


@dataclass
class StubEncoder:
    """Takes every eighth pixel for latents, and counts the images."""

    num_encoded: int = 0

    def __call__(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return (B, 4, H/8, W/8)."""
        self.num_encoded += len(seeds)
        return pixels[:, (0, 1, 2, 0), ::8, ::8]


@dataclass(frozen=True)
class Case:
    """One folder of pictures, as two configs see it."""

    kind: str
    masked: tuple[Sample, ...]
    unmasked: tuple[Sample, ...]
    cache_dir: Path


def read_samples(dataset: Path) -> tuple[Sample, ...]:
    """Return the samples of a dataset config."""
    configs = config.load(DatasetOptions(dataset_config=str(dataset)), CaptionOptions(), MaskOptions())
    return scan(configs).samples


def make_case(folder: Path, kind: str, count: int, side: int) -> Case:
    """Write pictures and their two configs."""
    pictures = write_pictures(folder / kind, count, side, kind)
    masked, unmasked = (dataset_config(pictures, side, is_masked=each, kind=kind) for each in (True, False))
    return Case(kind, read_samples(masked), read_samples(unmasked), folder / f"cache_{kind}")


def measure(case: Case, settings: LatentSettings, runs: int, warm_up: int, patience_s: float) -> list[Figure]:
    """Return the figures of a case; each round fills an empty cache and starts again three times."""
    settings = replace(settings, cache_dir=case.cache_dir)
    seconds: dict[str, list[float]] = {"fill": [], "again": [], "off": [], "on": []}
    worked: list[float] = []  # ms of processor time an image
    others: list[float] = []  # cores that other programs kept busy meanwhile
    starts = {"fill": case.masked, "again": case.masked, "off": case.unmasked, "on": case.masked}
    count = len(case.masked)
    for turn in range(warm_up + runs):
        shutil.rmtree(case.cache_dir, ignore_errors=True)
        wait_until_quiet(patience_s)
        for name, samples in starts.items():
            encoder, busy = StubEncoder(), busy_s()
            begin, begin_work = time.perf_counter(), time.process_time()
            store = latents.build_store(samples, settings, encoder)
            duration, work = time.perf_counter() - begin, time.process_time() - begin_work
            assert encoder.num_encoded == (count if name == "fill" else 0), f"{name} encoded {encoder.num_encoded}"
            assert len(store) == count
            if turn >= warm_up:
                seconds[name].append(duration)
            if turn >= warm_up and name == "fill":
                worked.append(1000 * work / count)
                others.append(max(0.0, busy_s() - busy - work) / duration)
    label = "RGBA PNG" if case.kind == "rgba" else "JPEG + mask PNG"
    rates = tuple(count / each for each in seconds["fill"])
    bound = MIN_IMAGES_PER_S if case.kind == "rgba" else None
    most_ms = bound and 1000 * (os.cpu_count() or 1) / bound  # what the rate leaves for an image if all cores are free
    return [
        Figure(f"{label}: fill", "images/s", rates, warm_up, at_least=bound),
        Figure(f"{label}: fill {count}", "s", tuple(seconds["fill"]), warm_up),
        Figure(f"{label}: processor time an image", "ms", tuple(worked), warm_up, at_most=most_ms),
        Figure(f"{label}: other programs meanwhile", "cores", tuple(others), warm_up),
        Figure(f"{label}: second start", "s", tuple(seconds["again"]), warm_up),
        Figure(f"{label}: masks switched off", "s", tuple(seconds["off"]), warm_up),
        Figure(f"{label}: masks switched on", "s", tuple(seconds["on"]), warm_up),
    ]


def decoding(case: Case, runs: int) -> Figure:
    """Return what decoding one picture costs on one thread: the floor under the rate."""
    paths = [sample.path for sample in case.masked[: max(1, min(20, runs * 10))]]
    seconds = [
        timed(lambda path=path: images.read_image(path, want_alpha=True), runs=1, warm_up=1)[0] for path in paths
    ]
    return Figure(f"decode one, one thread ({case.kind})", "ms", tuple(1000 * each for each in seconds), 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=200, help="pictures (default 200)")
    parser.add_argument("--side", type=int, default=1024, help="their sides in pixels (default 1024)")
    parser.add_argument("--runs", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--kinds", nargs="+", choices=("rgba", "jpg"), default=["rgba", "jpg"])
    parser.add_argument(
        "--patience", type=float, default=0, help="seconds to wait for a quiet machine before each fill (default 0)"
    )
    parser.add_argument("--vae_batch_size", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.count, arguments.side, arguments.runs = 3, 128, 1
    logging.getLogger("library").setLevel(logging.WARNING)
    conclude(arguments, *run(arguments))


def run(arguments: Namespace) -> tuple[list[Figure], float]:
    """Return all figures, and the load before they were measured."""
    settings = LatentSettings(
        "sd", "stub", torch.float16, torch.device("cpu"), batch_size=arguments.vae_batch_size, to_disk=True
    )
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [make_case(Path(folder), kind, arguments.count, arguments.side) for kind in arguments.kinds]
        load_before = load()
        for case in cases:
            figures += [*measure(case, settings, arguments.runs, 0 if arguments.quick else 1, arguments.patience)]
            figures.append(decoding(case, arguments.runs))
    return figures, load_before


if __name__ == "__main__":
    main()
