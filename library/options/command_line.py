"""Command line and config file, read into Options: the command line beats the file, the file beats the defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import OptionError, did_you_mean
from library.options import config_file
from library.options.checks import check_options
from library.options.declare import Parser, declared, parser
from library.options.groups import GROUPS, Options, all_declared, build_all
from library.options.reference import (
    FRONT_END_KEYS,
    GRANTED,
    IGNORED,
    IGNORED_BY_SCRIPT,
    OTHER_SCRIPTS,
    OTHERWISE,
    RECORDED,
    REFUSED,
    REFUSED_BY_SCRIPT,
    TEXT_ON_DEMAND,
    TRAINS_BESIDE_TEXT_CACHE,
    WHOLE_MODEL_SCRIPTS,
    ZERO_COUNTS,
    as_in,
)
from library.options.values import Declared, convert

log = logging.getLogger(__name__)

CONFIG_FILE = Declared(
    "config_file", str, None, "TOML file of option values; the command line beats it.", is_optional=True
)
OUTPUT_CONFIG = Declared(
    "output_config", bool, False, "Write the options that differ from the defaults to --config_file, and stop."
)


@dataclass(frozen=True)
class CommandLine:
    """What was asked for, and what should be said about it once messages can be shown."""

    options: Options
    own: Mapping[str, Any]  # the command's own flags, by name
    warnings: tuple[str, ...]


def parse(argv: Sequence[str], script: str = "train_network") -> Options:
    """Return the options of a training run; warnings go to the log.

    Raises: OptionError for a wrong command line or config file.
    """
    read = read_training(argv, script)
    for warning in read.warnings:
        log.warning("%s", warning)
    return read.options


def read_training(argv: Sequence[str], script: str) -> CommandLine:
    """Return the options of a training run, checked against each other, with the warnings.

    Raises: OptionError for a wrong command line or config file.
    """
    trained = "the model itself" if script in WHOLE_MODEL_SCRIPTS else "a network"
    read = read_command_line(argv, prog=f"{script}.py", description=f"Train {trained}.", script=script)
    return CommandLine(read.options, read.own, (*read.warnings, *check_options(read.options, script)))


def read_command_line(
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    script: str = "train_network",
    shown: Mapping[str, type] = GROUPS,
    add_own: Callable[[Parser], None] | None = None,
) -> CommandLine:
    """Return the options of any command that understands those of training.

    A training command line or config file can be given as it is: each option is known and checked. Groups that are
    not shown are left out of --help only. Options of different groups are not checked against each other.

    Args:
        argv: the arguments without the command's name.
        prog: the command's file name.
        description: one line for --help.
        script: whose options these are; those of other scripts are warned about.
        shown: title -> group for --help.
        add_own: adds the command's own flags to the parser; their values are in the result's own.

    Raises: OptionError for a wrong command line or config file.
    """
    argv, warnings = _without_other_scripts(argv, script)
    made = _parser(prog, description, shown, script)
    if add_own is not None:
        add_own(made)
    namespace, unknown = made.parse_known_args(argv)
    known = _known(script)
    if unknown:
        raise OptionError(_unknown_argument(unknown, known))
    given = vars(namespace)
    own = {name: value for name, value in given.items() if name not in known}
    values = {name: convert(known[name], text, known[name].flag) for name, text in given.items() if name in known}
    file = values.pop(CONFIG_FILE.name, None)
    is_writing = values.pop(OUTPUT_CONFIG.name, False)
    if is_writing and file is None:
        raise OptionError("--output_config has no file to write to. Add --config_file=FILE.toml.")
    if file is not None and not is_writing:
        from_file, file_warnings = _read_config(config_file.path_of(file), known, script)
        values = {**from_file, **values}
        warnings += file_warnings
    warnings += _without_reader(values, script)
    values, said = _with_unet_only(values, script)
    warnings += said
    idle = IGNORED_BY_SCRIPT.get(script, {}).keys() - RECORDED
    defaults = {name: known[name].default for name in OTHERWISE.get(script, {})}
    meant = {name: value for name, value in _with_text_on_demand(values, script).items() if name not in idle}
    options = build_all({**defaults, **meant})
    if is_writing:
        path = config_file.path_of(file)
        config_file.write(path, values, known)
        made.exit(0, f"{path} is written.\n")
    return CommandLine(options, own, tuple(warnings))


def _with_unet_only(values: dict[str, Any], script: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values with what cached text requires, and a warning if it was not asked for.

    The guide's command for SDXL has the cache beside rates for the text encoders, which sd-scripts refuses.
    """
    if script in TRAINS_BESIDE_TEXT_CACHE | TEXT_ON_DEMAND:
        return values, []
    is_cached = values.get("cache_text_encoder_outputs") or values.get("cache_text_encoder_outputs_to_disk")
    if script in WHOLE_MODEL_SCRIPTS:
        is_decided = values.get("stop_text_encoder_training") is not None or values.get("learning_rate_te") == 0
        required, taken = "--stop_text_encoder_training 0", {"stop_text_encoder_training": 0}
    else:
        is_decided = bool(values.get("network_train_unet_only") or values.get("network_train_text_encoder_only"))
        required, taken = "--network_train_unet_only", {"network_train_unet_only": True}
    if not is_cached or is_decided:
        return values, []
    warning = (
        f"--cache_text_encoder_outputs requires {required}, which is taken as given: captions are "
        "encoded before training, so THE TEXT ENCODERS ARE NOT TRAINED. To train them, leave the cache out"
    )
    return {**values, **taken}, [warning]


