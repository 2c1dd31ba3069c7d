"""The fine-tuning kind of subset: what a metadata file may say, and what becomes of it in a scan."""

import json
from pathlib import Path

import pytest
from PIL import Image

from library.dataset import metadata_file
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.problems import raise_errors
from library.dataset.scan import Scan, scan
from library.dataset.summary import describe, lines
from library.errors import DataError
from library.masks import MaskSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def save(path: Path, size=(96, 64), mode="RGB", orientation=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new(mode, size).save(path, exif=exif)
    return path


def write(folder: Path, content, name="meta.json", **keys) -> SubsetConfig:
    """Write a metadata file, JSON or JSONL by its name; return its subset."""
    file = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    if not isinstance(content, str) and name.endswith("l"):
        text = "\n".join(json.dumps(entry) for entry in content)
    file.write_text(text, encoding="utf-8")
    return SubsetConfig(folder, metadata_file=file, **keys)


def scan_of(*subsets: SubsetConfig, **dataset) -> Scan:
    return scan([DatasetConfig((64, 64), subsets, **dataset)])


def captions_of(folder: Path, entry, **keys):
    subset = write(folder, {"a.png": entry}, **keys)
    (read,) = metadata_file.read(subset.source, subset).entries
    return read.captions


def messages(found: Scan, severity: str) -> list[str]:
    return [problem.message for problem in found.problems if problem.severity == severity]


# ---- captions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "keys", "expected"),
    [
        ({"caption": "a cat"}, {}, ("a cat",)),
        ({"tags": "cat, grey"}, {}, ("cat, grey",)),
        ({"caption": "a cat", "tags": "cat, grey"}, {}, ("a cat,cat, grey",)),
        ({"caption": "a cat", "tags": "cat"}, {"caption_separator": ";"}, ("a cat;cat",)),
        ({"caption": "", "tags": "cat"}, {}, ("cat",)),
        ({"caption": None, "tags": None}, {}, None),
        ({"caption": " ", "tags": "\n"}, {}, None),
        ({"caption": "a cat\na pet", "tags": "grey"}, {}, ("a cat,grey",)),
        ({"caption": "cat\n\npet", "tags": "grey\nold"}, {"enable_wildcard": True}, ("cat,grey,old", "pet,grey,old")),
        ({"tags": "grey\nold"}, {"enable_wildcard": True}, ("grey,old",)),
        ({"caption": "a cat\na pet"}, {"enable_wildcard": True}, ("a cat", "a pet")),
    ],
)  # fmt: skip
def test_the_caption_is_caption_separator_tags(folder, entry, keys, expected):
    assert captions_of(folder, entry, **keys) == expected


def test_half_a_character_in_a_caption_is_no_reason_to_stop(folder):
    assert captions_of(folder, {"caption": "a cat \ud83d\ude00 \ud83d"}) == ("a cat \U0001f600 \ufffd",)


def test_an_entry_without_text_gets_the_class_tokens_or_an_empty_caption_with_a_warning(folder):
    save(folder / "a.png")
    found = scan_of(write(folder, {"a.png": {}}, class_tokens="cat"))
    assert (found.samples[0].captions, found.problems) == (("cat",), ())
    found = scan_of(write(folder, {"a.png": {}}))
    assert found.samples[0].captions == ("",)
    (warning,) = messages(found, "warning")
    assert "1 of 1 images have no caption or tags and no class_tokens" in warning


# ---- files -----------------------------------------------------------------------------------------------------


def test_json_and_jsonl_say_the_same(folder):
    save(folder / "a.png"), save(folder / "sub" / "b.png")
    entries = {"a.png": {"caption": "one"}, "sub/b.png": {"tags": "two", "image_size": [96, 64]}}
    as_lines = [{"image_path": name, **entry} for name, entry in entries.items()]
    both = [scan_of(write(folder, entries)), scan_of(write(folder, as_lines, "meta.jsonl"))]
    seen = [[(sample.path, sample.captions) for sample in found.samples] for found in both]
    assert seen[0] == seen[1] == [(folder / "a.png", ("one",)), (folder / "sub" / "b.png", ("two",))]
    assert [found.problems for found in both] == [(), ()]


def test_only_the_listed_images_are_used_in_the_order_of_the_file(folder):
    for name in ("a", "b", "c"):
        save(folder / f"{name}.png")
    found = scan_of(write(folder, {"c.png": {"caption": "3"}, "a.png": {"caption": "1"}}))
    assert [sample.path.name for sample in found.samples] == ["c.png", "a.png"]


