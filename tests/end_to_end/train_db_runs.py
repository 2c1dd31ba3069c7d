"""Whole runs of train_db.py for the tests: the command line, and what such a run leaves."""

from dataclasses import replace
from pathlib import Path

from end_to_end.training_runs import SD15, Trained, arguments

from library.cli import main

METHOD = "library.training.full_model:FullModel"
DB = replace(SD15, script="train_db")
UNET, TEXT = "model.diffusion_model.", "cond_stage_model."  # of a single file's names
OF_NETWORKS = ("--network_module", "networks.lora")
RATE = "1e-4"


def db_arguments(folder: Path, config: Path, *more: object, seed: object = 7) -> list[str]:
    """Return the command line of a short full training, without the script's name; later words count."""
    argv = arguments(DB, folder, config, "--learning_rate", RATE, *more, seed=seed)
    place = argv.index(OF_NETWORKS[0])
    return argv[:place] + argv[place + len(OF_NETWORKS) :]


def train_db(folder: Path, config: Path, *more: object) -> Trained:
    """Train in this process; the run must end well."""
    argv = db_arguments(folder, config, *more)
    assert main(DB.script, DB.place, argv, method=METHOD) == 0
    return Trained(folder, tuple(argv))
