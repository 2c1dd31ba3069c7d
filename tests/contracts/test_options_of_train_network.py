"""Every option of sd-scripts' train_network.py works here, shown by tests, or is refused for a reason that is told.

The list is options_of_train_network.toml. A new option, one that is given up and a test that is renamed change it.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.errors import OptionError
from library.options.command_line import CONFIG_FILE, OUTPUT_CONFIG, read_command_line
from library.options.groups import all_declared
from library.options.reference import (
    GRANTED,
    IGNORED,
    IGNORED_BY_SCRIPT,
    OTHER_SCRIPTS,
    REFUSED,
    REFUSED_BY_SCRIPT,
    Elsewhere,
)
from library.options.toml import read_toml

TESTS = Path(__file__).resolve().parents[1]
LIST: dict[str, dict[str, Any]] = read_toml(Path(__file__).with_name("options_of_train_network.toml"))
REFERENCE = json.loads((TESTS / "data" / "options_train_network.json").read_text("utf-8"))
OF_SCRIPTS: dict[str, dict[str, dict[str, Any]]] = read_toml(Path(__file__).with_name("options_of_other_scripts.toml"))
WORKING = {name: row["works"] for name, row in LIST.items() if "works" in row}
GIVEN_UP = [(name, kind) for name, row in LIST.items() for kind in ("refused", "ignored") if kind in row]


@cache
def functions_of(file: str) -> frozenset[str]:
    """Return the names of a test file's functions."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def without_reader(name: str) -> Elsewhere:
    return next(each for each in (*REFUSED, *IGNORED) if each.name == name)


def given(name: str) -> list[str]:
    """Return the option on a command line, with another value than its default."""
    option = without_reader(name)
    value = {bool: (), int: (str((option.default or 0) + 1),), str: ("something",)}[option.element]
    return [f"--{name}", *value]


def read(*argv: str) -> tuple[str, ...]:
    """Return the warnings about a command line."""
    return read_command_line(argv, prog="train_network.py", description="").warnings


def test_every_option_has_its_row() -> None:
    assert set(LIST) == {*REFERENCE, *all_declared()} - set(OTHER_SCRIPTS)


def test_every_option_of_train_db_has_its_row() -> None:
    names = json.loads((TESTS / "data" / "options_train_db.json").read_text("utf-8"))
    assert set(names) <= {*LIST, *OF_SCRIPTS["train_db"]}


@pytest.mark.parametrize("script", sorted(OF_SCRIPTS))
def test_every_option_that_another_script_has_or_takes_otherwise_has_its_row(script: str) -> None:
    own = {name for name in all_declared() if script in OTHER_SCRIPTS.get(name, ((),))[0]}
    otherwise = {*REFUSED_BY_SCRIPT.get(script, {}), *IGNORED_BY_SCRIPT.get(script, {})}
    assert set(OF_SCRIPTS[script]) == own | otherwise


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, rows in OF_SCRIPTS.items() for name in rows])
def test_what_another_script_has_works_as_its_tests_show_or_is_given_up_in_the_words_of_the_list(
    script: str, name: str
) -> None:
    ((kind, told),) = OF_SCRIPTS[script][name].items()
    if kind == "works":
        assert name in all_declared()
        assert all(node.partition("::")[2] in functions_of(node.partition("::")[0]) for node in told)
    else:
        reasons = {"refused": REFUSED_BY_SCRIPT, "ignored": IGNORED_BY_SCRIPT}[kind]
        assert reasons[script][name] == told


@pytest.mark.parametrize("name", LIST)
def test_an_option_works_or_is_refused_or_ignored(name: str) -> None:
    (kind,) = LIST[name]
    assert kind in ("works", "refused", "ignored")
    assert LIST[name][kind]


@pytest.mark.parametrize("name", WORKING)
def test_what_works_has_a_reader(name: str) -> None:
    always_done = {each.name for each in GRANTED}
    assert name in {*all_declared(), CONFIG_FILE.name, OUTPUT_CONFIG.name, *always_done}


@pytest.mark.parametrize("name", WORKING)
def test_the_tests_of_what_works_exist_and_one_of_their_files_names_the_option(name: str) -> None:
    files = []
    for node in WORKING[name]:
        file, _, function = node.partition("::")
        assert function.startswith("test_")
        assert function in functions_of(file), node
        files.append((TESTS / file).read_text(encoding="utf-8"))
    assert any(re.search(rf"\b{name}\b", text) for text in files)


@pytest.mark.parametrize(("name", "kind"), GIVEN_UP)
def test_what_does_not_work_says_so_in_the_words_of_the_list(name: str, kind: str) -> None:
    reason = LIST[name][kind]
    if kind == "ignored":
        assert read(*given(name)) == (f"--{name} has no effect: {reason}",)
        return
    with pytest.raises(OptionError) as refusal:
        read(*given(name))
    assert str(refusal.value) == f"--{name} cannot be used: {reason}. Leave it out."


def test_all_that_has_no_reader_is_in_the_list() -> None:
    assert {name for name, _ in GIVEN_UP} == {each.name for each in (*REFUSED, *IGNORED)}
