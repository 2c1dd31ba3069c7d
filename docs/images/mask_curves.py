"""Draw mask-curves.png: the loss inside and outside of the masks, of two short runs of a tiny model (some minutes).

    python docs/images/mask_curves.py

The model is the one of the tests, with random weights. Left with masks alone, right with mask_prior_weight as well.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import drawing  # noqa: E402 - found through the line above
import tiny_models  # noqa: E402
from drawing import Axis, Line  # noqa: E402

from library.cli import main  # noqa: E402

STEPS = 150
RUNS = {"masks alone": (), "with mask_prior_weight = 1": ("--mask_prior_weight", "1")}
TAGS = {"inside": ("loss/inside_average", (30, 140, 80)), "outside": ("loss/outside_average", (200, 50, 60))}
CONFIG = """
[[datasets]]
resolution = 128
batch_size = 4
enable_bucket = true
min_bucket_reso = 64

[[datasets.subsets]]
image_dir = "examples/data/photos"
conditioning_data_dir = "examples/data/photos_mask"
caption_extension = ".txt"
num_repeats = 4
"""


def measured(folder: Path, *more: str) -> dict[str, list[float]]:
    """Train in a folder; return the two curves, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder / "dataset.toml").write_text(CONFIG, encoding="utf-8")
    argv = ["--pretrained_model_name_or_path", str(tiny_models.tiny_sd15()), "--network_module", "networks.lora"]
    argv += ["--network_dim", "32", "--network_alpha", "32", "--network_train_unet_only", "--learning_rate", "2e-3"]
    argv += ["--dataset_config", str(folder / "dataset.toml"), "--output_dir", str(folder), "--seed", "7"]
    argv += ["--max_train_steps", str(STEPS), "--cache_latents", "--max_data_loader_n_workers", "0"]
    argv += ["--logging_dir", str(folder / "logs"), *more]
    if main("train_network", "library.models.sd:Sd", argv):
        sys.exit(1)
    (events,) = (folder / "logs").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    return {name: [event.value for event in found.Scalars(tag)] for name, (tag, _) in TAGS.items()}


def draw(curves: dict[str, dict[str, list[float]]]) -> None:
    """Write mask-curves.png of the curves of each run."""
    charts = []
    for title, found in curves.items():
        lines = [
            Line(list(enumerate(values, start=1)), TAGS[name][1], name, (len(values) * 0.78, 0.98 - 0.09 * row))
            for row, (name, values) in enumerate(found.items())
        ]
        steps = {str(step): float(step) for step in range(0, STEPS + 1, 50)}
        losses = {f"{loss / 5:g}": loss / 5 for loss in range(7)}
        charts.append(drawing.chart(title, Axis("step", steps), Axis("loss, mean over an epoch", losses), lines))
    drawing.save(drawing.beside(*charts), "mask-curves.png", 64)


if __name__ == "__main__":
    os.chdir(ROOT)  # paths in the data set config are relative to it
    with tempfile.TemporaryDirectory() as place:
        made = {}
        for number, (name, options) in enumerate(RUNS.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            made[name] = measured(folder, *options)
    draw(made)
