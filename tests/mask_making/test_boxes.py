import json
from pathlib import Path

import numpy as np
import pytest

from library.errors import OptionError
from library.mask_making import boxes
from library.mask_making.boxes import Box
from library.mask_making.pictures import Picture


def picture_of(name: str, width: int = 100, height: int = 50) -> Picture:
    return Picture(Path(name), name, np.zeros((height, width, 3), np.uint8), None)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        (Box(10, 20, 30, 5), (10, 20, 40, 25)),
        (Box(0.1, 0.2, 0.3, 0.1), (10, 10, 40, 15)),
        (Box(0, 0, 1, 1), (0, 0, 100, 50)),  # the whole picture, not a pixel
        (Box(-20, -10, 20, 10), (80, 40, 100, 50)),
        (Box(-0.25, 0.5, 0.25, 0.5), (75, 25, 100, 50)),
        (Box(10.4, 20.6, 2.2, 2.2), (10, 20, 13, 23)),  # all that it touches
        (Box(90, 40, 50, 50), (90, 40, 100, 50)),
    ],
)
def test_a_box_is_in_pixels_or_fractions_from_either_border(box, pixels):
    assert box.pixels(100, 50) == pixels


FORMS = {
    "objects.json": json.dumps([{"file": "a.jpg", "x": 1, "y": 2, "w": 3, "h": 4}]),
    "lists.json": json.dumps([["a.jpg", 1, 2, 3, 4]]),
    "by_name.json": json.dumps({"a.jpg": [[1, 2, 3, 4]]}),
    "one_by_name.json": json.dumps({"a.jpg": {"x": 1, "y": 2, "w": 3, "h": 4}}),
    "plain.csv": "a.jpg,1,2,3,4\n",
    "titled.csv": "\ufeffFile, W, H, X, Y\na.jpg, 3, 4, 1, 2\n",
    "semicolons.csv": "# of my detector\na.jpg;1;2;3;4\n\n",
    "tabs.txt": "a.jpg\t1\t2\t3\t4",
}


@pytest.mark.parametrize("name", FORMS)
def test_a_list_of_boxes_can_have_many_forms(tmp_path, name):
    assert boxes.read_boxes(write(tmp_path, name, FORMS[name])) == {"a.jpg": (Box(1, 2, 3, 4),)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "has no box in it"),
        ("a.csv", "a.jpg,1,2,3\n", r"line 1: is no box\. Each box is"),
        ("a.csv", "a.jpg,1,2,3,4\na.jpg,1,2,three,4\n", "line 2: x, y, w and h must be numbers, got 1, 2, three, 4"),
        ("a.csv", "a.jpg,1,2,0,4\n", "line 1: w and h must be above 0, got 0 and 4"),
        ("a.csv", "a.jpg,1,2,nan,4\n", "must be numbers"),
        ("a.json", "[", "is no JSON"),
        ("a.json", "[[1, 2, 3, 4]]", "box 1: is no box"),
        ("a.json", '[{"file": "a.jpg", "x": 1, "y": 2, "width": 3, "height": 4}]', "must be numbers, got 1, 2, None"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(OptionError, match=message):
        boxes.read_boxes(write(tmp_path, name, text))


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"gone\.csv: cannot be read \(No such file"):
        boxes.read_boxes(tmp_path / "gone.csv")


def test_a_picture_has_the_boxes_of_its_path_its_name_its_stem_and_of_all():
    listed = {name: (Box(number, 0, 9, 9),) for number, name in enumerate(("a/b.jpg", "b.jpg", "b", "*", "c.jpg"))}
    assert [box.x for box in boxes.boxes_of("a/b.jpg", listed)] == [0, 1, 2, 3]


@pytest.mark.parametrize("learn", [False, True])
def test_boxes_are_masked_out_or_learnt(learn):
    drawn = boxes.from_boxes(picture_of("a.jpg"), {"a.jpg": (Box(10, 20, 30, 5),)}, learn=learn)
    inside = drawn.mask[20:25, 10:40]
    assert (inside == (255 if learn else 0)).all()
    assert (drawn.mask == inside[0, 0]).sum() == 150
    assert not drawn.doubt


def test_a_picture_that_the_list_lacks_is_named_and_learnt_whole_or_not_at_all():
    for learn in (False, True):
        drawn = boxes.from_boxes(picture_of("b.jpg"), {"a.jpg": (Box(1, 1, 2, 2),)}, learn=learn)
        assert (drawn.mask == (0 if learn else 255)).all()
        assert drawn.doubt == "has no box in the list"


def test_a_box_outside_of_its_picture_is_doubted():
    drawn = boxes.from_boxes(picture_of("a.jpg"), {"*": (Box(200, 10, 20, 20), Box(0, 0, 9, 9))}, learn=False)
    assert drawn.doubt == "1 of its 2 boxes lie outside of it"


def test_names_in_the_list_that_no_picture_has_come_with_the_one_that_was_meant():
    listed = {name: (Box(1, 1, 2, 2),) for name in ("cat_01.jpg", "cat_1.jpg", "sub/dog", "*", "zebra.png")}
    unknown = boxes.unknown_names(listed, ["cat_01.jpg", "sub/dog.png"])
    assert unknown == ["cat_1.jpg (is cat_01.jpg meant?)", "zebra.png"]
