"""One option's value: read from text or TOML into the declared type, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from library.errors import OptionError, did_you_mean
from library.options.toml import BACKSLASHES, has_control_character

TRUE_OR_FALSE = {"true": True, "false": False, "1": True, "0": False}
TYPE_NAMES = {bool: "flag", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class Bounds:
    """The range of a number; None where a side is open."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def refusal(self, value: float) -> str | None:
        """Return what value should have been, None if it lies inside."""
        lower = (self.min is not None and value < self.min) or (self.above is not None and value <= self.above)
        upper = (self.max is not None and value > self.max) or (self.below is not None and value >= self.below)
        return f"must be {self.text()}" if lower or upper else None

    def text(self) -> str:
        """Return the range in words; empty if both sides are open."""
        sides = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        return " and ".join(f"{word} {limit:g}" for word, limit in sides.items() if limit is not None)


@dataclass(frozen=True)
class Declared:
    """An option as its line in a dataclass declares it."""

    name: str  # the field's name: the option without its two dashes, and the key in a config file
    element: type  # bool, int, float or str: of the value, or of each value of a list
    default: Any
    help: str
    is_optional: bool = False  # None is a value
    is_list: bool = False
    choices: tuple[Any, ...] | None = None
    parse: Callable[[Any], Any] | None = None  # from text, int or float; raises ValueError with what it must be
    bounds: Bounds = Bounds()
    joined_by: str | None = None  # a list in a config file is one text with this between its items
    is_path: bool = False
    is_secret: bool = False

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.name}"

    @property
    def type_name(self) -> str:
        """The type in words, for messages and documents."""
        if self.parse is not None:
            return "steps or ratio"
        name = "path" if self.is_path else TYPE_NAMES[self.element]
        return f"list of {name}s" if self.is_list else name


def convert(declared: Declared, raw: Any, where: str) -> Any:
    """Return a value from the command line (text) or a TOML file (text, number, boolean, list) in the declared type.

    An empty text or list for an option that may be unset leaves it unset, as programs write that fill in forms.

    Args:
        declared: the option.
        raw: the value as found.
        where: names the option in messages: "--seed", or "train.toml: seed".

    Raises: OptionError for a value of another type, one outside the choices, or outside the range.
    """
    if isinstance(raw, list | tuple) and declared.joined_by is not None:
        raw = declared.joined_by.join(str(item) for item in raw)
    if declared.is_optional and not declared.default and raw in ("", [], ()):
        return declared.default
    if declared.is_list:
        items = raw if isinstance(raw, list | tuple) else [raw]
        value: Any = tuple(_convert_one(declared, item, where) for item in items)
    else:
        value = _convert_one(declared, raw, where)
    check(declared, value, where)
    return value


def check(declared: Declared, value: Any, where: str) -> None:
    """Refuse a value of the declared type that lies outside the choices or the range.

    Raises: OptionError.
    """
    if value is None:
        if not declared.is_optional:
            raise OptionError(f"{where} must be a {declared.type_name}, got nothing.")
        return
    for item in value if declared.is_list else (value,):
        if declared.choices is not None and item not in declared.choices:
            listed = ", ".join(str(choice) for choice in declared.choices)
            near = did_you_mean(str(item), [str(choice) for choice in declared.choices])
            raise OptionError(f"{where} must be one of {listed}; got {item}.{near}")
        if declared.is_path and has_control_character(str(item)):
            raise OptionError(f"{where} has a special character in it: {item!r}. {BACKSLASHES}")
        if isinstance(item, int | float) and not isinstance(item, bool):
            refusal = declared.bounds.refusal(item)
            if refusal:
                raise OptionError(f"{where} {refusal}, got {item}.")


def int_or_ratio(raw: Any) -> int | float:
    """Return a number of steps (int), or a ratio of all steps (float in [0, 1]).

    "100" and 100 are steps; "0.1", 0.1 and "10%" are ratios. From 1 on, a number without % counts steps.

    Raises: ValueError, saying what it must be.
    """
    wanted = "must be a whole number of steps, a ratio below 1 or a percentage up to 100%"
    text = str(raw).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(wanted) from None
    if text.endswith("%"):
        if not 0 <= number <= 100:
            raise ValueError(wanted)
        return number / 100
    if not math.isfinite(number) or number < 0 or (number >= 1 and not number.is_integer()):
        raise ValueError(wanted)
    return int(number) if number.is_integer() else number


def read_range(value: Any) -> tuple[float, float]:
    """Return (least, most) of [0.5, 1.0] or "0.5,1.0"; ValueError says what was expected."""
    expected = 'two numbers above 0, the smaller first, like [0.5, 1.0] or "0.5,1.0"'
    try:
        numbers = [float(end) for end in (value.split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < float("inf"):
        raise ValueError(expected)
    return numbers[0], numbers[1]


def _convert_one(declared: Declared, raw: Any, where: str) -> Any:
    try:
        if declared.parse is not None:
            return declared.parse(raw)
        return _READERS[declared.element](raw)
    except ValueError as error:
        raise OptionError(f"{where} {error}, got {_shown(raw)}.") from None


def _read_flag(raw: Any) -> bool:
    value = raw if isinstance(raw, bool) else TRUE_OR_FALSE.get(str(raw).lower())
    if value is None:
        raise ValueError("must be true or false")
    return value


def _read_int(raw: Any) -> int:
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, int | str) and not isinstance(raw, bool):
        try:
            return int(raw)
        except ValueError:
            pass
    raise ValueError("must be a whole number")


def _read_float(raw: Any) -> float:
    if isinstance(raw, int | float | str) and not isinstance(raw, bool):
        try:
            number = float(raw)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("must be a number")


def _read_text(raw: Any) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return str(raw)
    raise ValueError("must be a text")


def _shown(raw: Any) -> str:
    return {True: "true", False: "false"}[raw] if isinstance(raw, bool) else repr(raw)


_READERS: dict[type, Callable[[Any], Any]] = {
    bool: _read_flag,
    int: _read_int,
    float: _read_float,
    str: _read_text,
}
