"""What the examples that train on small models of several kinds share: their common options, and how they are run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Example:
    """A folder of examples/, and the script whose example it is."""

    folder: Path  # with dataset.toml and prompts.txt, from the root of the repository
    script: str
    options: tuple[str, ...]  # of all its runs

    def training(self, model: Path, output: Path, name: str, num_steps: int, more: Sequence[str]) -> list[str]:
        """Return the script and its options for one run."""
        return [
            self.script,
            f"--pretrained_model_name_or_path={model.as_posix()}",
            f"--dataset_config={(self.folder / 'dataset.toml').as_posix()}",
            "--masked_loss",
            "--cache_latents",
            *self.options,
            "--network_dim=8",
            "--network_alpha=8",
            "--learning_rate=1e-3",
            f"--max_train_steps={num_steps}",
            "--max_data_loader_n_workers=0",
            "--mixed_precision=bf16",
            "--seed=1",
            "--sdpa",
            f"--sample_prompts={(self.folder / 'prompts.txt').as_posix()}",
            f"--sample_every_n_steps={num_steps}",
            f"--output_dir={output.as_posix()}",
            f"--output_name={name}",
            "--report",
            *more,
        ]


def run_all(maker: str, model: Path, commands: Iterable[Sequence[str]]) -> int:
    """Make the model unless it is there, run every command, and return the exit code.

    Args:
        maker: the program that writes the model, from the root of the repository.
        model: likewise.
        commands: each a script and its options.
    """
    if not (ROOT / model).is_file():
        (ROOT / model).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, maker, str(model)], cwd=ROOT, check=True)
    for command in commands:
        print(f"python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0
