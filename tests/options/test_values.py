"""A value is read the same way from the command line and from TOML."""

import pytest

from library.errors import OptionError
from library.options.values import Bounds, Declared, check, convert, int_or_ratio

SEED = Declared("seed", int, None, "", is_optional=True, bounds=Bounds(min=0))
RATE = Declared("rate", float, 0.0, "", bounds=Bounds(min=0, below=1))
FLAG = Declared("flag", bool, False, "")
NAMES = Declared("names", str, None, "", is_optional=True, is_list=True)
RATES = Declared("rates", float, None, "", is_optional=True, is_list=True, bounds=Bounds(min=0))
KIND = Declared("kind", str, "l2", "", choices=("l1", "l2", "huber"))
SIZE = Declared("resolution", str, None, "", is_optional=True, joined_by=",")
WARMUP = Declared("warmup", int, 0, "", parse=int_or_ratio)


@pytest.mark.parametrize(
    ("option", "raw", "value"),
    [
        (SEED, "42", 42),
        (SEED, 42, 42),
        (SEED, 42.0, 42),
        (RATE, "0.5", 0.5),
        (RATE, 0, 0.0),
        (RATE, "1e-4", 1e-4),
        (FLAG, True, True),
        (FLAG, "false", False),
        (FLAG, 1, True),
        (NAMES, ["a=1", "b=2"], ("a=1", "b=2")),
        (NAMES, "a=1", ("a=1",)),
        (RATES, 1e-4, (1e-4,)),
        (RATES, ["1e-4", 0], (1e-4, 0.0)),
        (KIND, "huber", "huber"),
        (SIZE, 512, "512"),
        (SIZE, [768, 512], "768,512"),
        (WARMUP, "10%", 0.1),
    ],
)
def test_a_value_of_either_source_is_read_into_its_type(option: Declared, raw: object, value: object):
    read = convert(option, raw, "--x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(("option", "raw"), [(SEED, ""), (NAMES, []), (NAMES, ""), (SIZE, "")])
def test_an_empty_value_leaves_an_option_unset(option: Declared, raw: object):
    assert convert(option, raw, "--x") is None


@pytest.mark.parametrize(
    ("option", "raw", "message"),
    [
        (SEED, "many", "--x must be a whole number, got 'many'."),
        (SEED, "4.5", "--x must be a whole number, got '4.5'."),
        (SEED, 4.5, "--x must be a whole number, got 4.5."),
        (SEED, True, "--x must be a whole number, got true."),
        (SEED, float("inf"), "--x must be a whole number, got inf."),
        (SEED, -1, "--x must be at least 0, got -1."),
        (RATE, "1", "--x must be at least 0 and below 1, got 1.0."),
        (RATE, "nan", "--x must be a number, got 'nan'."),
        (RATE, False, "--x must be a number, got false."),
        (FLAG, "yes please", "--x must be true or false, got 'yes please'."),
        (SIZE, True, "--x must be a text, got true."),
        (KIND, ["l2"], "--x must be a text, got ['l2']."),
        (KIND, "hubert", "--x must be one of l1, l2, huber; got hubert. Did you mean huber?"),
        (RATES, ["0.1", "-1"], "--x must be at least 0, got -1.0."),
        (
            WARMUP,
            "1.5",
            "--x must be a whole number of steps, a ratio below 1 or a percentage up to 100%, got '1.5'.",
        ),
    ],
)
def test_a_wrong_value_says_what_it_must_be(option: Declared, raw: object, message: str):
    with pytest.raises(OptionError) as caught:
        convert(option, raw, "--x")
    assert str(caught.value) == message


def test_nothing_is_not_a_value_of_an_option_that_is_always_set():
    with pytest.raises(OptionError, match="--x must be a number, got nothing"):
        check(RATE, None, "--x")


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("0", 0), ("100", 100), (100, 100), (100.0, 100), ("1", 1), ("0.1", 0.1), (0.25, 0.25), ("10%", 0.1),
        ("0.5%", 0.005), ("100%", 1.0), ("0%", 0.0), (" 5 ", 5),
    ],
)  # fmt: skip
def test_steps_are_whole_and_ratios_are_fractions(raw: object, value: int | float):
    read = int_or_ratio(raw)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("raw", ["1.5", 1.5, "-1", "-10%", "101%", "ten", "", "nan", "inf", True])
def test_what_is_neither_steps_nor_a_ratio_is_refused(raw: object):
    with pytest.raises(ValueError, match="must be a whole number of steps"):
        int_or_ratio(raw)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Bounds(min=1), [1, 2], [0]),
        (Bounds(above=0), [0.1], [0, -1]),
        (Bounds(max=1), [1, -5], [1.1]),
        (Bounds(below=1), [0.9], [1, 2]),
        (Bounds(), [-1e9, 1e9], []),
    ],
)
def test_a_range_holds_what_it_says(bounds: Bounds, inside: list[float], outside: list[float]):
    assert [bounds.refusal(value) for value in inside] == [None] * len(inside)
    assert all(bounds.refusal(value) for value in outside)