def test_an_absolute_name_needs_no_image_dir(folder, tmp_path_factory):
    image = save(tmp_path_factory.mktemp("elsewhere") / "a.png")
    assert scan_of(write(folder, {str(image): {"caption": "a"}})).samples[0].path == image


def test_the_same_name_in_two_subsets_is_two_images(folder):
    subsets = []
    for number in (1, 2):
        save(folder / str(number) / "a.png")
        subsets.append(write(folder / str(number), {"a.png": {"caption": f"cat {number}"}}, index=number - 1))
    assert [sample.captions for sample in scan_of(*subsets).samples] == [("cat 1",), ("cat 2",)]


def test_a_subset_of_each_kind_may_share_a_dataset(folder):
    for name in ("a", "b"):
        save(folder / f"{name}.png")
    plain = SubsetConfig(folder, index=1, class_tokens="cat")
    found = scan_of(write(folder, {"a.png": {"caption": "a"}}), plain)
    assert [sample.captions for sample in found.samples] == [("a",), ("cat",), ("cat",)]


def test_listed_images_can_be_regularisation_images(folder):
    save(folder / "a.png"), save(folder / "b.png")
    regular = write(folder, {"a.png": {"caption": "a"}}, num_repeats=4)
    others = write(folder, {"b.png": {"caption": "b"}}, "reg.json", is_reg=True, index=1)
    assert [(sample.is_reg, sample.num_repeats) for sample in scan_of(regular, others).samples] == [
        (False, 4),
        (True, 4),
    ]


def test_the_size_is_that_of_the_picture_whatever_image_size_says(folder):
    save(folder / "a.png", (96, 64))
    found = scan_of(write(folder, {"a.png": {"caption": "a", "image_size": [50, 50]}}))
    assert found.samples[0].transform.source == (96, 64)
    (warning,) = messages(found, "warning")
    assert "image_size of 1 images is not the file's own, which is used: a.png" in warning


def test_image_size_may_be_that_of_a_picture_lying_on_its_side(folder):
    save(folder / "a.jpg", (96, 64), orientation=6)
    assert scan_of(write(folder, {"a.jpg": {"caption": "a", "image_size": [96, 64]}})).problems == ()


# ---- masks -----------------------------------------------------------------------------------------------------


def test_mask_files_and_transparency_mask_listed_images(folder):
    save(folder / "a.png"), save(folder / "b.png", mode="RGBA")
    mask = save(folder / "masks" / "a.png", mode="L")
    entries = {name: {"caption": "x"} for name in ("a.png", "b.png")}
    found = scan_of(write(folder, entries, conditioning_data_dir=folder / "masks", alpha_mask=True))
    assert [sample.mask for sample in found.samples] == [MaskSource("file", mask), MaskSource("alpha")]


def test_a_listed_image_without_its_mask_is_an_error(folder):
    save(folder / "a.png")
    (folder / "masks").mkdir()
    found = scan_of(write(folder, {"a.png": {"caption": "x"}}, conditioning_data_dir=folder / "masks"))
    assert "has no mask in" in messages(found, "error")[0]


def nested(folder: Path, *masks: str) -> Scan:
    for name in ("one/a.png", "two/a.png"):
        save(folder / name)
    for name in masks:
        save(folder / "masks" / name, mode="L")
    entries = {name: {"caption": "x"} for name in ("one/a.png", "two/a.png")}
    return scan_of(write(folder, entries, conditioning_data_dir=folder / "masks"))


def test_images_of_one_name_have_their_masks_in_folders_of_the_same_names(folder):
    found = nested(folder, "one/a.png", "two/a.png")
    assert [sample.mask.path for sample in found.samples] == [folder / "masks" / f"{n}/a.png" for n in ("one", "two")]
    assert found.problems == ()


def test_an_image_outside_of_image_dir_is_never_taken_for_its_own_mask(folder):
    image = save(folder / "photos" / "cat.png")
    mask = save(folder / "masks" / "cat.png", mode="L")
    (folder / "list").mkdir()
    subset = write(folder / "list", {"../photos/cat.png": {"caption": "a"}}, conditioning_data_dir=folder / "masks")
    (sample,) = scan_of(subset).samples
    assert sample.path.samefile(image)
    assert sample.mask == MaskSource("file", mask)


