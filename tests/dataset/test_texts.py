import random
from dataclasses import replace
from pathlib import Path

import pytest
from dataset.pictures import sample_of

from library.cache.entries import check_writable
from library.dataset import captions
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.texts import captions_of, places_of, refuse_uncacheable
from library.errors import DataError, OptionError

PLAIN = SubsetConfig(Path("images"))
SUBSETS = {
    "plain": PLAIN,
    "ends": replace(PLAIN, caption_prefix="art of", caption_suffix="on white"),
    "dropout": replace(PLAIN, caption_dropout_rate=0.5),
    "epochs": replace(PLAIN, caption_dropout_every_n_epochs=3),
    "wildcards": replace(PLAIN, enable_wildcard=True, caption_dropout_rate=0.1, caption_suffix="{x|y}"),
    "mark": replace(PLAIN, keep_tokens_separator="|||", secondary_separator=";;;"),
    "all": replace(PLAIN, enable_wildcard=True, keep_tokens_separator="|||", secondary_separator=";;;"),
}
LINES = ("a {red|green} {cat|dog|}, {{big}}", "tag ||| one, two;;;three ||| last", "a {cat}")


def drawn(subset: SubsetConfig) -> set[str]:
    lines = LINES if subset.enable_wildcard else LINES[1:2]
    return {
        captions.compose(lines, subset, random.Random(i), epoch=i, step=i, max_train_steps=9) for i in range(1, 3000)
    }


@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
def test_every_caption_that_can_be_drawn_is_known_and_no_other(subset):
    lines = LINES if subset.enable_wildcard else LINES[1:2]
    assert set(captions_of([sample_of(Path("images/a.png"), captions=lines, subset=subset)])) == drawn(subset)


def test_pictures_share_their_caption_which_goes_with_the_first():
    names = {"one/a.png": "a cat", "one/b.png": "a dog", "two/c.png": "a cat"}
    samples = [sample_of(Path(name), captions=(caption,)) for name, caption in names.items()]
    assert captions_of(samples) == {"a cat": Path("one"), "a dog": Path("one")}
    assert list(captions_of(reversed(samples)).values()) == [Path("two"), Path("one")]


def test_entries_stand_beside_the_first_image_or_in_the_cache_folder():
    folders = {("a cat",): Path("one"), ("a dog",): Path("two")}
    beside = places_of(folders, "sd", None)
    assert [place.parent for place in beside.values()] == [Path("one/text_sd"), Path("two/text_sd")]
    inside = places_of(folders, "sd", Path("cache"))
    assert {place.parent for place in inside.values()} == {Path("cache/text_sd")}
    assert [place.name for place in inside.values()] == [place.name for place in beside.values()]


def test_wildcards_without_end_are_refused_by_the_name_of_their_picture():
    lines = (" ".join(["{a|b|c|d}"] * 8),)
    sample = sample_of(Path("images/many.png"), captions=lines, subset=replace(PLAIN, enable_wildcard=True))
    with pytest.raises(DataError, match=r"many\.png.*1000"):
        captions_of([sample])


@pytest.mark.parametrize(
    ("name", "value"), [("shuffle_caption", True), ("token_warmup_step", 3), ("caption_tag_dropout_rate", 0.1)]
)
def test_what_makes_a_new_caption_at_each_draw_is_refused_by_name_and_folder(name, value):
    config = DatasetConfig((64, 64), (PLAIN, replace(PLAIN, image_dir=Path("other"), **{name: value})))
    with pytest.raises(OptionError, match=f"{name} is on for other"):
        refuse_uncacheable([config])


@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
def test_what_makes_some_captions_is_not_refused(subset):
    refuse_uncacheable([DatasetConfig((64, 64), (subset,))])


def test_a_folder_that_cannot_be_written_is_found_unless_it_has_all(tmp_path, monkeypatch):
    from library import whole_file

    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole_file, "check_writable", refuse)
    there = tmp_path / "text_sd" / "a.safetensors"
    there.parent.mkdir()
    there.touch()
    check_writable([there], "text cache")
    with pytest.raises(DataError, match="--cache_dir"):
        check_writable([there, there.with_name("b.safetensors")], "text cache")
