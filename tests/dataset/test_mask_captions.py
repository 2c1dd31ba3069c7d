"""Captions of masked images: tags that are left out, and caption files beside masks."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dataset.pictures import ALPHA, sample_of, save_picture
from PIL import Image

from library.dataset import captions, mask_captions
from library.dataset.captions import NO_TAGS
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.loader import DrawnImages, LoaderSettings
from library.dataset.own_class import scan_class
from library.dataset.plan import Draw
from library.dataset.scan import NO_MASK, scan
from library.dataset.schema import SUBSET_KEYS
from library.dataset.summary import describe, tag_frequency
from library.dataset.texts import captions_of
from library.masks import MaskSource

PLAIN = SubsetConfig(Path("photos"), caption_extension=".txt")
HAT = frozenset({"hat"})
MASK = MaskSource("file", Path("masks/a.png"))


def compose(caption: str, seed: int = 0, *, left_out: frozenset[str] = HAT, step: int = 0, **options) -> str:
    subset = replace(PLAIN, **options)
    lines = caption.split("\n") if subset.enable_wildcard else [caption]
    return captions.compose(
        lines, subset, random.Random(seed), epoch=1, step=step, max_train_steps=10, left_out=left_out
    )


# ---- tags that are left out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("girl, hat, blue eyes", "girl, blue eyes"),
        ("hat, girl", "girl"),
        ("girl,hat", "girl"),
        ("girl,  HAT ,blue", "girl,blue"),
        ("hat", ""),
        ("hat, hat", ""),
        ("straw hat, hat trick, hats", "straw hat, hat trick, hats"),
        (" girl , blue ", " girl , blue "),  # nothing to leave out: as it is written
        ("", ""),
    ],
)
def test_a_tag_is_left_out_where_it_stands_alone_whatever_its_case(caption, expected):
    assert compose(caption) == expected


def test_tags_of_many_words_and_other_letters_are_compared_without_regard_to_case():
    assert compose("Straße 7, Red Hat, girl", left_out=frozenset({"strasse 7", "red hat"})) == "girl"


@pytest.mark.parametrize(
    ("caption", "options", "expected"),
    [
        ("girl; hat; blue, green", {"caption_separator": ";"}, "girl; blue, green"),
        ("hat, girl, blue", {"keep_tokens": 1, "caption_tag_dropout_rate": 1.0}, ""),
        ("girl, hat, blue", {"keep_tokens": 2, "caption_tag_dropout_rate": 1.0}, "girl"),
        ("girl, hat ||| hat, blue ||| hat, end", {"keep_tokens_separator": "|||"}, "girl, blue, end"),
        ("girl;;;hat, blue;;;hat;;;red, hat;;;hat", {"secondary_separator": ";;;"}, "girl, blue,red"),
        ("girl", {"caption_prefix": "hat,", "caption_suffix": ", hat"}, "girl"),
        ("hat, girl", {"caption_prefix": "photo of"}, "photo of, girl"),
        ("girl, hat", {"caption_suffix": "on white"}, "girl, on white"),
        ("hat", {"caption_prefix": "best,", "caption_suffix": ", last"}, "best, last"),
        ("girl, {hat|hat}, blue", {"enable_wildcard": True}, "girl, blue"),
        ("girl, {a hat|a scarf}", {"enable_wildcard": True}, "girl, a scarf"),
    ],
)
def test_tags_are_left_out_together_with_every_other_setting_of_captions(caption, options, expected):
    seed = next(seed for seed in range(99) if random.Random(seed).random() > 0.5)  # draws the second of two
    assert compose(caption, seed, **options) == expected


SETTINGS = {
    "shuffled": {"shuffle_caption": True},
    "shuffled but the first": {"shuffle_caption": True, "keep_tokens": 1},
    "dropout of tags": {"caption_tag_dropout_rate": 0.4},
    "warm-up": {"token_warmup_step": 8, "step": 5},
    "dropout of captions": {"caption_dropout_rate": 0.5, "shuffle_caption": True},
    "wildcards": {"enable_wildcard": True, "shuffle_caption": True},
    "secondary": {"secondary_separator": ";;;", "shuffle_caption": True},
    "ends": {"caption_prefix": "a,", "caption_suffix": ", z", "shuffle_caption": True},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_leaving_tags_out_moves_no_draw_of_the_others(options):
    caption = "girl, hat, {red|blue}, Hat, one, two;;;three, four\nanother, hat, line"
    caption = caption if options.get("enable_wildcard") else caption.partition("\n")[0]
    for seed in range(40):
        whole = compose(caption, seed, left_out=NO_TAGS, **options).replace(";;;", ",")
        rest = compose(caption, seed, **options).replace(";;;", ",")
        kept = [tag.strip() for tag in whole.split(",") if tag.strip().lower() != "hat"]
        assert [tag.strip() for tag in rest.split(",")] == (kept or [""])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [(MASK, HAT), (ALPHA, HAT), (MaskSource("own"), HAT), (NO_MASK, NO_TAGS)],
    ids=["file", "alpha", "own", "none"],
)
def test_only_a_masked_image_loses_its_tags(mask, expected):
    sample = sample_of(Path("photos/a.png"), mask=mask, subset=replace(PLAIN, mask_drop_tags=("Hat",)))
    assert mask_captions.left_out(sample) == expected


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ({"3": 0.0}, {}, {"hat"}),
        ({"3": 0.5}, {}, set()),
        ({"1": 1.0}, {}, {"hat"}),  # what is not in the table weighs nothing
        ({"1": 1.0, "other": 0.2}, {}, set()),
        ({"3": 1.0}, {"mask_invert": True}, {"hat"}),
        ({"3": 0.0}, {"mask_invert": True}, set()),
    ],
)
def test_a_tag_with_a_label_is_left_out_while_the_label_weighs_nothing(labels, options, expected):
    subset = replace(PLAIN, mask_drop_tags=(("Hat", "3"),), mask_labels=tuple(labels.items()), **options)
    assert mask_captions.left_out(sample_of(Path("photos/a.png"), mask=MASK, subset=subset)) == expected


@pytest.mark.parametrize(
    "value", [{"hat": "red"}, {"hat": 256}, {"hat": True}, {" ": "1"}, ["hat", ""], "hat"], ids=repr
)
def test_tags_and_labels_that_cannot_be_are_refused(value):
    with pytest.raises(ValueError, match="a list of tags, or a table"):
        SUBSET_KEYS["mask_drop_tags"](value)


def test_tags_are_read_as_a_list_or_with_labels():
    assert SUBSET_KEYS["mask_drop_tags"]([" hat", "red hat "]) == ("hat", "red hat")
    assert SUBSET_KEYS["mask_drop_tags"]({"hat ": 3, "sky": "#00FF00"}) == (("hat", "3"), ("sky", "#00ff00"))


def test_a_transparency_has_no_labels_so_that_tags_with_labels_stay():
    subset = replace(PLAIN, mask_drop_tags=(("hat", "3"),), mask_labels=(("1", 1.0),))
    assert mask_captions.left_out(sample_of(Path("photos/a.png"), mask=ALPHA, subset=subset)) == NO_TAGS


# ---- where captions go -----------------------------------------------------------------------------------------


def of_probability(probability: float, **changes):
    subset = replace(PLAIN, mask_drop_tags=("hat",), unmasked_probability=probability)
    return sample_of(Path("photos/a.png"), mask=MASK, captions=("girl, hat",), subset=subset, **changes)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (of_probability(0), {"girl"}),
        (of_probability(0.3), {"girl", "girl, hat"}),
        (of_probability(1), {"girl, hat"}),
        (of_probability(0.3, is_validation=True), {"girl"}),
        (of_probability(1, is_validation=True), {"girl"}),
        (replace(of_probability(0.3), mask=NO_MASK), {"girl, hat"}),
    ],
    ids=["masked", "both", "unmasked", "validation", "validation of unmasked", "no mask"],
)
def test_the_text_cache_holds_each_caption_that_an_image_can_be_shown_with(sample, expected):
    assert set(captions_of([sample])) == expected


def test_the_frequency_of_tags_counts_those_that_are_trained():
    unmasked = replace(of_probability(0), mask=NO_MASK, captions=("hat, dog",))
    assert tag_frequency([of_probability(0), unmasked]) == {"photos": {"girl": 1, "hat": 1, "dog": 1}}
    assert tag_frequency([of_probability(0.3)]) == {"photos": {"girl": 1, "hat": 1}}


def captions_drawn(samples, epochs=range(1, 3)) -> list[str]:
    dataset = DrawnImages(samples, LoaderSettings(seed=1, max_train_steps=10))
    draws = [Draw(index, 0, epoch, 0) for epoch in epochs for index in range(len(samples))]
    return [dataset[(draw,)].captions[0] for draw in draws]


def test_a_batch_has_the_captions_without_what_is_masked_out(tmp_path):
    subset = replace(PLAIN, image_dir=tmp_path, mask_drop_tags=("hat",))
    path = save_picture(tmp_path / "a.png")
    masked, plain = (
        sample_of(path, mask=mask, subset=subset, captions=("girl, hat, dog",)) for mask in (ALPHA, NO_MASK)
    )
    assert captions_drawn([masked, plain], [1]) == ["girl, dog", "girl, hat, dog"]


def test_a_draw_without_its_mask_keeps_the_tags(tmp_path):
    subset = replace(PLAIN, image_dir=tmp_path, mask_drop_tags=("hat",), unmasked_probability=0.5)
    sample = sample_of(save_picture(tmp_path / "a.png"), subset=subset, captions=("girl, hat",))
    dataset = DrawnImages([sample], LoaderSettings(seed=1, max_train_steps=10))
    drawn = [dataset[(Draw(0, 0, epoch, 0),)] for epoch in range(20)]
    assert {(batch.masks is None, batch.captions[0]) for batch in drawn} == {(True, "girl, hat"), (False, "girl")}


OWN = """
import numpy as np

