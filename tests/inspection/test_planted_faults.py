"""Every kind of fault is found where it is planted, once, with a reason and a remedy; and none where there is none."""

import base64
import io
import json
from collections import Counter
from html import escape
from pathlib import Path

import pytest
from inspection import planted
from PIL import Image
from training.test_report import Page

from library.inspection.kinds import KINDS
from tools import check_dataset

ROOT = Path(__file__).resolve().parents[2]
CLEAN = sorted([*ROOT.glob("examples/masked_lora/dataset_*.toml"), *ROOT.glob("examples/sd*/dataset.toml")])
TWICE = {("mask-near-miss", "bird_mask.png"), ("mask-case", "case.png")}  # the masks that the images nearly have


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def expected(root) -> set[tuple[str, str]]:
    return planted.plant(root)


@pytest.fixture(scope="module")
def found(root, expected) -> list[dict]:
    argv = ["--dataset_config", str(root / "dataset.toml"), "--json", str(root / "out.json")]
    assert check_dataset.main([*argv, "--html", str(root / "out.html")]) == 1
    return json.loads((root / "out.json").read_text(encoding="utf-8"))["problems"]


def place(problem: dict) -> tuple[str, str]:
    return problem["code"], Path(problem["path"]).name


def test_each_planted_fault_is_found_by_its_code_and_its_file(found, expected):
    assert len({code for code, _ in expected}) >= 50
    assert expected - {place(each) for each in found} == set()


def test_no_fault_is_told_twice_and_nothing_else_is_found(found, expected):
    assert {place(each) for each in found} - expected - TWICE == set()
    assert max(Counter(place(each) for each in found).values()) == 1


def test_each_fault_has_the_severity_of_its_kind_a_reason_and_a_remedy(found):
    milder = {("caption-empty", "space.png")}  # than a file of no bytes, with which training does not start
    for each in found:
        assert each["reason"]
        assert each["remedy"]
        assert each["remedy"] not in each["reason"]
        if place(each) not in TWICE | milder:
            assert each["severity"] == KINDS[each["code"]].severity, each


def test_the_page_shows_every_finding_and_pictures_of_it(found, root):
    text = (root / "out.html").read_text(encoding="utf-8")
    page = Page(text)
    articles = {attributes["id"] for attributes in page.all("article")}
    assert articles == {each["code"] for each in found}
    for each in found:
        assert escape(each["remedy"]) in text
        assert escape(Path(each["path"]).name) in text
    assert {attributes["href"] for attributes in page.all("a")} == {f"#{code}" for code in articles}


def test_the_page_needs_nothing_but_itself(found, root):
    page = Page((root / "out.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "link", "iframe", "object", "base"} & tags
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    pictures = page.all("img")
    assert len(pictures) > 80
    for attributes in pictures:
        assert attributes["alt"]
        data = base64.b64decode(attributes["src"].removeprefix("data:image/webp;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (int(attributes["width"]), int(attributes["height"]))


@pytest.mark.parametrize("config", CLEAN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nothing_is_found_in_the_examples(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert check_dataset.main(["--dataset_config", str(config), "--full"]) == 0
    told = capsys.readouterr().out
    assert "problems: 0 errors, 0 warnings\n" in told
    assert ("SD 1.x and 2.x take multiples of 64" in told) == ("bucket_reso_steps = 32" in config.read_text("utf-8"))


def test_the_words_tell_the_worst_first_and_name_the_kind(root, expected, capsys):
    assert check_dataset.main(["--dataset_config", str(root / "dataset.toml"), "--full"]) == 1
    told = [line.strip().partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("]")]
    assert told == sorted(told, key=("error", "warning", "note").index)
    assert set(told) == {"error", "warning", "note"}


def test_without_a_look_at_the_pixels_what_needs_none_is_found(root, expected, capsys):
    assert check_dataset.main(["--dataset_config", str(root / "dataset.toml")]) == 1
    said = capsys.readouterr().out
    assert "--full, or --html FILE, looks at the pixels too" in said
    for code in ("mask-missing", "masks-unused", "caption-names-masked", "image-enlarged", "folder-level"):
        assert f"[{code}]" in said
    assert "[mask-empty]" not in said
