"""What a training step costs outside the model: loading, masks, noise, loss, clipping, logging, bookkeeping.

Whole runs of the example through the project's own loop, with the embedded model at a small size. Inside each step the
time in the model is taken too (text encoder and U-Net forward, backward, the optimizer's own step), and subtracted: a
difference within one step is steady where two runs are not. Then, at 1024x1024, the loader alone and the weighing of
the loss alone, a batch of 4 at a time.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fill_cache import StubEncoder, read_samples
from measuring import ROOT, Figure, conclude, load, make_parser, timed
from pictures import dataset_config, write_pictures
from start_up import make_model

from library import masks
from library.dataset import latents, plan
from library.dataset.config import DatasetConfig
from library.dataset.latents import LatentSettings
from library.dataset.loader import DrawnImages, LoaderSettings, make_loader
from library.models.family import ModelFamily
from library.models.sd import Sd
from library.options import Options, read_training
from library.training import assembly, loading, loop
from library.training import data as training_data
from library.training import run as training_run
from library.training.method import Method, NetworkMethod
from library.training.trackers import Trackers

BATCH_SIZE = 4
WARM_UP = 3
CONFIG = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 128
batch_size = 2
[[datasets.subsets]]
image_dir = '{photos}'
{mask}
"""


class StepClock:
    """Adds up, for each step, the milliseconds in each part of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._start: float | None = None
        self._spent: dict[str, float] = {}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return work as it is, with its time added to a part."""

        def measured(*arguments: Any, **options: Any) -> Any:
            self.start(part)
            try:
                return work(*arguments, **options)
            finally:
                self.stop(part)

        return measured

    def start(self, part: str) -> None:
        """Begin to count for a part."""
        self._spent[part] = self._spent.get(part, 0.0) - 1000 * time.perf_counter()

    def stop(self, part: str) -> None:
        """Stop counting for a part."""
        self._spent[part] += 1000 * time.perf_counter()

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; a step lasts from asking for one to asking for the next."""
        fetch = self.timed("loader", iter(batches).__next__)
        while True:
            self.end_step()
            self._start = time.perf_counter()
            yield fetch()

    def end_step(self) -> None:
        """Close the step that is under way."""
        if self._start is not None:
            self.steps.append({"whole": 1000 * (time.perf_counter() - self._start), **self._spent})
        self._start, self._spent = None, {}


class TimedFamily:
    """A family whose models' forward passes are timed."""

    def __init__(self, family: Any, clock: StepClock) -> None:
        self._family = family
        self.encode_text = clock.timed("model", family.encode_text)
        self.predict = clock.timed("model", family.predict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


def make_run(model: Path, folder: Path, *, is_masked: bool, to_disk: bool, steps: int) -> loop.Run:
    """Return a run of the example."""
    data = (ROOT / "examples" / "data").as_posix()
    mask = f"conditioning_data_dir = '{data}/photos_mask'" if is_masked else ""
    dataset = folder / "dataset.toml"
    dataset.write_text(CONFIG.format(photos=f"{data}/photos", mask=mask), encoding="utf-8")
    words = [
        "--network_module=networks.lora",
        "--network_dim=16",
        "--seed=1",
        "--sdpa",
        "--max_data_loader_n_workers=0",
    ]
    words += [f"--pretrained_model_name_or_path={model}", f"--dataset_config={dataset}", f"--max_train_steps={steps}"]
    words += ["--cache_latents", f"--output_dir={folder}", "--output_name=step", f"--cache_dir={folder / 'cache'}"]
    words += ["--cache_latents_to_disk"] * to_disk + ["--masked_loss"] * is_masked
    options = read_training(words, "train_network").options
    return build(options, Sd.from_options(options))


def build(options: Options, family: ModelFamily, method: type[Method] = NetworkMethod) -> loop.Run:
    """Return the run that the options describe, as an entry script makes it."""
    checked = training_run.check(options, family, method)
    accelerator = training_run.make_accelerator(options, checked, family)
    epochs = training_data.make_plan(checked.data, options, 1, 1)
    told = Trackers(accelerator, checked.tracker_names)
    steps = options.training.max_train_steps
    setting = assembly.Setting(options, family, checked, accelerator, epochs, steps, time.time(), told, uploads=None)
    return assembly.assemble(setting, loading.load(setting), None)


def measure_run(run: loop.Run) -> list[dict[str, float]]:
    """Train, and return the milliseconds of each step that counts, by part."""
    clock = StepClock()
    run.step.family = TimedFamily(run.step.family, clock)  # type: ignore[assignment]
    run.accelerator.backward = clock.timed("model", run.accelerator.backward)  # type: ignore[method-assign]
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: clock.start("model"))
    run.optimizer.optimizer.register_step_post_hook(lambda *_: clock.stop("model"))
    run.accelerator.clip_grad_norm_ = clock.timed("clipping", run.accelerator.clip_grad_norm_)  # type: ignore[method-assign]
    run.batches = clock.batches(run.batches)
    loop.train(run)
    return clock.steps[WARM_UP:]


