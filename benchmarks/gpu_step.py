"""Training steps of the true-size models on a GPU: images a second and memory, and what masks cost.

Weights are random and made on the device, in the shapes of the real checkpoints; nothing is downloaded, and no model
file is read. Each case is a run through the project's own loading, cache, network and loop: LoRA of rank 16 on the
U-Net, bf16, latents in memory; with --models sd15_full the U-Net and the text encoder themselves, float32, 8-bit Adam
and fp16 autocast. Steps with and without masks take turns within a run, each from a loader of its own, so that a
difference of a percent shows. Time is taken on the device, from one request for a batch to the next. Memory is the peak
of what torch had given out since the models, the network and the optimizer were in place.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from measuring import ROOT, Figure, conclude, load, make_parser
from start_up import make_model
from step_overhead import build
from torch import Tensor

from library.models.checkpoint import SafetensorsFile
from library.models.family import ModelFamily
from library.options import read_training
from library.training import loop
from library.training.full_model import FullModel, FullTrainee
from library.training.method import Method, NetworkMethod

MAX_COST_OF_MASKS = 1.0  # percent
WARM_UP = 4  # steps; the first of them compiles
BASE = "random.safetensors"  # a name for messages: there is no such file
CONFIG = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = {side}
batch_size = {batch_size}
[[datasets.subsets]]
image_dir = '{photos}'
num_repeats = 2
{mask}
"""


@dataclass(frozen=True)
class Model:
    """A family at its true size. A new one is a new row of MODELS."""

    script: str
    place: str  # of the family's class
    keys: str  # its shapes, in tests/data/models
    side: int  # pixels
    words: tuple[str, ...] = ("--network_train_unet_only",)
    method: type[Method] = NetworkMethod
    autocast: str = "bf16"  # on a GPU
    max_checkpointed_gb: float | None = None  # with batches of 1
    is_default: bool = True


MODELS = {
    "sd15": Model("train_network", "library.models.sd:Sd", "base_keys_sd15.json.gz", 512),
    "sdxl": Model(
        "sdxl_train_network",
        "library.models.sdxl:Sdxl",
        "base_keys_sdxl.json.gz",
        1024,
        ("--network_train_unet_only", "--cache_text_encoder_outputs"),
    ),
    "sd15_full": Model(
        "train_db",
        "library.models.sd:Sd",
        "base_keys_sd15.json.gz",
        512,
        ("--optimizer_type=AdamW8bit", "--save_precision=fp16"),
        FullModel,
        autocast="fp16",
        max_checkpointed_gb=12,  # the card that the guide names
        is_default=False,
    ),
}
DEFAULTS = [name for name, model in MODELS.items() if model.is_default]
NETWORK = ("--network_module=networks.lora", "--network_dim=16", "--network_alpha=16", "--learning_rate=1e-4")


@dataclass(frozen=True)
class Case:
    """What one run is to show."""

    model: str
    batch_size: int
    is_checkpointed: bool
    is_compiled: bool

    @property
    def label(self) -> str:
        """The beginning of its figures' names."""
        words = [self.model, f"batch {self.batch_size}"]
        words += ["checkpointing"] * self.is_checkpointed + ["compiled"] * self.is_compiled
        return ", ".join(words)


class RandomTensors:
    """A checkpoint of these shapes whose tensors are drawn on the device when they are read."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        self.path = Path(BASE)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._device = device
        self._draws = torch.Generator(device).manual_seed(0)

    def read(self, name: str) -> Tensor:
        """Return small numbers; around 1 for the weights of norms."""
        return self._drawn(name, self.shapes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return as many rows of such numbers."""
        return self._drawn(name, (stop - start, *self.shapes[name][1:]))

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, device=self._device, generator=self._draws) * 0.02
        return values + 1 if len(shape) == 1 and name.endswith("weight") else values


