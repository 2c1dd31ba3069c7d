"""The table of kinds: complete, stable in its codes, and the one that the guide shows."""

import ast
import re
from pathlib import Path

from library.inspection import inspect
from library.inspection.kinds import GROUPS, KINDS, found, reason_of, remedy_of

ROOT = Path(__file__).resolve().parents[2]
DYNAMIC = {"mask-", "image-"}  # starts of codes that are put together of two


def codes_in_the_code() -> set[str]:
    """Return every text in the sources of datasets and their inspection that looks like a code."""
    texts = set()
    for folder in ("library/dataset", "library/inspection", "tools"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "kinds.py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                texts |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str)}


def test_each_code_is_listed_once_and_written_in_small_letters_and_hyphens():
    codes = [kind.code for group in GROUPS.values() for kind in group]
    assert len(codes) == len(set(codes)) >= 70
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code) for code in codes)


def test_each_kind_is_found_by_some_code():
    made = {"image-unreadable", "mask-unreadable"}  # from what is read and "-unreadable"
    assert set(KINDS) - codes_in_the_code() - made == {"other"} - codes_in_the_code()


def test_each_problem_of_the_sources_has_a_kind():
    """Every call that makes a problem says its code, and the code is listed."""
    for folder in ("library/dataset", "library/inspection", "tools"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
                    has_code = len(node.args) > 4 or any(each.arg == "code" for each in node.keywords)
                    assert has_code, f"{path.name}, line {node.lineno}"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "found":
                    code = node.args[0]
                    assert not isinstance(code, ast.Constant) or code.value in KINDS, f"{path.name}, {node.lineno}"


def test_the_message_of_a_finding_is_path_reason_and_remedy():
    problem = found("mask-full", Path("a/b.png"), "is white.", remedy="Paint.")
    assert problem.message == "a/b.png: is white. Paint."
    assert (reason_of(problem), remedy_of(problem)) == ("is white.", "Paint.")
    assert remedy_of(found("mask-full", Path("b.png"), "is white.")) == KINDS["mask-full"].remedy


def test_what_is_told_of_a_file_for_another_reason_is_not_told_again():
    cut = found("image-cut", Path("a.png"), "60% is cut away.")
    lost = found("mask-cut-away", Path("m.png"), "90% lies outside.", files=(Path("a.png"),))
    other = found("image-cut", Path("b.png"), "60% is cut away.")
    assert inspect.once([cut, lost, other, other]) == [lost, other]


def test_the_guide_lists_every_kind():
    text = (ROOT / "docs" / "check-dataset.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| `[a-z]", line)]
    assert rows == [f"| `{each.code}` | {each.severity} | {each.title} | {each.remedy} |" for each in KINDS.values()]