def step_figures(model: Path, steps: int, cases: Sequence[tuple[str, bool]]) -> list[Figure]:
    """Return the figures of one run for each case of (where latents are, whether masks are on)."""
    figures = []
    for place, is_masked in cases:
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(model, Path(folder), is_masked=is_masked, to_disk=place == "disk", steps=WARM_UP + 1 + steps)
            measured = measure_run(run)
        label = f"{place}, masks {'on' if is_masked else 'off'}"
        parts = {
            "whole step": [each["whole"] for each in measured],
            "in the model": [each["model"] for each in measured],
            "outside the model": [each["whole"] - each["model"] for each in measured],
            "of that the loader": [each["loader"] for each in measured],
            "of that clipping": [each["clipping"] for each in measured],
        }
        figures += [Figure(f"{label}: {part}", "ms", tuple(values), WARM_UP) for part, values in parts.items()]
    return figures


def loader_figures(folder: Path, side: int, batches: int) -> list[Figure]:
    """Return the time of the loader for a batch of 4 at full size, and of weighing its loss."""
    pictures = write_pictures(folder / "rgba", 2 * BATCH_SIZE, side, "rgba")
    figures = []
    shown = None
    for is_masked in (True, False):
        dataset = dataset_config(pictures, side, is_masked=is_masked, kind="rgba", batch_size=BATCH_SIZE)
        samples = read_samples(dataset)
        config = DatasetConfig((side, side), (samples[0].subset,), batch_size=BATCH_SIZE)
        for place in ("memory", "disk"):
            settings = LatentSettings(
                "sd",
                "stub",
                torch.float16,
                torch.device("cpu"),
                to_disk=place == "disk",
                cache_dir=folder / f"cache_{is_masked}",
            )
            store = latents.build_store(samples, settings, StubEncoder())
            images = DrawnImages(samples, LoaderSettings(1, 1000), tokenize=Sd().tokenize, store=store)
            order = plan.make_plan([config], samples, seed=1).batches()
            loaded = iter(make_loader(images, order, num_workers=0, pin_memory=False))
            seconds = timed(lambda loaded=loaded: next(loaded), runs=batches, warm_up=WARM_UP)
            label = f"loader, batch of {BATCH_SIZE} at {side}, {place}, masks {'on' if is_masked else 'off'}"
            figures.append(Figure(label, "ms", tuple(1000 * each for each in seconds), WARM_UP))
            shown = shown or next(loaded)
    assert shown is not None
    loss = torch.rand(shown.latents.shape)
    seconds = timed(lambda: masks.weigh(loss, shown.masks), runs=batches, warm_up=WARM_UP)
    label = f"weigh the loss, batch of {BATCH_SIZE} at {side}"
    return [*figures, Figure(label, "ms", tuple(1000 * each for each in seconds), WARM_UP)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="steps that count, of each run (default 30)")
    parser.add_argument("--model", type=Path, help="a checkpoint of SD 1.x; default: the embedded one, newly made")
    parser.add_argument("--side", type=int, default=1024, help="pictures' sides for the loader alone (default 1024)")
    arguments = parser.parse_args(argv)
    cases = [(place, is_masked) for place in ("memory", "disk") for is_masked in (False, True)]
    if arguments.quick:
        arguments.steps, arguments.side, cases = 1, 128, cases[-1:]
    logging.getLogger("library").setLevel(logging.WARNING)
    load_before = load()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(Path(folder))
        figures = step_figures(model, arguments.steps, cases)
        figures += loader_figures(Path(folder), arguments.side, 10 * arguments.steps)
    conclude(arguments, figures, load_before)
    costs = [statistics.median(figure.values) for figure in figures if figure.name.endswith("outside the model")]
    print(f"outside the model: {', '.join(f'{cost:.1f}' for cost in costs)} ms a step")


if __name__ == "__main__":
    main()
