"""Training at true size: random weights in the shapes of the real checkpoint, at 64 pixels on the CPU.

Stable Diffusion 1.5 in float32, or a float16 file trained in bfloat16: SDXL with --family sdxl, and with --family sd35m
SD3.5 medium, T5-XXL and all else in one file. They train a LoRA; --family sd15_full, sd15_full_fused and sd15_full_bf16
train all of Stable Diffusion 1.5's U-Net and text encoder.

The documented command runs twice in processes of their own: for one step, which gives the time from the command to the
first step; then for more, which gives the time of a step. Peak memory is the process's resident set, the pages of the
mapped checkpoint counted. The saved file's keys are compared with those that sd-scripts saves; a saved model must have
those of the model that it began as.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from measuring import ROOT, Figure, conclude, load, make_parser

NUM_IMAGES = 6  # of the data set, and so steps in an epoch
BYTES = {"F32": 4, "F16": 2}  # of a number, by its name in a file
TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
RANDOM_NUMBERS = 2**24  # that are drawn; a larger tensor has them again and again
PIECE_BYTES = 2**30
MODELS, NETWORKS = ROOT / "tests" / "data" / "models", ROOT / "tests" / "data" / "networks"
DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 1
[[datasets.subsets]]
image_dir = "examples/data/photos"
conditioning_data_dir = "examples/data/photos_mask"
"""

# Loading maps the file; only what looks into each page of memory has read it.
LOAD = """
import sys, time
from dataclasses import fields
import torch
from transformers import CLIPTextModel, T5EncoderModel
from diffusers import AutoencoderKL, UNet2DConditionModel
from importlib import import_module
kind = getattr(import_module(sys.argv[2]), sys.argv[3])
family = kind(sys.argv[1]) if next(iter(fields(kind))).name == "checkpoint" else kind()
start = time.perf_counter()
parts = family.load(sys.argv[1], None, getattr(torch, sys.argv[4]))
for model in (parts.denoiser, parts.vae, *parts.text_encoders):
    for weight in model.parameters():
        weight.detach().flatten()[::1024].sum()
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class Family:
    """A model at its true size, how it is trained, and what that may take. A new one is a new row of FAMILIES."""

    script: str
    place: tuple[str, str]  # module and class of the family
    keys: str  # in the names of the tables of the tests
    variant: str | None  # of the keys of a network: what is adapted; None: the models themselves are trained
    file_format: str  # of the numbers in the checkpoint
    loaded_format: str  # torch's name for that in memory
    module: str = "networks.lora"
    words: tuple[str, ...] = ()  # beside those of every family
    max_first_step_s: float | None = None
    max_step_s: float | None = None
    max_peak_gb: float | None = None
    max_loading: float | None = None  # times reading the file

    @property
    def saved_keys(self) -> frozenset[str]:
        """The names of the tensors that sd-scripts saves."""
        if self.variant is None:
            return frozenset(read(MODELS / f"base_keys_{self.keys}.json.gz")["required"])
        return frozenset(read(NETWORKS / f"lora_keys_{self.keys}.json.gz")["variants"][self.variant])

    @property
    def method_words(self) -> tuple[str, ...]:
        """What a command says of how it trains."""
        if self.variant is None:
            return (*self.words, "--learning_rate=1e-6", "--gradient_checkpointing")
        network = (f"--network_module={self.module}", "--network_dim=16", "--network_alpha=8")
        return (*self.words, *network, "--learning_rate=1e-4")


SD15_FULL = Family(
    "train_db.py",
    ("library.models.sd", "Sd"),
    "sd15",
    None,
    "F32",
    "float32",
    words=("--optimizer_type=AdamW8bit",),
    max_peak_gb=12,
)
ADAFACTOR = ("scale_parameter=False", "relative_step=False", "warmup_init=False")
FAMILIES = {
    "sd15": Family(
        "train_network.py",
        ("library.models.sd", "Sd"),
        "sd15",
        "default",
        "F32",
        "float32",
        max_first_step_s=12,
        max_step_s=1.28,  # sd-scripts on a machine of this kind
        max_peak_gb=5.2,
        max_loading=1.3,
    ),
    "sdxl": Family(
        "sdxl_train_network.py",
        ("library.models.sdxl", "Sdxl"),
        "sdxl",
        "default",
        "F16",
        "bfloat16",
        words=("--mixed_precision=bf16",),
        max_peak_gb=24 * 1.024**3,  # the memory of a small machine
    ),
    "sd35m": Family(
        "sd3_train_network.py",
        ("library.models.sd3", "Sd3"),
        "sd35m",
        "unet_only",
        "F16",
        "bfloat16",
        module="networks.lora_sd3",
        words=("--mixed_precision=bf16", "--cache_text_encoder_outputs", "--network_train_unet_only"),
        max_peak_gb=24 * 1.024**3,
    ),
    "sd15_full": SD15_FULL,
    "sd15_full_fused": replace(
        SD15_FULL,
        words=("--optimizer_type=Adafactor", "--optimizer_args", *ADAFACTOR, "--fused_backward_pass"),
        max_peak_gb=7.5,
    ),
    "sd15_full_bf16": replace(
        SD15_FULL,
        words=("--optimizer_type=AdamW8bit", "--full_bf16", "--mixed_precision=bf16"),
        max_peak_gb=8,
    ),
}


@dataclass(frozen=True)
class Measured:
    """A run."""

    first_step_s: float  # from the command
    step_s: tuple[float, ...]  # the mean of each epoch after the first; of a run of one epoch, each between two others
    peak_gb: float
    keys: frozenset[str]  # of the saved file


def read(path: Path) -> Any:
    """Return a compressed table of the tests."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def shapes_of(family: Family) -> dict[str, Sequence[int]]:
    """Return the shapes of a whole checkpoint, with the text encoders that the tables keep apart from it."""
    table = read(MODELS / f"base_keys_{family.keys}.json.gz")
    apart = {name: table["text_encoder_files"][name] for name in TEXT_ENCODERS if "text_encoder_files" in table}
    texts = {
        f"text_encoders.{encoder}.transformer.{name}": shape
        for encoder, shapes in apart.items()
        for name, shape in shapes.items()
    }
    return table["required"] | texts