class Pictures:
    def __init__(self, *_):
        pass
    def __len__(self):
        return 2
    def __getitem__(self, index):
        mask = np.full((64, 64), 99, np.uint8) if index else None
        return {"image": np.zeros((64, 64, 3), np.uint8), "caption": "girl, hat", "mask": mask}
"""


def test_a_picture_of_a_class_keeps_its_tags_when_it_comes_without_a_mask(tmp_path, monkeypatch):
    (tmp_path / "pictures_of_a_test.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = DatasetConfig((64, 64), (replace(PLAIN, mask_drop_tags=("hat",)),))
    found = scan_class("pictures_of_a_test.Pictures", config, max_token_length=None, debug_dataset=False)
    assert captions_drawn(found.samples, [1]) == ["girl, hat", "girl"]


# ---- captions beside masks -------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> SubsetConfig:
    """Two pictures with captions, a folder with a mask for each, and beside one of them a caption."""
    for index, name in enumerate("ab"):
        save_picture(tmp_path / "photos" / f"{name}.png", seed=index, channels=3, size=(64, 64))
        (tmp_path / "photos" / f"{name}.txt").write_text(f"two people, {name}", encoding="utf-8")
        save_grey(tmp_path / "left" / f"{name}.png", 255)
    (tmp_path / "left" / "a.txt").write_text("{one|1} person\nleft\n", encoding="utf-8")
    return SubsetConfig(
        tmp_path / "photos", caption_extension=".txt", conditioning_data_dir=tmp_path / "left", mask_captions=True
    )


def save_grey(path: Path, value: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((64, 64), value, np.uint8)).save(path)
    return path


def scan_of(*subsets: SubsetConfig, **dataset):
    return scan([DatasetConfig((64, 64), subsets, **dataset)])


def warnings(found) -> list[str]:
    return [problem.message for problem in found.problems if problem.severity == "warning"]


def texts(found) -> list[tuple[str, ...]]:
    return [sample.captions for sample in found.samples]


def test_a_caption_beside_a_mask_replaces_that_of_its_image(photos):
    found = scan_of(photos)
    assert texts(found) == [("{one|1} person",), ("two people, b",)]
    assert not found.problems
    assert texts(scan_of(replace(photos, mask_captions=False))) == [("two people, a",), ("two people, b",)]


def test_lines_beside_a_mask_are_wildcards_as_those_beside_an_image(photos):
    assert texts(scan_of(replace(photos, enable_wildcard=True)))[0] == ("{one|1} person", "left")


def test_an_image_whose_only_caption_is_beside_its_mask_needs_no_other(photos):
    (photos.image_dir / "a.txt").unlink()
    found = scan_of(photos)
    assert texts(found)[0] == ("{one|1} person",)
    assert not warnings(found)


def test_an_empty_caption_beside_a_mask_is_an_error(photos):
    caption = photos.conditioning_data_dir / "b.txt"
    caption.touch()
    assert [problem.message for problem in scan_of(photos).problems] == [
        f"{caption}: is empty. Write a caption, or delete the file."
    ]


def test_the_captions_of_a_metadata_file_are_replaced_too(photos):
    file = photos.image_dir / "list.json"
    file.write_text('{"a.png": {"caption": "from the list"}, "b.png": {"tags": "x, y"}}', encoding="utf-8")
    assert texts(scan_of(replace(photos, metadata_file=file))) == [("{one|1} person",), ("x, y",)]


def test_an_image_that_is_held_back_or_regularises_has_the_caption_beside_its_mask(photos):
    found = scan_of(replace(photos, validation_split=0.5))
    assert {sample.path.name: sample.captions for sample in found.samples + found.validation}["a.png"] == (
        "{one|1} person",
    )
    found = scan_of(replace(photos, mask_captions=False), replace(photos, index=1, is_reg=True))
    assert [sample.captions for sample in found.samples if sample.is_reg] == [("{one|1} person",), ("two people, b",)]


@pytest.mark.parametrize("is_cached", [False, True], ids=["decoded", "cached"])
def test_a_picture_in_two_subsets_has_two_masks_and_two_captions(photos, is_cached, tmp_path):
    from dataset.pictures import StubEncoder, settings_of

    from library.dataset.latents import build_store

    save_grey(tmp_path / "right" / "a.png", 51)
    (tmp_path / "right" / "a.txt").write_text("right", encoding="utf-8")
    other = replace(photos, index=1, conditioning_data_dir=tmp_path / "right", missing_mask="skip")
    samples = [sample for sample in scan_of(photos, other).samples if sample.path.name == "a.png"]
    store = build_store(samples, settings_of(), StubEncoder()) if is_cached else None
    dataset = DrawnImages(samples, LoaderSettings(seed=1, max_train_steps=10), store=store)
    batches = [dataset[(Draw(index, 0, 1, 0),)] for index in range(2)]
    assert [batch.captions for batch in batches] == [("{one|1} person",), ("right",)]
    assert [batch.masks.mean().item() for batch in batches] == pytest.approx([1.0, 0.2])


# ---- what finds nothing to act on ------------------------------------------------------------------------------


def test_a_tag_that_no_masked_image_has_is_told_with_the_nearest(photos):
    found = scan_of(replace(photos, mask_drop_tags=("two peple", "b", "zebra")))
    source = photos.image_dir
    assert warnings(found) == [
        f'{source}: mask_drop_tags has "two peple", which is a tag of no masked image. Did you mean two people?',
        f'{source}: mask_drop_tags has "zebra", which is a tag of no masked image.',
    ]


def test_tags_that_several_subsets_inherit_need_to_fit_only_one(photos):
    tagged = replace(photos, mask_drop_tags=("b",))
    bare = SubsetConfig(photos.image_dir, index=1, caption_extension=".txt", mask_drop_tags=("b",))
    assert not warnings(scan_of(tagged, bare))
    assert warnings(scan_of(bare)) == [
        "mask_drop_tags has no effect: none of the 2 images it is set for has a mask.",
    ]


def test_a_word_of_a_wildcard_counts_as_a_tag(photos):
    found = scan_of(replace(photos, enable_wildcard=True, mask_drop_tags=("one", "left", "b")))
    assert not warnings(found)


def test_tags_with_labels_need_the_weights_of_the_labels(photos):
    found = scan_of(replace(photos, mask_drop_tags=(("b", "3"),)))
    assert [problem.severity for problem in found.problems] == ["error"]
    assert "there is no mask_labels" in found.problems[0].message


def test_a_caption_of_which_nothing_is_left_is_told(photos):
    found = scan_of(replace(photos, mask_drop_tags=("two people", "b")))
    assert warnings(found) == [
        f"{photos.image_dir / 'b.png'}: its caption is empty without what mask_drop_tags leaves out."
    ]


def test_captions_beside_masks_that_are_not_there_are_told_with_the_ending_that_is(photos):
    found = scan_of(replace(photos, caption_extension=".caption", class_tokens="x"))
    assert warnings(found)[:1] == [
        f"mask_captions: none of the 2 masks of {photos.image_dir} has a .caption file beside it in "
        f'{photos.conditioning_data_dir}. There are .txt files: is caption_extension = ".txt" meant?'
    ]


def test_captions_beside_masks_without_mask_files_are_told(photos):
    found = scan_of(replace(photos, conditioning_data_dir=None))
    assert warnings(found) == ["mask_captions has no effect: none of the 2 images it is set for has a mask file."]


# ---- what files say --------------------------------------------------------------------------------------------


def test_the_description_of_a_subset_has_the_settings_of_masks_that_are_set(photos):
    changed = replace(
        photos, mask_drop_tags=(("hat", "3"),), mask_labels=(("3", 0.0),), mask_fill=("noise", "mean"), mask_feather=4.0
    )
    (described,) = describe([DatasetConfig((64, 64), (changed,))], [])
    plain = describe([DatasetConfig((64, 64), (PLAIN,))], [])[0]["subsets"][0]
    assert {key: value for key, value in described["subsets"][0].items() if key not in plain} == {
        "conditioning_data_dir": "left",
        "mask_captions": True,
        "mask_drop_tags": {"hat": "3"},
        "mask_labels": {"3": 0.0},
        "mask_fill": ["noise", "mean"],
        "mask_feather": 4.0,
    }
