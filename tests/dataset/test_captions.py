import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from library.dataset import captions
from library.dataset.config import SubsetConfig
from library.errors import DataError

DATA = Path(__file__).parents[1] / "data" / "dataset" / "captions.json.gz"
REFERENCE = json.loads(gzip.decompress(DATA.read_bytes()))
SUBSET = SubsetConfig(Path("dir"), caption_extension=".txt")


def compose(caption, seed=0, *, epoch=1, step=0, max_train_steps=100, rng=None, **options) -> str:
    subset = replace(SUBSET, **options)
    lines = [line.strip() for line in caption.split("\n")]
    lines = ([line for line in lines if line] or [""]) if subset.enable_wildcard else lines[:1]
    rng = rng or random.Random(seed)
    return captions.compose(lines, subset, rng, epoch=epoch, step=step, max_train_steps=max_train_steps)


@pytest.mark.parametrize("case", REFERENCE["deterministic"], ids=lambda case: json.dumps(case["options"]))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_does_not_depend_on_chance_is_the_reference_s(case, seed):
    steps = {key: case[key] for key in ("epoch", "step", "max_train_steps")}
    assert compose(case["caption"], seed, **steps, **case["options"]) == case["output"]


@pytest.mark.parametrize("case", REFERENCE["seeded"], ids=lambda case: f"{case['seed']}-{json.dumps(case['options'])}")
def test_one_generator_gives_the_reference_s_caption(case):
    assert compose(case["caption"], case["seed"], **case["options"]) == case["output"]


@pytest.mark.parametrize("case", REFERENCE["distributions"], ids=lambda case: case["caption"])
def test_many_draws_from_one_generator_are_the_reference_s(case):
    rng = random.Random(123)
    outcomes = Counter(compose(case["caption"], rng=rng, **case["options"]) for _ in range(case["n"]))
    assert outcomes == case["outcomes"]


@pytest.mark.parametrize(
    ("caption", "options", "expected"),
    [
        ("a,b,c,d,e,f", {"token_warmup_step": 80, "step": 40}, "a, b, c"),
        ("a,b,c,d,e,f", {"token_warmup_step": 80, "keep_tokens": 1}, "a, b"),
        ("x", {"caption_prefix": "p,", "caption_suffix": ", s"}, "p, x , s"),
        ("b;;;c", {"secondary_separator": ";;;"}, "b,c"),
        ("a", {"caption_dropout_every_n_epochs": 3, "epoch": 6}, ""),
    ],
)
def test_a_documented_example(caption, options, expected):
    assert compose(caption, **options) == expected


def test_a_blank_tag_is_shuffled_like_the_others():
    drawn = {compose("a,b ,, c", seed, shuffle_caption=True, keep_tokens=1) for seed in range(200)}
    assert "a, b, c, " in drawn
    assert len(drawn) == 6


def test_the_mark_of_kept_tags_never_stays_in_the_caption():
    assert compose("a, b ||| c ||| d", keep_tokens_separator="|||") == "a, b, c, d"


def test_an_absent_mark_leaves_the_caption_as_it_is_written():
    assert compose("a,b,c", keep_tokens_separator="|||") == "a,b,c"


def test_the_prefix_stands_before_every_line_of_a_caption():
    drawn = {compose("x\ny", seed, enable_wildcard=True, caption_prefix="p") for seed in range(50)}
    assert drawn == {"p x", "p y"}


@pytest.fixture
def image(tmp_path) -> Path:
    return tmp_path / "cat_1_2_3_4.png"


def test_the_caption_is_the_first_line_without_the_space_around_it(image):
    image.with_suffix(".txt").write_text("  a cat \nmore\n", encoding="utf-8")
    assert captions.read(image, SUBSET) == ("a cat",)


def test_with_wildcards_all_lines_that_are_not_blank_are_captions(image):
    image.with_suffix(".txt").write_text("a cat\n\n  a {red|blue} hat\r\n", encoding="utf-8")
    assert captions.read(image, replace(SUBSET, enable_wildcard=True)) == ("a cat", "a {red|blue} hat")


def test_a_byte_order_mark_is_no_part_of_the_caption(image):
    image.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa cat")
    assert captions.read(image, SUBSET) == ("a cat",)


def test_the_caption_may_lack_the_face_s_place_in_its_name(image):
    (image.parent / "cat.txt").write_text("a cat", encoding="utf-8")
    assert captions.read(image, SUBSET) == ("a cat",)


def test_a_name_with_dots_keeps_all_but_its_last_part(tmp_path):
    (tmp_path / "v1.5.txt").write_text("a cat", encoding="utf-8")
    assert captions.read(tmp_path / "v1.5.png", SUBSET) == ("a cat",)


def test_an_image_without_caption_file_has_none(image):
    assert captions.read(image, SUBSET) is None


def test_an_empty_caption_file_is_an_error(image):
    image.with_suffix(".txt").touch()
    with pytest.raises(DataError, match=r"cat_1_2_3_4\.txt: is empty"):
        captions.read(image, SUBSET)


def test_a_caption_that_is_not_utf_8_is_an_error(image):
    image.with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(at byte 3\)"):
        captions.read(image, SUBSET)