def make_model(path: Path, shapes: Mapping[str, Sequence[int]], file_format: str) -> None:
    """Write a checkpoint of random weights, a tensor at a time, unless it is there."""
    import numpy as np

    if path.is_file():
        return
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[file_format] * int(np.prod(shape))
        header[name] = {"dtype": file_format, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    numbers = 0.02 * generator.standard_normal(RANDOM_NUMBERS, dtype=np.float32)
    numbers = numbers.astype(f"<f{BYTES[file_format]}")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            count, begin = int(np.prod(shape)), int(generator.integers(RANDOM_NUMBERS // 2))
            while count:
                values = numbers[begin : begin + count]
                file.write(values + 1 if len(shape) == 1 and name.endswith("weight") else values)  # a norm's is about 1
                count, begin = count - len(values), 0


def train(family: Family, model: Path, dataset: Path, output: Path, num_steps: int) -> Measured:
    """Return what a run of the documented command measured."""
    options = {
        "pretrained_model_name_or_path": model,
        "dataset_config": dataset,
        "max_train_steps": num_steps,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        "save_model_as": "safetensors",
        "logging_dir": output / "log",
        "output_dir": output,
        "output_name": "true-size",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, family.script, *words, *family.method_words, "--masked_loss", "--cache_latents"]
    start = time.time()
    with (output / "output.txt").open("w", encoding="utf-8") as text:
        process = subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (output / "output.txt").read_text(encoding="utf-8")
    times = list(step_times(output / "log"))
    saved = saved_keys(output / "true-size.safetensors")
    return Measured(times[0] - start, tuple(seconds_between(times)), usage.ru_maxrss * 1024 / 1e9, saved)


def seconds_between(times: Sequence[float]) -> Iterator[float]:
    """Yield the seconds of a step: the mean of each epoch after the first; of one epoch, those that tell.

    The loss of a step is logged while the next one runs; that of the last one of an epoch at once.
    """
    ends, count = (times[NUM_IMAGES - 1 :: NUM_IMAGES], NUM_IMAGES) if len(times) > NUM_IMAGES else (times[:-1], 1)
    for before, after in pairwise(ends):
        yield (after - before) / count


def step_times(folder: Path) -> Iterator[float]:
    """Yield when the loss of each step was logged, in seconds since 1970."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = next(path.parent for path in sorted(folder.rglob("events.out.tfevents.*")))
    events = EventAccumulator(str(run))
    events.Reload()
    for event in events.Scalars("loss/current"):
        yield event.wall_time


def saved_keys(path: Path) -> frozenset[str]:
    """Return the names of the tensors of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return frozenset(file.keys())


def load_alone(family: Family, model: Path) -> tuple[float, float]:
    """Return the seconds that loading all models takes in a new process, after its imports, and its peak in GB."""
    command = [sys.executable, "-c", LOAD, str(model), *family.place, family.loaded_format]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as told:
        seconds = float(told.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return seconds, usage.ru_maxrss * 1024 / 1e9


def read_whole(path: Path) -> float:
    """Return the seconds that reading a file into memory takes, of which a piece is kept at a time."""
    start = time.perf_counter()
    with path.open("rb") as file:
        while file.read(PIECE_BYTES):
            pass
    return time.perf_counter() - start


def measure_loading(family: Family, model: Path, runs: int) -> list[Figure]:
    """Return how long loading takes beside reading the file, both from a warm page cache, and its peak."""
    reading = tuple(read_whole(model) for _ in range(runs + 1))[1:]
    loading = [load_alone(family, model) for _ in range(runs)]
    times = family.max_loading
    max_s, max_gb = (times and times * each for each in (median(reading), model.stat().st_size / 1e9))
    return [
        Figure("reading the file into memory", "s", reading, num_warm_up=1),
        Figure("loading, each page looked at", "s", tuple(s for s, _ in loading), at_most=max_s),
        Figure("peak memory of loading", "GB", tuple(peak for _, peak in loading), at_most=max_gb),
    ]


def measure(family: Family, model: Path, folder: Path, num_steps: int, runs: int) -> list[Figure]:
    """Return the figures of so many pairs of runs, the longer of so many steps; 0: there is none."""
    dataset = folder / "dataset.toml"
    dataset.write_text(DATASET, encoding="utf-8")
    firsts, peaks, steps = [], [], []
    for number in range(runs):
        for name, count in (("first", 1), ("more", num_steps))[: 1 + (num_steps > 0)]:
            output = folder / f"{name}{number}"
            output.mkdir()
            found = train(family, model, dataset, output, count)
            differing = found.keys ^ family.saved_keys
            assert not differing, f"{len(differing)} keys differ from those of sd-scripts"
            (output / "true-size.safetensors").unlink()  # a whole model is large
            peaks.append(found.peak_gb)
            if count == 1:
                firsts.append(found.first_step_s)
            steps += found.step_s
    return [
        Figure("command to the end of step 1", "s", tuple(firsts), at_most=family.max_first_step_s),
        *([Figure("a step", "s", tuple(steps), at_most=family.max_step_s)] if steps else []),
        Figure("peak memory", "GB", tuple(peaks), at_most=family.max_peak_gb),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of the longer run (default 4; 0: there is none)")
    parser.add_argument("--steps", type=int, help="of the longer run, fewer than an epoch: where each takes long")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--family", choices=FAMILIES, default="sd15")
    parser.add_argument("--without_loading", action="store_true", help="only train: all models are never there at once")
    parser.add_argument("--model", type=Path, help="made here unless it exists; default: in a temporary folder")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.runs, arguments.epochs = 1, 0
    num_steps = arguments.steps or arguments.epochs * NUM_IMAGES
    load_before = load()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder) / "model.safetensors"
        family = FAMILIES[arguments.family]
        make_model(model, shapes_of(family), family.file_format)
        figures = [] if arguments.without_loading else measure_loading(family, model, arguments.runs)
        figures += measure(family, model, Path(folder), num_steps, arguments.runs)
    conclude(arguments, figures, load_before)


if __name__ == "__main__":
    main()
