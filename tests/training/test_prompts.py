"""Prompt files: what is read from them, and what is said about mistakes in them."""

import json
from pathlib import Path

import pytest

from library.errors import DataError
from library.training.prompts import SamplePrompt, parse_line, read_prompts


def read(folder: Path, name: str, text: str) -> list[SamplePrompt]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def test_a_line_may_carry_every_flag_in_any_case() -> None:
    line = "a cat --n ugly, blurry --W 640 --h 384 --d 5 --S 20 --l 6.5 --ss euler_a"
    assert parse_line(line, "x:1") == SamplePrompt("a cat", "ugly, blurry", 640, 384, 20, 6.5, 5, "euler_a")


def test_a_plain_line_has_the_documented_defaults() -> None:
    assert parse_line("a cat", "x:1") == SamplePrompt("a cat", "", 512, 512, 30, 7.5, None, None)


def test_a_prompt_is_not_searched_for_flags() -> None:
    assert parse_line("d 5 foo, s 3 w 8", "x:1") == SamplePrompt("d 5 foo, s 3 w 8")


def test_dashes_that_begin_no_flag_stay_in_the_prompt() -> None:
    assert parse_line("a cat -- on a mat, well--known --d 1", "x:1").prompt == "a cat -- on a mat, well--known"


@pytest.mark.parametrize(("given", "used"), [("513", 512), ("519", 512), ("8", 64), ("0", 64)])
def test_sides_are_floored_to_multiples_of_eight_and_at_least_64(given: str, used: int) -> None:
    assert parse_line(f"a cat --w {given} --h {given}", "x:1") == SamplePrompt("a cat", width=used, height=used)


@pytest.mark.parametrize(("given", "used"), [("0", 1), ("5000", 1000), ("12", 12)])
def test_steps_are_between_one_and_a_thousand(given: str, used: int) -> None:
    assert parse_line(f"a cat --s {given}", "x:1").sample_steps == used


def test_empty_lines_and_comments_are_skipped(tmp_path: Path) -> None:
    prompts = read(tmp_path, "p.txt", "\n# a comment\n  # another\na cat\n\na dog --d 1\n")
    assert [prompt.prompt for prompt in prompts] == ["a cat", "a dog"]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# a comment\na cat", encoding="utf-8-sig")
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "p.txt")] == ["a cat"]


def test_toml_subsets_inherit_and_override(tmp_path: Path) -> None:
    text = """
[prompt]
width = 768
scale = 5
negative_prompt = "ugly"
[[prompt.subset]]
prompt = "a cat"
[[prompt.subset]]
prompt = "a dog"
width = 640
seed = 3
"""
    assert read(tmp_path, "p.toml", text) == [
        SamplePrompt("a cat", "ugly", width=768, scale=5.0),
        SamplePrompt("a dog", "ugly", width=640, scale=5.0, seed=3),
    ]


def test_a_toml_file_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, "p.toml", '[prompt]\nprompt = "a cat"\nseed = 1') == [SamplePrompt("a cat", seed=1)]


def test_json_holds_texts_and_objects(tmp_path: Path) -> None:
    entries = ["a cat --d 1", {"prompt": "a dog", "sample_steps": 10, "seed": None, "sample_sampler": "ddim"}]
    assert read(tmp_path, "p.json", json.dumps(entries)) == [
        SamplePrompt("a cat", seed=1),
        SamplePrompt("a dog", sample_steps=10, sample_sampler="ddim"),
    ]


def test_an_unknown_flag_is_named_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_line("a cat --steps 5 --d 1", "p.txt:4") == SamplePrompt("a cat", seed=1)
    assert "p.txt:4: --steps is unknown" in caplog.text


def test_an_unknown_key_is_named_with_the_nearest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path, "p.json", '[{"prompt": "a", "wdith": 8}]') == [SamplePrompt("a")]
    assert "wdith is an unknown key" in caplog.text
    assert "Did you mean width?" in caplog.text


def test_flags_for_other_models_are_named_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_line("a cat --g 3.5 --d 1", "p.txt:4") == SamplePrompt("a cat", seed=1)
    assert "p.txt:4: --g is for other models" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --w wide", r"p.txt:3: --w must be a whole number of pixels, got 'wide'"),
        ("a cat --d", r"p.txt:3: --d must be a whole number, got ''"),
        ("a cat --l nan", r"p.txt:3: --l must be a number, got 'nan'"),
    ],
)
def test_a_mistake_in_a_line_is_told_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "p.txt", f"a dog\n\n{line}\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '["a cat",\n}', r"p.json:2: not valid JSON"),
        ("p.json", '{"prompt": "a cat"}', r"must hold a list"),
        ("p.json", "[3]", r"prompt 1: must be a text or a table, got 3"),
        ("p.json", '["a", {"width": 512}]', r"prompt 2: the prompt is missing"),
        ("p.json", '[{"prompt": "a", "seed": true}]', r"seed must be a whole number, got True"),
        ("p.toml", "[prompt]\nprompt = a cat", r"not valid TOML: .*line 2"),
        ("p.toml", 'prompt = "a cat"', r"one table \[prompt\]"),
        ("p.toml", "[prompt.subset]\na = 1", r"two brackets"),
        ("p.txt", "# nothing\n", r"no prompt in it"),
        ("p.yaml", "a: 1", r"must end in .txt, .toml or .json"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.txt: there is no such file"):
        read_prompts(tmp_path / "gone.txt")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("Gem\xe4lde".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("ending", ["txt", "toml", "json"])
def test_a_prompt_that_names_no_size_has_the_familys(tmp_path, ending):
    texts = {
        "txt": "a cat\na dog --w 640",
        "toml": '[prompt]\nprompt = "a cat"\n[[prompt.subset]]\n[[prompt.subset]]\nwidth = 640',
        "json": '["a cat", {"prompt": "a dog", "width": 640}]',
    }
    (tmp_path / f"p.{ending}").write_text(texts[ending], encoding="utf-8")
    prompts = read_prompts(tmp_path / f"p.{ending}", 1024)
    assert [(prompt.width, prompt.height) for prompt in prompts] == [(1024, 1024), (640, 1024)]