def test_one_mask_for_images_of_one_name_in_two_folders_is_an_error(folder):
    (error,) = messages(nested(folder, "a.png"), "error")
    assert f"is the mask of {folder / 'one' / 'a.png'} as well as of {folder / 'two' / 'a.png'}" in error


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.json", '{"a.png": {"caption": "x"},\n "b.png": }', r"m\.json: line 2, column 11: is not valid JSON"),
        ("m.jsonl", '{"image_path": "a.png"}\n\n{"image_path": ', r"m\.jsonl: line 3, column 16: is not valid JSON"),
        ("m.json", "[]", r"must hold an object .*, not a list"),
        ("m.json", '{"a.png": "a cat"}', r'"a\.png": must be an object with "caption" or "tags", got \'a cat\''),
        ("m.json", '{"a.png": {"tags": ["x"]}}', r'"a\.png": tags must be a string, got \[\'x\'\]'),
        ("m.json", '{"a.png": {"image_size": "9x9"}}', r"image_size must be \[width, height\] in pixels, got '9x9'"),
        ("m.json", '{"a.png": {"image_size": [9, 0]}}', r"image_size must be \[width, height\]"),
        ("m.jsonl", '{"caption": "x"}', r'line 1: has no "image_path"'),
        ("m.jsonl", '["x"]', r'line 1: must be an object with "image_path"'),
        ("m.json", "{}", r"m\.json: lists no images"),
        ("m.json", '{"image_path": "a.png"}\n{"image_path": "b.png"}', r"must end in \.jsonl"),
        ("m.jsonl", '{\n"a.png": {"caption": "x"}}', r"must end in \.json\."),
        ("meta.json", '{"a.png": {"image_size": [' + "1" * 5000 + ", 1]}}", "a number is too long"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(folder, name, text, expected):
    found = scan_of(write(folder, text, name))
    with pytest.raises(DataError, match=expected) as error:
        raise_errors(found.problems)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(folder):
    found = scan_of(SubsetConfig(folder, metadata_file=folder / "absent.json"))
    assert "absent.json: cannot be read (No such file or directory)" in messages(found, "error")[0]


def test_a_file_that_is_not_utf8_is_refused(folder):
    (folder / "m.json").write_bytes(b'{"a.png": {"caption": "\xff"}}')
    found = scan_of(SubsetConfig(folder, metadata_file=folder / "m.json"))
    assert "is not UTF-8 (at byte 23)" in messages(found, "error")[0]


def test_a_listed_image_that_is_not_there_is_an_error_that_names_the_likely_one(folder):
    save(folder / "cat.png")
    found = scan_of(write(folder, {"cat": {"caption": "x"}}))
    (error,) = messages(found, "error")
    assert f"there is no image {folder / 'cat'} (is cat.png meant?)" in error
    assert f"Relative names start at {folder}" in error


def test_unknown_keys_of_all_entries_are_one_warning(folder):
    for name in "ab":
        save(folder / f"{name}.png")
    entries = {f"{name}.png": {"caption": "x", "train_resolution": [1, 1], "score": 3} for name in "ab"}
    assert messages(scan_of(write(folder, entries)), "warning") == [
        f"{folder / 'meta.json'}: keys of entries that have no effect: score, train_resolution."
    ]


def test_of_two_entries_of_one_image_the_last_counts_with_a_warning(folder):
    save(folder / "a.png")
    entries = [{"image_path": "a.png", "caption": "first"}, {"image_path": "./a.png", "caption": "last"}]
    found = scan_of(write(folder, entries, "m.jsonl"))
    assert [sample.captions for sample in found.samples] == [("last",)]
    assert "1 images are listed more than once, the last counts: a.png" in messages(found, "warning")[0]


# ---- summaries -------------------------------------------------------------------------------------------------


def test_the_description_names_the_metadata_file(folder):
    save(folder / "a.png")
    config = DatasetConfig((64, 64), (write(folder, {"a.png": {"caption": "Cat", "tags": "grey"}}),))
    samples = scan([config]).samples
    (described,) = describe([config], samples)
    assert described["is_dreambooth"] is False
    assert described["subsets"][0]["metadata_file"] == "meta.json"
    assert described["tag_frequency"] == {"meta.json": {"cat": 1, "grey": 1}}
    assert f"subset 0: {folder / 'meta.json'}: 1 image " in lines([config], samples)[1]
