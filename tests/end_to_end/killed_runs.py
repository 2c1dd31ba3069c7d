"""A program of its own that kills training runs at random moments: each is a fork, so that imports are paid once.

    python killed_runs.py KILLS SEED SCRIPT PLACE OUTPUT_FOLDER -- ARGUMENTS OF THE SCRIPT

Prints a line for each kill, the step that the next run goes on from, and at last the exit code of the run left alone.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

LONGEST_WAIT_S = 0.5  # some steps and states of the tiny model
IMPORTED_ONCE = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "library.cli",
    "library.models.sd",
    "library.training.run",
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def newest_state(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the folder of the newest state; every folder that is called one must be whole."""
    found = []
    for state in folder.glob("lora-*state"):
        manifest = json.loads((state / "train_state.json").read_text(encoding="utf-8"))
        assert {"network.safetensors", "optimizer.pt"} <= {path.name for path in state.iterdir()}, state
        found.append((manifest["current_step"], state))
    return max(found, default=None)


def begin(script: str, place: str, arguments: list[str]) -> int:
    """Return the process of a run that has just begun."""
    child = os.fork()
    if child:
        return child
    from library.cli import main

    os._exit(main(script, place, arguments))


def wait_for_states(folder: Path, child: int, since: int, more: int) -> None:
    """Wait until a run has saved the state of `more` further steps, or has ended: machines differ in speed."""
    while not (folder / f"lora-step{since + more:08d}-state").is_dir() and more:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Kill, resume, and in the end let a run come to its end; return its exit code."""
    kills, seed, script, place, folder = sys.argv[1:6]
    arguments = sys.argv[7:]
    for module in IMPORTED_ONCE:
        importlib.import_module(module)

    chance = random.Random(seed)
    for _ in range(int(kills)):
        state = newest_state(Path(folder))
        more = [] if state is None else ["--resume", str(state[1])]
        child = begin(script, place, [*arguments, *more])
        wait_for_states(Path(folder), child, since=state[0] if state else 0, more=chance.randrange(4))
        time.sleep(chance.uniform(0, LONGEST_WAIT_S))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was quicker
            tell(f"ended {os.WEXITSTATUS(status)}")
            return os.WEXITSTATUS(status)
        tell(f"killed, had begun after step {state[0] if state else 0}")
    state = newest_state(Path(folder))
    more = [] if state is None else ["--resume", str(state[1])]
    _, status = os.waitpid(begin(script, place, [*arguments, *more]), 0)
    tell(f"ended {os.waitstatus_to_exitcode(status)}")
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
