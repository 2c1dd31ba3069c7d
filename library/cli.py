"""From a command line to a run: options, messages, the model family, training, and the exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from library.errors import OptionError, UserError
from library.options import read_training
from library.options.checks import check_files
from library.options.logging import LoggingOptions

log = logging.getLogger(__name__)

WRONG_USE, INTERRUPTED = 2, 130  # exit codes: as argparse; as a shell reports Ctrl-C
HANDLER = "masked training"
NETWORK = "library.training.method:NetworkMethod"  # a network on top of the models is trained


def main(script: str, family: str, argv: Sequence[str] | None = None, *, method: str = NETWORK) -> int:
    """Return the exit code of one training run: 0, 2 after an error of the user's, 130 after Ctrl-C.

    Args:
        script: the entry script's name without ending, "train_network".
        family: where the model family's class is, "library.models.sd:Sd". Imported once the options are right, because
            torch takes seconds.
        argv: the arguments without the script's name; the process's own if None.
        method: where the class of what is trained is, likewise.
    """
    # GNU OpenMP's threads spin while they wait, and where cores are shared that makes torch 30 times slower.
    # It reads the setting when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # some microseconds: sleeping at once costs a fifth of a step
    try:
        read = read_training(sys.argv[1:] if argv is None else argv, script)
        set_up_logging(read.options.logging)
        for warning in read.warnings:
            log.warning("%s", warning)
        check_files(read.options)  # before imports that take seconds
        from library.training.run import train

        train(read.options, _class_at(family).from_options(read.options), _class_at(method))
    except UserError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return WRONG_USE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    return 0


def set_up_logging(options: LoggingOptions) -> None:
    """Send messages where the options say; of several processes all but the first show warnings only.

    Raises: OptionError when the log file cannot be written.
    """
    handler: logging.Handler
    is_first = os.environ.get("LOCAL_RANK", "0") in ("0", "-1")
    if options.console_log_file:
        try:
            handler = logging.FileHandler(options.console_log_file, mode="w" if is_first else "a", encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"--console_log_file {options.console_log_file} cannot be written: {error.strerror}. Choose another."
            ) from None
    else:
        handler = logging.StreamHandler(sys.stdout if options.console_log_simple else sys.stderr)
    handler.name = HANDLER
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # at import it warns that kernels it would download are missing, which nobody here asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for client in ("httpx", "httpx2"):  # of huggingface_hub, old and new: a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)
    root = logging.getLogger()
    for old in [each for each in root.handlers if each.name == HANDLER]:  # a second run in one process
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    level = logging.getLevelName(options.console_log_level or "INFO")
    root.setLevel(level if is_first else max(level, logging.WARNING))


def one_line(error: UserError) -> str:
    """Return the error's message; of one that a loader process passed on with its traceback, the message alone."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else type(error).__name__
    return last.partition(f"{type(error).__name__}: ")[2] or last if "Traceback" in text else text.replace("\n", " ")


def _class_at(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
