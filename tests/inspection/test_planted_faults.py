"""Every kind of fault is found where it is planted, once, with a reason and a remedy; and none where there is none."""

import json
from pathlib import Path


import pytest
from inspection import planted

from library.inspection.kinds import KINDS
from tools import check_dataset


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, set[tuple[str, str]], list[dict]]:
    root = tmp_path_factory.mktemp("planted")
    expected = planted.plant(root)
    argv = ["--dataset_config", str(root / "dataset.toml"), "--json", str(root / "out.json")]
    assert check_dataset.main([*argv, "--html", str(root / "out.html")]) == 1
    return root, expected, json.loads((root / "out.json").read_text(encoding="utf-8"))["problems"]


def test_each_planted_fault_is_found_by_its_code_and_its_file(found):
    _, expected, problems = found
    assert len({code for code, _ in expected}) >= 25
    assert expected - {(each["code"], Path(each["path"]).name) for each in problems} == set()


def test_nothing_else_is_found(found):

    _, expected, problems = found
    for each in problems:
        if (each["code"], Path(each["path"]).name) not in expected:
            print(each["code"], Path(each["path"]).name, each["reason"][:150])
    assert {(each["code"], Path(each["path"]).name) for each in problems} - expected == set()
