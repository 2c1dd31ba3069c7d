"""How long a user waits: for --help, for the answer to a wrong option, and from the command to the end of step 1.

The example data set is trained for one step with the embedded model, masks and --cache_latents, as the quick start does
without its previews. The phases are read from the time stamps of the log. Imports are timed in processes of their own.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measuring import ROOT, Figure, conclude, load, make_parser, timed

MAX_ANSWER_S = 0.5
DATASET = Path("examples") / "masked_lora" / "dataset_both.toml"
# Where a phase ends: the first line of the log that holds the words.
PHASES = {
    "imports, options, data set": "INFO seed ",
    "load the model": "INFO loaded ",
    "encode the images": "INFO latents:",
    "network and optimizer": "INFO training:",
    "step 1 and its file": "INFO saved ",
}
IMPORTS = {
    "import torch": "import torch",
    "import torch and accelerate": "import accelerate",
    "import library.training.run": "import library.training.run",
    "import all that step 1 needs": (
        "import library.training.run, library.models.sd; from transformers import CLIPTextModel; "
        "from diffusers import AutoencoderKL, UNet2DConditionModel"
    ),
}
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (.*)$", re.MULTILINE)


def answer(*options: str, code: int) -> None:
    """Run train_network.py with options that it answers at once, with this exit code."""
    found = subprocess.run([sys.executable, "train_network.py", *options], cwd=ROOT, capture_output=True, check=False)
    assert found.returncode == code, found.stderr.decode()


def import_alone(statement: str) -> None:
    """Import in a new process."""
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, check=True)


def make_model(folder: Path) -> Path:
    """Make the embedded model in folder, and return its path."""
    path = folder / "tiny-sd.safetensors"
    command = [sys.executable, "examples/embedded_model/make.py", str(path), "--seed", "0"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return path


def train_one_step(model: Path, dataset: Path, output: Path) -> dict[str, float]:
    """Return the seconds of each phase of a run of one step, and of the whole."""
    options = {
        "pretrained_model_name_or_path": model,
        "dataset_config": dataset,
        "network_module": "networks.lora",
        "network_dim": 16,
        "max_train_steps": 1,
        "max_data_loader_n_workers": 0,
        "seed": 1,
        "output_dir": output,
        "output_name": "start-up",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "train_network.py", *words, "--masked_loss", "--cache_latents", "--sdpa"]
    start = time.time()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    end = time.time()
    assert found.returncode == 0, found.stderr
    lines = [(moment(stamp), words) for stamp, words in STAMP.findall(found.stderr)]
    seconds = {}
    previous = start
    for phase, words in PHASES.items():
        at = next((at for at, line in lines if line.startswith(words)), None)
        assert at is not None, f"the log has no line '{words}':\n{found.stderr}"
        seconds[phase] = at - previous
        previous = at
    return {"start to step 1 and its file": previous - start, **seconds, "exit": end - previous}


def moment(stamp: str) -> float:
    """Return the seconds since 1970 of a log line's time stamp."""
    return datetime.datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp()


def measure_answers(runs: int, warm_up: int) -> list[Figure]:
    """Return how long --help and the answer to a wrong option take."""
    help_s = timed(lambda: answer("--help", code=0), runs=runs, warm_up=warm_up)
    wrong_s = timed(lambda: answer("--max_train_stepss=3", code=2), runs=runs, warm_up=warm_up)
    return [
        Figure("--help", "s", help_s, warm_up, at_most=MAX_ANSWER_S),
        Figure("a wrong option", "s", wrong_s, warm_up, at_most=MAX_ANSWER_S),
    ]


def measure_training(model: Path | None, dataset: Path, runs: int, warm_up: int) -> list[Figure]:
    """Return the phases of runs of one step; a model of None is made first."""
    with tempfile.TemporaryDirectory() as folder:
        model = model or make_model(Path(folder))
        measured = [train_one_step(model, dataset, Path(folder) / "output") for _ in range(warm_up + runs)][warm_up:]
    return [Figure(phase, "s", tuple(each[phase] for each in measured), warm_up) for phase in measured[0]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs that count (default 5)")
    parser.add_argument("--model", type=Path, help="a checkpoint of SD 1.x; default: the embedded one, newly made")
    parser.add_argument("--dataset_config", type=Path, default=DATASET, help="default: the example's")
    arguments = parser.parse_args(argv)
    runs, warm_up = (1, 0) if arguments.quick else (arguments.runs, 1)
    os.environ["PYTHONPATH"] = str(ROOT)
    load_before = load()
    figures = measure_answers(1 if arguments.quick else 4 * runs, warm_up)
    if not arguments.quick:
        for name, statement in IMPORTS.items():
            figures.append(Figure(name, "s", timed(lambda s=statement: import_alone(s), runs=runs, warm_up=1), 1))
    figures += measure_training(arguments.model, arguments.dataset_config, runs, warm_up)
    conclude(arguments, figures, load_before)


if __name__ == "__main__":
    main()
