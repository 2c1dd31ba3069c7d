"""What the commands for LoRA files take on a model of true size: seconds, and memory at its peak.

A Stable Diffusion 1.5 checkpoint in float32 (4.3 GB, random numbers under the true names), and two LoRA files of rank
16 for all of its layers but the resnets, are made in a temporary folder (14 GB; TMPDIR says where). Then each command
runs in a process of its own. "Resident" counts the pages of files that are mapped, which the system takes back when it
needs them; "own" does not. Memory is measured on Linux only.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import ROOT, Figure, conclude, load, make_parser, timed
from safetensors.torch import save_file

from examples.embedded_model.make import write as write_embedded
from library.models import streaming
from library.models.checkpoint import open_tensors
from networks.checkpoint_places import SD1, places
from networks.files import StoredModule
from networks.lora_file import tensors_of

NAMES = ROOT / "tests" / "data" / "models" / "base_keys_sd15.json.gz"
SCALE, LORA_SCALE = 0.02, 0.05  # of the random numbers: weights as in a model, and what a LoRA of its strength has
RANK = 16
POLL_S = 0.02
SIZES = {"VmHWM": "resident", "RssAnon": "own"}  # of /proc/<process>/status


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    peaks: Mapping[str, int]  # bytes: "resident", pages of mapped files included, and "own", without them


def write_model(path: Path) -> Path:
    """Write a checkpoint of true size and return its path."""
    shapes = json.loads(gzip.decompress(NAMES.read_bytes()))["required"]
    generator = torch.Generator().manual_seed(0)
    layout = {name: (torch.float32, tuple(shape)) for name, shape in shapes.items()}
    streaming.write(path, layout, lambda name: torch.randn(shapes[name], generator=generator) * SCALE, {}, "make")
    return path


def write_lora(path: Path, model: Path, seed: int) -> Path:
    """Write a LoRA for a model's attention and text encoder, and return its path."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, place in places(open_tensors(model), SD1).items():
        if place.kind != "resnet":
            up_shape = (place.shape[0], RANK, 1, 1) if len(place.inner) == 3 else (place.shape[0], RANK)
            down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, *place.inner), up_shape))
            modules[name] = StoredModule(down * LORA_SCALE, up * LORA_SCALE, float(RANK))
    save_file(tensors_of(modules), path)
    return path


def cost_of(command: str, *arguments: object) -> Cost:
    """Run a command of networks/ in a process of its own; return what it took."""
    words = [sys.executable, str(ROOT / "networks" / f"{command}.py"), *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peaks: dict[str, int] = {}
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
    watcher.start()
    _, said = process.communicate()
    seconds = time.perf_counter() - start
    assert process.returncode == 0, said
    return Cost(seconds, peaks)


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the largest sizes that a process's memory has had, until it ends."""
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return  # ended, or another system
        sizes = {SIZES[name]: int(rest.split()[0]) * 1024 for name, _, rest in map(_parted, lines) if name in SIZES}
        for name, size in sizes.items():
            peaks[name] = max(peaks.get(name, 0), size)
        time.sleep(POLL_S)


def _parted(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def as_figures(costs: Mapping[str, Cost]) -> list[Figure]:
    """Return the rows of commands."""
    figures = []
    for name, cost in costs.items():
        figures.append(Figure(name, "s", (cost.seconds,)))
        figures += [Figure(f"{name}: {kind}", "MB", (size / 1e6,)) for kind, size in cost.peaks.items()]
    return figures


def measure(model: Path, folder: Path, dim: int, *, is_quick: bool) -> list[Figure]:
    """Return the figures of all commands on a model; of two when quick."""
    first, second = (write_lora(folder / f"lora{seed}.safetensors", model, seed) for seed in (1, 2))
    merged, out = folder / "merged.safetensors", folder / "out.safetensors"
    copied = timed(lambda: shutil.copyfile(model, out), runs=1)
    out.unlink()
    into = ("--sd_model", model, "--models", first, "--ratios", 1, "--save_to")
    both = ("--models", first, second, "--ratios", 0.7, 0.5, "--save_to", out)
    costs = {"merge into the model": cost_of("merge_lora", *into, merged)}
    if not is_quick:
        costs |= {
            "merge into the model, fp16": cost_of("merge_lora", *into, out, "--save_precision", "fp16"),
            "merge two LoRA files, --concat": cost_of("merge_lora", *both, "--concat"),
            "merge two LoRA files": cost_of("merge_lora", *both),
            "merge two LoRA files by SVD": cost_of("svd_merge_lora", *both, "--new_rank", RANK),
            "resize a LoRA file": cost_of("resize_lora", "--model", first, "--new_rank", RANK // 2, "--save_to", out),
        }
    models = ("--model_org", model, "--model_tuned", merged)
    costs["extract"] = cost_of("extract_lora_from_models", *models, "--dim", dim, "--save_to", out)
    return [Figure("copy the model", "s", copied), *as_figures(costs)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--dim", type=int, default=4, help="rank that is extracted (default 4)")
    arguments = parser.parse_args(argv)
    load_before = load()
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "model.safetensors"
        model = write_embedded(path, precision="float") if arguments.quick else write_model(path)
        figures = measure(model, Path(made), arguments.dim, is_quick=arguments.quick)
    conclude(arguments, figures, load_before)


if __name__ == "__main__":
    main()
