"""The laws of the house that a program can check: sizes, names, and who may import whom."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("library", "networks", "tools", "tests", "examples", "benchmarks", "docs", ".ci")
GENERATED = {"__pycache__", "work", "output", ".hypothesis"}

FILE_CAP, LONG_FILE_CAP, FUNCTION_CAP = 400, 700, 80
FORBIDDEN_WORDS = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers"}

# A component imports from components of lower levels only; those of one level do not know each other.
LEVELS = {
    "library.errors": 0,
    "library.options": 1,
    "library.masks": 2,
    "library.isolation": 2,
    "library.noise": 2,
    "library.losses": 2,
    "library.batch": 2,
    "library.metadata": 2,
    "library.file_hashes": 2,
    "library.pages": 2,
    "library.progress": 2,
    "library.whole_file": 2,
    "library.mask_shaping": 3,
    "library.objectives": 3,
    "library.models": 4,
    "library.cache": 4,
    "library.dataset": 5,
    "networks": 5,
    "library.inspection": 6,
    "library.mask_making": 6,
    "library.training": 7,
    "library.cli": 8,
}
ENTRY_LEVEL = 9
# The only places in library/ that read a command line, set up logging or end the process.
COMMAND_LINE = {"library/cli.py", "library/options/declare.py"}


def files(*suffixes: str) -> list[Path]:
    """Return every file of the project with one of the suffixes, made ones left out, sorted."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in suffixes]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in suffixes]
    return sorted(path for path in found if not GENERATED & set(path.relative_to(ROOT).parts))


def sources() -> list[Path]:
    """Return every Python file of the project that is not a test."""
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] != "tests"]


def name_of(path: Path) -> str:
    """Return a path as it is written in messages: relative to the root, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of all that is imported, at the top, in functions, and for type checking alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def component_of(module: str) -> str | None:
    """Return the component that a dotted name belongs to, None for what is not ours."""
    parts = module.split(".")
    if parts[0] == "library" and len(parts) > 1:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in {"library", "networks", "tools"} else None


def test_no_file_is_longer_than_its_cap():
    too_long = {}
    for path in files(".py"):
        tests_or_tables = path.relative_to(ROOT).parts[0] == "tests" or "layout" in path.parts
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > (LONG_FILE_CAP if tests_or_tables else FILE_CAP):
            too_long[name_of(path)] = length
    assert not too_long


def test_no_function_is_longer_than_its_cap():
    too_long = {}
    for path in files(".py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_CAP:
                    too_long[f"{name_of(path)}:{node.name}"] = length
    assert not too_long


def test_no_module_has_a_name_that_says_nothing():
    assert not [name_of(path) for path in files(".py") if FORBIDDEN_WORDS & set(path.stem.lower().split("_"))]


def test_every_part_of_the_library_has_its_level():
    parts = {path.stem for path in (ROOT / "library").iterdir() if path.suffix == ".py" or path.is_dir()}
    parts -= {"__init__", "__pycache__"}
    assert {f"library.{part}" for part in parts} <= set(LEVELS)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_point_downwards(path: Path):
    own = component_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    own_level = LEVELS.get(own or "", ENTRY_LEVEL)
    if own == "networks" and has_command_line(path):
        own_level = ENTRY_LEVEL  # a thin command that lies where its users expect it
    wrong = []
    for module in imports(tree_of(path)):
        component = component_of(module)
        if component is None or component == own:
            continue
        if LEVELS.get(component, ENTRY_LEVEL) >= own_level:
            wrong.append(module)
    assert not wrong


def has_command_line(path: Path) -> bool:
    """Return whether a file is run as a command."""
    return 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


def test_options_and_errors_import_nothing_heavy():
    light = set(sys.stdlib_module_names) | {"library", "tomllib", "tomli"}  # tomllib: not yet in Python 3.10
    places = [ROOT / "library" / "errors.py", *sorted((ROOT / "library" / "options").glob("*.py"))]
    heavy = {name_of(path): {module.split(".")[0] for module in imports(tree_of(path))} - light for path in places}
    assert not {path: modules for path, modules in heavy.items() if modules}


def test_only_the_command_line_parses_arguments_sets_up_logging_or_exits():
    calls = re.compile(r"\b(import argparse|logging\.basicConfig|sys\.exit|raise SystemExit)\b")
    wrong = []
    for path in files(".py"):
        name = name_of(path)
        if name.split("/")[0] not in {"library", "networks"} or name in COMMAND_LINE or has_command_line(path):
            continue
        if calls.search(path.read_text(encoding="utf-8")):
            wrong.append(name)
    assert not wrong


def test_no_family_is_asked_for_by_name_outside_its_own_file():
    asked = re.compile(r"family\.name\s*(==|!=|in\b)|isinstance\([^)]*,\s*Sd\b")
    training = [path for path in sources() if path.relative_to(ROOT).parts[:2] == ("library", "training")]
    assert not [name_of(path) for path in training if asked.search(path.read_text(encoding="utf-8"))]


def test_no_file_names_a_place_on_one_machine():
    places = "|".join(("home", "root", "Users", "work", "tmp", "opt"))
    on_one_machine = re.compile(rf"(?<![\w.$}}\])*/-])/(?:{places})/\w|[A-Z]:\\Users\\")
    named = {}
    for path in files(".py", ".md", ".toml", ".txt", ".json", ".cfg", ""):
        found = on_one_machine.findall(path.read_text(encoding="utf-8"))
        if found:
            named[name_of(path)] = found
    assert not named
