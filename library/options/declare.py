"""An option is one line in a dataclass; from that line come its argument, its checks and its row in the documents."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from library.errors import OptionError
from library.options.values import Bounds, Declared, check

Group = TypeVar("Group")
DETAILS = "option"  # the key of an option's Declared details in a dataclass field's metadata


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
    bounds: Bounds | None = None,
    joined_by: str | None = None,
    is_path: bool = False,
    is_secret: bool = False,
) -> Any:
    """Return a dataclass field that declares an option; its type is the field's annotation.

    Args:
        default: the value when the option is given nowhere.
        help: what it does, with units.
        choices: the only values there are.
        parse: reads the value from text, int or float; raises ValueError("must be ...").
        bounds: the range of a number, or of each number of a list.
        joined_by: a list in a config file is read as one text with this between the items.
        is_path: names a file or folder; left out of what is sent to trackers.
        is_secret: never written to a file or sent to trackers.
    """
    details = {
        "help": help,
        "choices": choices,
        "parse": parse,
        "bounds": bounds or Bounds(),
        "joined_by": joined_by,
        "is_path": is_path,
        "is_secret": is_secret,
    }
    return field(default=default, metadata={DETAILS: details})


def declared(group: type) -> tuple[Declared, ...]:
    """Return the options that a group's dataclass declares, in its order."""
    hints = typing.get_type_hints(group)
    return tuple(_declared_by(entry, hints[entry.name]) for entry in fields(group) if DETAILS in entry.metadata)


def _declared_by(entry: Field[Any], hint: Any) -> Declared:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    values = [part for part in parts if part is not type(None)]
    is_list = typing.get_origin(values[0]) is tuple
    assert entry.default is not MISSING, f"{entry.name} has no default"
    return Declared(
        name=entry.name,
        element=typing.get_args(values[0])[0] if is_list else values[0],
        default=entry.default,
        is_optional=len(values) < len(parts),
        is_list=is_list,
        **entry.metadata[DETAILS],
    )


def check_values(group: Any) -> None:
    """Refuse a group with a value outside its choices or range; each group's __post_init__ begins with it.

    Raises: OptionError.
    """
    for each in declared(type(group)):
        check(each, getattr(group, each.name), each.flag)


def settle(group: Any, name: str, value: Any) -> None:
    """Give a field of a frozen group the value that follows from the others. Only for __post_init__."""
    object.__setattr__(group, name, value)


def check_pairs(texts: Iterable[str] | None, flag: str) -> None:
    """Refuse a list with an item that is not key=value.

    Raises: OptionError.
    """
    for text in texts or ():
        if not re.match(r"\s*[A-Za-z_]\w*\s*=", text):
            raise OptionError(f"{flag} takes key=value, got {text!r}. Put spaces between the pairs, not inside them.")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line each, raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises: OptionError, always.
        """
        message = re.sub(r"^argument (--\w+): ", r"\1: ", message)
        raise OptionError(f"{message}. See --help.")


def parser(
    prog: str,
    description: str,
    groups: Mapping[str, type],
    *,
    plain: Iterable[Declared] = (),
    hidden: Iterable[Declared] = (),
    left_out: Container[str] = (),
    otherwise: Mapping[str, Declared] = MappingProxyType({}),
) -> Parser:
    """Return a parser that has the options of the groups, each under its title in --help.

    It gives texts, to be read by values.convert. An option that is not given is not in the result.

    Args:
        prog: the command's file name.
        description: stands at the top of --help.
        groups: title -> dataclass.
        plain: options of no group.
        hidden: options that are understood but not listed by --help.
        left_out: names of options in the groups that this command does not have.
        otherwise: name -> an option of the groups as this command has it, where that differs.
    """
    made = Parser(
        prog=prog,
        description=description,
        usage="%(prog)s [--config_file FILE.toml] [options]",
    )
    for each in plain:
        _add(made, each, help_line(each).replace("%", "%%"))
    for title, group in groups.items():
        section = made.add_argument_group(f"{title} options")
        for each in declared(group):
            if each.name not in left_out:
                own = otherwise.get(each.name, each)
                _add(section, own, help_line(own).replace("%", "%%"))
    for each in hidden:
        _add(made, each, argparse.SUPPRESS)
    return made


def _add(place: Any, each: Declared, text: str) -> None:
    if each.element is bool:
        place.add_argument(each.flag, action="store_true", default=argparse.SUPPRESS, help=text)
        return
    shape: dict[str, Any] = {"nargs": "*"} if each.is_list else {}
    shape["default"] = argparse.SUPPRESS
    if each.choices:
        metavar = "{" + ",".join(map(str, each.choices)) + "}"
    elif each.parse is not None:
        metavar = "N|RATIO"
    else:
        metavar = "PATH" if each.is_path else _METAVARS[each.element]
    place.add_argument(each.flag, metavar=metavar, help=text, **shape)


def help_line(each: Declared) -> str:
    """Return the help of an option with its range and default."""
    range_text = f" Must be {each.bounds.text()}." if each.bounds.text() else ""
    is_unset = each.default is None or each.default is False or each.default == ""
    return each.help + range_text + ("" if is_unset else f" Default: {default_text(each)}.")


def default_text(each: Declared) -> str:
    """Return the default of an option as users would write it."""
    return " ".join(map(str, each.default)) if each.is_list else str(each.default)


def build(group: type[Group], values: Mapping[str, Any]) -> Group:
    """Return a group's dataclass from the converted values of its options; names of other groups are left alone.

    Raises: OptionError for values that contradict each other.
    """
    own = {each.name for each in declared(group)}
    return group(**{name: value for name, value in values.items() if name in own})


_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT"}
