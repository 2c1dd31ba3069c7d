"""From a fresh clone to a masked LoRA with one command, on Linux, macOS and Windows.

    python3 quickstart.py           make .venv, install requirements.txt, train the example, name what was made
    python3 quickstart.py test      the same set-up, then run the tests (further words go to pytest)

Standard library only. A second call installs nothing, unless requirements.txt has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed-requirements"
MODEL = Path("examples/embedded_model/made/tiny-sd.safetensors")
MODEL_MAKER = Path("examples/embedded_model/make.py")
OUTPUT = Path("output/quickstart")
NAME = "masked-lora"
DATASET = Path("examples/masked_lora/dataset_both.toml")
NUM_STEPS = 60
ALL_TESTS = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")  # of pytest-xdist; a process takes about 1 GB
CRLF, LF = b"\r\n", b"\n"  # git may write either on Windows

VENV_HELP = """Python could not make a virtual environment in .venv.
  Debian, Ubuntu:  sudo apt install python3-venv
  elsewhere:       install Python from python.org, which brings its own venv and pip
Then run this command again."""
INSTALL_HELP = """pip could not install requirements.txt; its own message stands above. Often it is one of these:
  no network, or a proxy: pip reads HTTPS_PROXY and its own configuration
  no PyTorch for this Python or system: docs/getting-started.md lists what is known to work
