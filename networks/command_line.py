"""What the commands of this folder share: options in, one line for a user's error, an exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from library.errors import OptionError, UserError, did_you_mean
from library.options.declare import Parser, build, declared, parser
from library.options.values import convert

Group = TypeVar("Group")
GOOD, WRONG_USE, INTERRUPTED = 0, 2, 130  # exit codes
PRECISIONS = ("float", "fp16", "bf16")
PICKLED = (".ckpt", ".pt", ".pth")  # what torch writes; without metadata
WRITTEN = (".safetensors", *PICKLED)


def read(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    group: type[Group],
    positional: Mapping[str, str] | None = None,
    short: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
) -> Group:
    """Return a command's options.

    Args:
        argv: the arguments without the command's name.
        prog: the command's file name.
        description: one line for --help.
        group: the dataclass that declares the options.
        positional: option that is given without its name -> its help.
        short: one-letter flag -> the option it stands for.
        refused: options of sd-scripts that cannot be used -> why.

    Raises: OptionError for an unknown option, a wrong value, or values that contradict each other.
    """
    options = {each.name: each for each in declared(group)}
    plain = [each for each in options.values() if each.name not in (positional or {})]
    made: Parser = parser(prog, description, {}, plain=plain)
    made.usage = None  # argparse's own: these commands have no config file
    for name, text in (positional or {}).items():
        made.add_argument(name, help=text)
    long_of = {f"-{letter}": options[name].flag for letter, name in (short or {}).items()}
    namespace, unknown = made.parse_known_args([long_of.get(argument, argument) for argument in argv])
    for argument in unknown:
        flag = argument.partition("=")[0]
        if flag.removeprefix("--") in (refused or {}):
            raise OptionError(f"{flag} cannot be used: {(refused or {})[flag.removeprefix('--')]}.")
        if flag.startswith("-"):
            known = [each.flag for each in plain]
            raise OptionError(f"there is no option {flag}.{did_you_mean(flag, known)} See --help.")
        raise OptionError(f"{argument!r} belongs to no option. Put values with spaces in quotes.")
    return build(
        group, {name: convert(options[name], raw, options[name].flag) for name, raw in vars(namespace).items()}
    )


def run(work: Callable[[Sequence[str]], None], set_up: Callable[[], None], argv: Sequence[str] | None) -> int:
    """Return the exit code of a command: 0, 2 after an error of the user's, 130 after Ctrl-C.

    Args:
        work: does it all, given the arguments.
        set_up: sends messages to the terminal.
        argv: the arguments without the command's name; the process's own if None.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; spinning threads cost much
    try:
        set_up()
        work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        message = str(error).strip().replace("\n", " ")
        sys.stderr.write(f"error: {message}\n")
        return WRONG_USE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # what reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
    return GOOD


def check_output(path: str | None, flag: str = "--save_to") -> Path:
    """Return the path of the file to be written.

    Raises: OptionError where it is missing, is a folder, has an unknown ending, or cannot be written to.
    """
    if path is None:
        raise OptionError(f"{flag} is missing. Name the file to write, for example {flag} merged.safetensors")
    if Path(path).is_dir():
        raise OptionError(f"{flag} {path} is a folder. Name a file in it.")
    if Path(path).suffix not in WRITTEN:
        raise OptionError(f"{flag} {path}: the ending must be one of {', '.join(WRITTEN)}.")
    folder = Path(path).absolute().parent
    while not folder.exists():  # missing ones are made when the file is written
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "it takes no files from this user" if folder.is_dir() else "it is no folder"
        raise OptionError(f"{flag} {path}: cannot be written in {folder}: {reason}.")
    return Path(path)


def check_input(path: str | None, flag: str) -> Path:
    """Return the path of a file to be read.

    Raises: OptionError where it is missing or there is no such file.
    """
    if path is None:
        raise OptionError(f"{flag} is missing. See --help.")
    if Path(path).is_dir():
        raise OptionError(f"{flag} {path} is a folder. Give a single file, .safetensors or .ckpt.")
    if not Path(path).is_file():
        raise OptionError(f"{flag}: there is no file {path}.")
    return Path(path)


def check_models(models: Sequence[str] | None, ratios: Sequence[float] | None) -> list[tuple[Path, float]]:
    """Return the files of --models with their --ratios.

    Raises: OptionError where there are none, the numbers differ, or a file is not there.
    """
    if not models:
        raise OptionError("--models is missing. Give one LoRA file or more, and a number for each with --ratios.")
    if ratios is None or len(ratios) != len(models):
        raise OptionError(f"--ratios has {len(ratios or ())} numbers for {len(models)} --models. Give one for each.")
    return [(check_input(path, "--models"), ratio) for path, ratio in zip(models, ratios, strict=True)]


def dtype_of(precision: str | None) -> Any:
    """Return torch's dtype for a precision by name, None for None."""
    import torch

    return {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def device_of(name: str | None) -> Any:
    """Return torch's device, the CPU for None. Raises: OptionError where it is not there."""
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"--device {name} cannot be used here: {reason}. Leave it out to use the CPU.") from None
    return device