class RandomFamily:
    """A family that loads random weights, through its own code."""

    def __init__(self, family: Any, source: RandomTensors) -> None:
        self._family, self._source = family, source

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._family, name)
        if name.endswith("_identity"):  # nothing is kept beyond the run
            return lambda *_: "random"
        return self._with_random_files(found) if name.startswith("load") else found

    # named here, as that is how a family is known whose whole models can be saved

    @property
    def folder_kind(self) -> Any:
        """The family's."""
        return self._family.folder_kind

    def kept(self, *arguments: Any) -> Any:
        """Return what is kept of the random file."""
        return self._with_random_files(self._family.kept)(*arguments)

    def whole_pieces(self, *arguments: Any) -> Any:
        """Return the family's."""
        return self._family.whole_pieces(*arguments)

    def save_whole(self, *arguments: Any, **options: Any) -> None:
        """Save as the family does."""
        self._family.save_whole(*arguments, **options)

    def _with_random_files(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return load, for which every model file is the random one: its models are on the device already."""

        def loaded(*arguments: Any, **options: Any) -> Any:
            modules = [module for name, module in sys.modules.items() if name.startswith("library.models.")]
            readers: list[Any] = [module for module in modules if hasattr(module, "open_tensors")]
            originals = [module.open_tensors for module in readers]
            for module in readers:
                module.open_tensors = lambda *_, **__: self._source
            try:
                return load(*arguments, **options)
            finally:
                for module, original in zip(readers, originals, strict=True):
                    module.open_tensors = original

        return loaded


class Clock:
    """Takes the time on the device, or on the CPU where there is no other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Remember when the device gets here."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the time from each mark to the next one; waits for the device."""
        if self._device.type != "cuda":
            return [after - before for before, after in itertools.pairwise(self._marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self._marks)]


def shapes_of(model: Model, checkpoint: Path | None) -> Mapping[str, Sequence[int]]:
    """Return the shapes of a real checkpoint of the family, or of the one given."""
    if checkpoint is not None:
        return SafetensorsFile(checkpoint).shapes
    with gzip.open(ROOT / "tests" / "data" / "models" / model.keys, "rt", encoding="utf-8") as file:
        found: Mapping[str, Sequence[int]] = json.load(file)["required"]
    return found


def words_of(case: Case, model: Model, folder: Path, steps: int, *, is_masked: bool) -> list[str]:
    """Return the command line of a run over the example photos; its dataset config is written to the folder."""
    data = (ROOT / "examples" / "data").as_posix()
    mask = f"conditioning_data_dir = '{data}/photos_mask'" if is_masked else ""
    dataset = folder / f"dataset_{is_masked}.toml"
    text = CONFIG.format(photos=f"{data}/photos", mask=mask, side=model.side, batch_size=case.batch_size)
    dataset.write_text(text, encoding="utf-8")
    words = list(NETWORK) if model.method is NetworkMethod else ["--learning_rate=1e-6", "--save_model_as=safetensors"]
    words += [f"--pretrained_model_name_or_path={BASE}", f"--dataset_config={dataset}", f"--max_train_steps={steps}"]
    autocast = model.autocast if torch.cuda.is_available() else "bf16"  # fp16 is for GPUs
    words += ["--cache_latents", f"--mixed_precision={autocast}", "--max_data_loader_n_workers=0", "--seed=1"]
    words += [*model.words, f"--output_dir={folder}", "--output_name=step"]
    words += ["--masked_loss"] * is_masked + ["--gradient_checkpointing"] * case.is_checkpointed
    return words + ["--torch_compile"] * case.is_compiled


def make_run(words: Sequence[str], model: Model, shapes: Mapping[str, Sequence[int]], device: torch.device) -> loop.Run:
    """Return the run of that command line, with random weights."""
    options = read_training(words, model.script).options
    module, _, name = model.place.partition(":")
    real: Any = getattr(importlib.import_module(module), name).from_options(options)
    run = build(options, cast("ModelFamily", RandomFamily(real, RandomTensors(shapes, device))), model.method)
    if isinstance(run.trainee, FullTrainee) and run.trainee.output is not None:
        run.trainee.output.vae.cpu()  # where a file's would be
    return run


def in_turn(masked: Iterable[Any], plain: Iterable[Any], clock: Clock) -> Iterator[Any]:
    """Yield batches with and without masks in turn, each asked for after a mark."""
    for batches in itertools.cycle((iter(masked), iter(plain))):
        clock.mark()
        yield next(batches)


def num_graphs() -> int:
    """Return how many graphs have been compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@dataclass(frozen=True)
class Measured:
    """A run, its warm-up left out."""

    masked_s: tuple[float, ...]  # each step
    plain_s: tuple[float, ...]
    warm_up_s: float
    peak_gb: float | None  # None on the CPU
    num_late_graphs: int  # compiled after the warm-up


def measure(case: Case, model: Model, shapes: Mapping[str, Sequence[int]], pairs: int, more: Sequence[str]) -> Measured:
    """Return what a run of so many pairs of steps measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = WARM_UP + 2 * pairs
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for is_masked in (False, True):
            words = [*words_of(case, model, Path(folder), steps + 1, is_masked=is_masked), *more]
            runs = [make_run(words, model, shapes, device), *runs]
            if not is_masked:  # its models make room for the next ones; its loader stays
                plain = runs.pop().batches
                free()
        (run,) = runs
        clock, graphs = Clock(device), []
        run.batches = counted(in_turn(run.batches, plain, clock), graphs)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loop.train(run)
        seconds = clock.seconds()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    counted_s = seconds[WARM_UP:steps]
    return Measured(
        tuple(counted_s[::2]), tuple(counted_s[1::2]), sum(seconds[:WARM_UP]), peak, graphs[steps] - graphs[WARM_UP]
    )


def counted(batches: Iterator[Any], graphs: list[int]) -> Iterator[Any]:
    """Yield the batches; before each, note how many graphs there are."""
    while True:
        graphs.append(num_graphs())
        yield next(batches)


def free() -> None:
    """Give up what the last run has held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def figures_of(case: Case, found: Measured) -> list[Figure]:
    """Return the figures of a run."""
    rates = [case.batch_size / second for second in found.masked_s]
    plain_rates = [case.batch_size / second for second in found.plain_s]
    cost = 100 * (statistics.median(found.masked_s) / statistics.median(found.plain_s) - 1)
    figures = [
        Figure(f"{case.label}: with masks", "images/s", tuple(rates), WARM_UP),
        Figure(f"{case.label}: without", "images/s", tuple(plain_rates), WARM_UP),
        Figure(f"{case.label}: cost of masks", "%", (cost,), WARM_UP, at_most=MAX_COST_OF_MASKS),
    ]
    if found.peak_gb is not None:
        is_bound = case.is_checkpointed and case.batch_size == 1
        at_most = MODELS[case.model].max_checkpointed_gb if is_bound else None
        figures.append(Figure(f"{case.label}: peak memory", "GB", (found.peak_gb,), at_most=at_most))
    if case.is_compiled:
        figures.append(Figure(f"{case.label}: first {WARM_UP} steps", "s", (found.warm_up_s,)))
        figures.append(Figure(f"{case.label}: graphs compiled later", "", (found.num_late_graphs,), at_most=1))
    return figures


def cases_of(models: Sequence[str], batch_sizes: Sequence[int]) -> list[Case]:
    """Return what is measured: first all that need not be compiled."""
    return [
        Case(model, batch_size, is_checkpointed, is_compiled)
        for is_compiled in (False, True)
        for model in models
        for batch_size in batch_sizes
        for is_checkpointed in (False, True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULTS, help=f"default: {' '.join(DEFAULTS)}")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--pairs", type=int, default=10, help="steps with and without masks that count (default 10)")
    parser.add_argument("--side", type=int, help="of the pictures, in pixels; default: the model's own")
    parser.add_argument("--shapes", type=Path, help="a checkpoint whose shapes are taken instead of the true ones")
    parser.add_argument("--patience", type=float, default=540, help="s after which no run is begun (default 540)")
    arguments = parser.parse_args(argv)
    cases, more = cases_of(arguments.models, arguments.batch_sizes), ()
    logging.getLogger("library").setLevel(logging.WARNING)
    load_before, end = load(), time.monotonic() + arguments.patience
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            arguments.side, arguments.pairs, more = 64, 2, ("--dynamo_backend=eager",)
            cases = [Case(arguments.models[0], 1, is_checkpointed=True, is_compiled=True)]
            arguments.shapes = arguments.shapes or make_model(Path(folder))
        figures = list(measured_figures(cases, arguments, more, end))
    conclude(arguments, figures, load_before)


def measured_figures(
    cases: Sequence[Case], arguments: argparse.Namespace, more: Sequence[str], end: float
) -> Iterator[Figure]:
    """Yield the figures of each case; one that does not fit in memory or time is said, and left out."""
    for case in cases:
        if time.monotonic() > end:
            print(f"{case.label}: left out, the time is over", flush=True)
            continue
        model = MODELS[case.model]
        model = replace(model, side=arguments.side or model.side)
        try:
            found = measure(case, model, shapes_of(model, arguments.shapes), arguments.pairs, more)
        except torch.OutOfMemoryError as error:
            print(f"{case.label}: {str(error).partition('.')[0]}", flush=True)
            continue
        finally:
            free()
        for figure in figures_of(case, found):
            print(figure.row(), flush=True)  # what is known stays known if the machine is taken away
            yield figure


if __name__ == "__main__":
    main()