Then run this command again: what is there already is not fetched twice."""


class StepError(Exception):
    """A step that failed: what to tell the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Print a line of our own at once, so that it stands in order with the output of the programs that are run."""
    print(message, flush=True)


def venv_program(venv: Path, system: str) -> Path:
    """Return the path of the Python inside a virtual environment on a system as platform.system() names it."""
    return venv / "Scripts" / "python.exe" if system == "Windows" else venv / "bin" / "python"


def fingerprint(requirements: bytes, torch_index: str | None) -> str:
    """Return what the stamp in .venv holds after an installation of these requirements; another text: install again."""
    return f"{hashlib.sha256(requirements.replace(CRLF, LF)).hexdigest()} torch {torch_index or 'default'}\n"


def needs_installation(stamp: Path, wanted: str, *, torch_chosen: bool) -> bool:
    """Return whether requirements.txt must be installed; a call without --torch-index keeps the build that is there."""
    if not stamp.is_file():
        return True
    installed = stamp.read_text(encoding="utf-8")
    if not torch_chosen:
        installed, wanted = installed.partition(" torch ")[0], wanted.partition(" torch ")[0]
    return installed != wanted


def run(command: list[str], failure: str) -> None:
    """Run a program in the root of the project, showing its output; StepError with its exit code if it fails."""
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    code = subprocess.run(command, cwd=ROOT, env={**settings, **os.environ}, check=False).returncode
    if code:
        raise StepError(failure, code if code > 0 else 128 - code)


def prepare_environment(torch_index: str | None) -> Path:
    """Return the Python of .venv, with requirements.txt installed; makes and installs only what is missing."""
    python = venv_program(VENV, platform.system())
    if not python.exists():
        say("Making a virtual environment in .venv ...")
        try:
            run([sys.executable, "-m", "venv", str(VENV)], VENV_HELP)
        except StepError:
            shutil.rmtree(VENV, ignore_errors=True)  # without pip it is of no use, and would pass for a whole one
            raise
    requirements = ROOT / "requirements.txt"
    wanted = fingerprint(requirements.read_bytes(), torch_index)
    if not needs_installation(STAMP, wanted, torch_chosen=torch_index is not None):
        say("requirements.txt is installed in .venv already: nothing to install.")
        return python
    say("Installing requirements.txt into .venv: 1.5 GB or more, a few silent minutes ...")
    start = time.monotonic()
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    if torch_index is not None:
        command += ["--extra-index-url", torch_index]
    run(command, INSTALL_HELP)
    STAMP.write_text(wanted, encoding="utf-8")
    say(f"Installed in {time.monotonic() - start:.0f} s.")
    return python


def training_arguments() -> list[str]:
    """Return train_network.py and its options for the example."""
    return [
        "train_network.py",
        f"--pretrained_model_name_or_path={MODEL.as_posix()}",
        f"--dataset_config={DATASET.as_posix()}",
        "--masked_loss",
        "--cache_latents",
        "--network_module=networks.lora",
        "--network_dim=16",
        "--network_alpha=16",
        "--optimizer_type=AdamW",
        "--learning_rate=2e-3",
        f"--max_train_steps={NUM_STEPS}",
        "--max_data_loader_n_workers=0",
        "--seed=1",
        "--sdpa",
        "--sample_at_first",
        f"--sample_every_n_steps={NUM_STEPS}",
        "--sample_prompts=examples/masked_lora/prompts.txt",
        f"--output_dir={OUTPUT.as_posix()}",
        f"--output_name={NAME}",
        f"--logging_dir={(OUTPUT / 'logs').as_posix()}",
        "--report",
    ]


def launch_command(python: Path) -> list[str]:
    """Return the command that trains the example: `accelerate launch ...` as this virtual environment runs it."""
    return [str(python), "-m", "accelerate.commands.launch", *launch_options(), *training_arguments()]


def launch_options() -> list[str]:
    """Return the options of accelerate itself."""
    one_process = ["--num_processes=1", "--num_machines=1", "--num_cpu_threads_per_process=1"]
    return [*one_process, "--mixed_precision=no", "--dynamo_backend=no"]  # named, or accelerate lists its defaults


def copyable(system: str) -> str:
    """Return the training command as a user types it: an option a line, on Windows (two shells) all in one line."""
    script, *options = [shlex.quote(word) for word in training_arguments()]
    lines = [" ".join(["accelerate launch", *launch_options(), script]), *options]
    if system == "Windows":
        return ".venv\\Scripts\\activate\n" + " ".join(lines)
    return "source .venv/bin/activate\n" + " \\\n  ".join(lines)


def made_since(start: float, patterns: dict[str, str]) -> dict[str, list[Path]]:
    """Return, for each label, the files under OUTPUT that match its pattern and were written after start, by age."""
    found = {}
    for label, pattern in patterns.items():
        paths = [path for path in (ROOT / OUTPUT).glob(pattern) if path.stat().st_mtime >= start]
        found[label] = sorted(paths, key=lambda path: (path.stat().st_mtime, path.name))
    return found


def train_example(python: Path) -> None:
    """Make the model, draw the contact sheet, train, and name the files."""
    start = time.time()
    (ROOT / OUTPUT).mkdir(parents=True, exist_ok=True)
    model, maker = ROOT / MODEL, ROOT / MODEL_MAKER
    if not model.is_file() or model.stat().st_mtime < maker.stat().st_mtime:
        say("\nMaking the small example model ...")
        model.parent.mkdir(parents=True, exist_ok=True)
        run([str(python), str(MODEL_MAKER), str(MODEL), "--seed", "0"], "The example model could not be made.")
    say("\nWhat training will see (tools/check_dataset.py says it of any data set):")
    check = [str(python), "tools/check_dataset.py", f"--dataset_config={DATASET.as_posix()}"]
    run(check, "The example data set has a problem; see above.")
    say(f"\nTraining {NUM_STEPS} steps. The command, to be copied and changed:\n{copyable(platform.system())}\n")
    run(launch_command(python), "The training stopped with an error; see above.")
    report_files(start)


def report_files(start: float) -> None:
    """Print the files that were made since start; StepError if one that must be there is not."""
    made = made_since(
        start,
        {
            "the LoRA": f"{NAME}.safetensors",
            "samples before": f"sample/{NAME}_e000000_*.png",
            "samples after": f"sample/{NAME}_{NUM_STEPS:06d}_*.png",
            "what the masks let through": f"{NAME}-masks.png",
            "report, to be opened in a browser": f"{NAME}-report.html",
        },
    )
    say(f"\nDone in {time.time() - start:.0f} s. It made:")
    for label, paths in made.items():
        for path in paths:
            say(f"  {label + ':':36}{path.relative_to(ROOT)}")
    missing = [label for label, paths in made.items() if not paths]
    if missing:
        raise StepError(f"These files should be under {OUTPUT} and are not: {', '.join(missing)}.")
    say("\nThe model is a small stand-in in the true layout: its pictures are not pretty; files and commands are real.")
    say("For your own pictures and a real checkpoint: docs/getting-started.md")


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked for, and the words for pytest."""
    parser = argparse.ArgumentParser(
        description="Set up .venv, then train the example (demo) or run the tests (test).",
        epilog="Further words after `test` go to pytest: quickstart.py test tests/test_masks.py",
    )
    parser.add_argument("what", nargs="?", choices=("demo", "test"), default="demo", help="default: demo")
    parser.add_argument(
        "--torch-index",
        metavar="ADDRESS",
        help="index of the PyTorch build to install in place of the system's default, as its site shows it",
    )
    known, rest = parser.parse_known_args(arguments)
    if rest and known.what != "test":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return known, rest


def main(arguments: list[str]) -> int:
    """Return the exit code: 0, or that of the step that failed."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs an older one is to read this, not a syntax error
        say(f"Python 3.10 or later is needed; this is {platform.python_version()} ({sys.executable}).")
        return 1
    asked, rest = read_arguments(arguments)
    try:
        python = prepare_environment(asked.torch_index)
        if asked.what == "test":
            run([str(python), "-m", "pytest", *(rest or ALL_TESTS)], "Some tests failed; see above.")
        else:
            train_example(python)
    except StepError as error:
        say(f"\n{error}")
        return error.code
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
