"""A program of its own that kills training runs while they write models and states: each is a fork.

    python killed_while_saving.py KILLS SEED SCRIPT PLACE METHOD OUTPUT_FOLDER -- ARGUMENTS OF THE SCRIPT

After each kill every model under its name must be whole and no older than before. Prints a line for each kill, what it
left half written, and at last the exit code of the run left alone.
"""

import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

from killed_runs import IMPORTED_ONCE, newest_state, tell
from safetensors import safe_open

LONGEST_WAIT_S = 0.1  # about what a model of the tiny size, and its state, take to write
PART = ".part"


def begin(script: str, place: str, method: str, arguments: list[str]) -> int:
    """Return the process of a run that has just begun."""
    child = os.fork()
    if child:
        return child
    from library.cli import main

    os._exit(main(script, place, arguments, method=method))


def halves(folder: Path) -> list[str]:
    """Return the names of what is half written, or was left so."""
    return sorted(path.name for path in folder.glob(".*") if PART in path.name)


def has_ended(child: int) -> bool:
    """Return whether a process is no longer running."""
    return bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def check_models(folder: Path) -> list[str]:
    """Return the names of the models that are there; each must be whole, down to its last tensor."""
    found = sorted(path for path in folder.glob("lora*") if not path.name.endswith("-state"))
    for model in found:
        files = [model] if model.is_file() else sorted(model.rglob("*.safetensors")) + sorted(model.rglob("*.bin"))
        assert model.is_file() or (model / "model_index.json").is_file(), f"{model} is half a folder"
        assert files, f"{model} has no weights"
        for file in (file for file in files if file.suffix == ".safetensors"):
            with safe_open(file, "pt") as opened:
                assert all(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118
    return [path.name for path in found]


def main() -> int:
    """Kill, look, resume, and in the end let a run come to its end; return its exit code."""
    kills, seed, script, place, method, folder = sys.argv[1:7]
    arguments, out = sys.argv[8:], Path(folder)
    for module in (*IMPORTED_ONCE, "library.training.full_model"):
        importlib.import_module(module)

    chance, reached = random.Random(seed), 0
    for _ in range(int(kills)):
        state = newest_state(out)
        assert (state[0] if state else 0) >= reached, "a kill loses no state"
        reached = state[0] if state else 0
        more = [] if state is None else ["--resume", str(state[1])]
        left = set(halves(out))
        child = begin(script, place, method, [*arguments, *more])
        for _ in range(chance.randrange(1, 4)):  # the first, second or third thing that it writes
            while not set(halves(out)) - left and not has_ended(child):
                time.sleep(0.0005)
            left |= set(halves(out))
        time.sleep(chance.uniform(0, LONGEST_WAIT_S) if chance.random() < 0.5 else 0)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was quicker
            tell(f"ended {os.WEXITSTATUS(status)}")
            return os.WEXITSTATUS(status)
        models = check_models(out)
        assert not reached or any(name.startswith(f"lora-step{reached:08d}") for name in models), (
            "the one before is there"
        )
        tell(f"killed after step {reached}: {'half written' if halves(out) else 'nothing half'}, whole {models}")
    state = newest_state(out)
    more = [] if state is None else ["--resume", str(state[1])]
    _, status = os.waitpid(begin(script, place, method, [*arguments, *more]), 0)
    check_models(out)
    tell(f"ended {os.waitstatus_to_exitcode(status)}")
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