def _with_text_on_demand(values: dict[str, Any], script: str) -> dict[str, Any]:
    """Return the values with what a script means that trains text encoders only where that is asked for."""
    if script not in TEXT_ON_DEMAND or values.get("train_text_encoder"):
        return values
    return {**values, "stop_text_encoder_training": 0}


def _known(script: str) -> dict[str, Declared]:
    elsewhere = {each.name: each.declared for each in (*REFUSED, *IGNORED, *GRANTED)}
    own = {name: as_in(script, each) for name, each in all_declared().items()}
    return {**own, **elsewhere, CONFIG_FILE.name: CONFIG_FILE, OUTPUT_CONFIG.name: OUTPUT_CONFIG}


def _parser(prog: str, description: str, shown: Mapping[str, type], script: str) -> Parser:
    known = _known(script)
    idle = {*IGNORED_BY_SCRIPT.get(script, {}), *REFUSED_BY_SCRIPT.get(script, {})}
    listed = {each.name for group in shown.values() for each in declared(group)} - idle
    foreign = {name for name in known if _is_of_other_script(name, script)}
    apart = {*listed, *foreign, CONFIG_FILE.name, OUTPUT_CONFIG.name}
    return parser(
        prog,
        description,
        shown,
        plain=(CONFIG_FILE, OUTPUT_CONFIG),
        hidden=[each for name, each in known.items() if name not in apart],
        left_out=foreign | idle,
        otherwise=known,
    )


def _without_other_scripts(argv: Sequence[str], script: str) -> tuple[list[str], list[str]]:
    """Return argv without the options of other scripts and their values, and a warning for each of them."""
    kept, warnings = [], []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not _is_of_other_script(name, script):
            kept.append(argument)
            continue
        has_value = OTHER_SCRIPTS[name][1]
        if has_value and not equals and arguments and not arguments[0].startswith("--"):
            arguments.pop(0)
        warnings.append(_other_script_warning(f"--{name}", name, script))
    return kept, warnings


def _is_of_other_script(name: str, script: str) -> bool:
    return name in OTHER_SCRIPTS and script not in OTHER_SCRIPTS[name][0]


def _other_script_warning(where: str, name: str, script: str) -> str:
    return f"{where} has no effect: {script} does not use it, only {' and '.join(OTHER_SCRIPTS[name][0])}"


def _read_config(path: Path, known: Mapping[str, Declared], script: str) -> tuple[dict[str, Any], list[str]]:
    """Return the config file's values in their declared types, and warnings about keys that have no effect."""
    found, warnings = config_file.read(path)
    values = {}
    for name, raw in found.items():
        where = f"{path}: {name}"
        if name in (CONFIG_FILE.name, OUTPUT_CONFIG.name):
            warnings.append(f"{where} has no effect in a config file")
        elif _is_of_other_script(name, script):
            if raw not in (False, "", 0):
                warnings.append(_other_script_warning(where, name, script))
        elif name in known:
            values[name] = convert(known[name], raw, where)
        elif name in FRONT_END_KEYS:
            warnings.append(f"{where} has no effect: no script has this option")
        else:
            raise OptionError(f"{path}: there is no option {name}.{did_you_mean(name, known)}")
    return values, warnings


def _without_reader(values: Mapping[str, Any], script: str) -> list[str]:
    """Return warnings about options that are ignored.

    Raises: OptionError for one that is refused.
    """
    for each in REFUSED:
        if values.get(each.name, each.default) not in (each.default, 0):  # programs that fill in forms write 0 for off
            raise OptionError(f"--{each.name} cannot be used: {each.reason}. Leave it out.")
    for name, reason in REFUSED_BY_SCRIPT.get(script, {}).items():
        if values.get(name):
            raise OptionError(f"--{name} cannot be used with {script}.py: {reason}. Leave it out.")
    ignored = [
        f"--{each.name} has no effect: {each.reason}"
        for each in IGNORED
        if values.get(each.name, each.default) != each.default
    ]
    known, idle = all_declared(), IGNORED_BY_SCRIPT.get(script, {}).items()
    return ignored + [
        f"--{name} has no effect: {reason}"
        for name, reason in idle
        if values.get(name) not in (None, known[name].default) and (values.get(name) != 0 or name in ZERO_COUNTS)
    ]


def _unknown_argument(unknown: Sequence[str], known: Mapping[str, Declared]) -> str:
    for argument in unknown:
        if argument.startswith("-"):
            flag = argument.partition("=")[0]
            return f"there is no option {flag}.{did_you_mean(flag, [each.flag for each in known.values()])}"
    return f"{unknown[0]!r} belongs to no option. Put values with spaces in quotes."
