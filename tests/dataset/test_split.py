"""Which images are held back: the same ones each time, and none of them trained on."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from library.dataset import plan, summary
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.scan import Sample, scan
from library.dataset.split import held_back


def images(count: int) -> list[Path]:
    return [Path(f"{i:03}.png") for i in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "number"), [(13, 0.3, 3), (10, 0.2, 2), (2, 0.3, 0), (1, 1.0, 1), (9, 0, 0)]
)
@pytest.mark.parametrize("seed", [None, 42])
def test_the_first_of_n_times_1_minus_share_rounded_up_are_trained_on(count, share, number, seed):
    assert len(held_back(images(count), share, seed)) == number


def test_a_seed_orders_as_sd_scripts_does():
    """Python's own generator, seeded alone, shuffles the sorted names; the last are held back."""
    order = images(13)
    random.Random(42).shuffle(order)
    assert held_back(images(13), 0.3, 42) == frozenset(order[10:])
    assert held_back(images(13), 0.3, 43) != held_back(images(13), 0.3, 42)


def test_without_a_seed_the_names_decide_wherever_the_folder_stands():
    names = {image.name for image in held_back([Path("b") / image for image in images(20)], 0.25, None)}
    assert names == {image.name for image in held_back([Path("a") / image for image in images(20)], 0.25, None)}
    assert names != {image.name for image in images(20)[15:]}


@given(st.integers(1, 60), st.integers(1, 10))
def test_a_new_image_moves_at_most_one_other_across_the_split(count, tenths):
    before, after = (held_back(images(number), tenths / 10, None) for number in (count, count + 1))
    assert len(before - after) <= 1
    assert len(after - before) <= 2


def draw(folder: Path, names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    return folder


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.path.name for sample in samples]


def test_what_is_held_back_has_one_repeat_and_regularisation_images_balance_the_rest(tmp_path):
    trained = SubsetConfig(draw(tmp_path / "a", "abcd"), class_tokens="x", num_repeats=3, validation_split=0.5)
    reg = SubsetConfig(draw(tmp_path / "r", "rs"), index=1, class_tokens="x", is_reg=True)
    config = DatasetConfig((64, 64), (trained, reg))
    found = scan([config])
    assert sorted(names(found.samples[:2]) + names(found.validation)) == ["a.png", "b.png", "c.png", "d.png"]
    assert [sample.num_repeats for sample in found.validation] == [1, 1]
    assert [sample.num_repeats for sample in found.samples] == [3, 3, 3, 3]
    assert not any(sample.is_reg for sample in found.validation)
    told = summary.lines([config], found.samples, found.validation)
    assert any("a: 2 images with 3 repeats, 2 held back, no masks" in line for line in told)
    assert "held back for validation: 2 images" in told


def test_an_image_held_back_in_one_data_set_is_trained_in_no_other(tmp_path):
    folder = draw(tmp_path / "a", "abcd")
    same = folder / ".." / "a"
    split = DatasetConfig((64, 64), (SubsetConfig(folder, class_tokens="x", validation_split=0.5),))
    found = scan([split, DatasetConfig((128, 128), (SubsetConfig(same, class_tokens="x"),))])
    assert len(found.samples) == 4
    assert not {*names(found.samples)} & {*names(found.validation)}
    said = [problem.message for problem in found.problems if problem.severity == "warning"]
    assert len(said) == 2
    assert "held back for validation in one subset, so no other trains on it" in said[0]


def test_a_link_to_an_image_that_is_held_back_is_not_trained_on(tmp_path):
    folder, links = draw(tmp_path / "a", "abcd"), tmp_path / "links"
    links.mkdir()
    for image in folder.iterdir():
        (links / f"linked_{image.name}").symlink_to(image)
    split = SubsetConfig(folder, class_tokens="x", validation_split=0.5)
    found = scan([DatasetConfig((64, 64), (split, SubsetConfig(links, index=1, class_tokens="x")))])
    held = names(found.validation)
    assert len(held) == 2
    assert len(found.samples) == 4
    assert not {f"linked_{name}" for name in held} & {*names(found.samples)}


def test_a_split_that_holds_nothing_back_is_said(tmp_path):
    config = SubsetConfig(draw(tmp_path / "a", "ab"), class_tokens="x", validation_split=0.1)
    found = scan([DatasetConfig((64, 64), (config,))])
    assert (len(found.samples), len(found.validation)) == (2, 0)
    assert "validation_split 0.1 holds back none of 2 images" in found.problems[0].message


def test_batches_of_validation_are_fixed_and_a_limit_spreads_over_them(tmp_path):
    subset = SubsetConfig(draw(tmp_path / "a", "abcdefgh"), class_tokens="x", validation_split=1.0)
    configs = [DatasetConfig((64, 64), (subset,), batch_size=2)]
    held = scan(configs).validation

    def batches(limit: int | None) -> list[list[int]]:
        made = plan.validation_batches(configs, held, first_index=10, limit=limit, step=5)
        return [[draw.sample for draw in batch] for batch in made]

    assert batches(None) == [[10, 11], [12, 13], [14, 15], [16, 17]]
    assert batches(2) == [[10, 11], [14, 15]]
    assert batches(9) == batches(None)
