from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.images import decode_mask
from library.dataset.label_maps import weights_of
from library.errors import DataError

PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]  # black, red, green, blue
NUMBERS = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)


def with_palette():
    image = Image.fromarray(NUMBERS)
    image.putpalette(PALETTE)
    return image


def read(image, tmp_path, *labels):
    path = tmp_path / "m.png"
    image.save(path)
    return decode_mask(path.read_bytes(), path, tuple(sorted(labels))).tolist()


def test_numbers_of_a_palette_weigh_what_the_table_says(tmp_path):
    found = read(with_palette(), tmp_path, ("1", 1.0), ("2", 0.5))
    assert found == [[0, 255, 128], [0, 128, 255]]


def test_what_the_table_does_not_name_weighs_other(tmp_path):
    assert read(with_palette(), tmp_path, ("0", 0.0), ("other", 0.2)) == [[0, 51, 51], [51, 51, 51]]


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA"])
def test_colours_weigh_alike_with_and_without_a_palette(tmp_path, mode):
    found = read(with_palette().convert(mode), tmp_path, ("#ff0000", 1.0), ("#0000ff", 0.2))
    assert found == [[0, 255, 0], [51, 0, 255]]


def test_transparency_does_not_hide_a_label(tmp_path):
    image = with_palette()
    image.info["transparency"] = 1
    assert read(image, tmp_path, ("1", 1.0)) == [[0, 255, 0], [0, 0, 255]]
    clear = with_palette().convert("RGBA")
    clear.putalpha(0)
    assert read(clear, tmp_path, ("#ff0000", 1.0)) == [[0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB"])
def test_numbers_are_greys_where_there_is_no_palette(tmp_path, mode):
    grey = Image.fromarray(NUMBERS)
    assert read(grey.convert(mode), tmp_path, ("1", 1.0), ("3", 0.6)) == [[0, 255, 0], [153, 0, 255]]


def test_numbers_of_sixteen_and_of_one_bit_are_read_as_they_are(tmp_path):
    assert read(Image.fromarray(NUMBERS.astype(np.uint16)), tmp_path, ("3", 1.0)) == [[0, 0, 0], [255, 0, 0]]
    assert read(Image.fromarray(NUMBERS > 1), tmp_path, ("1", 1.0)) == [[0, 0, 255], [255, 255, 0]]


def test_the_number_decides_where_its_colour_is_named_too(tmp_path):
    found = read(with_palette(), tmp_path, ("1", 0.2), ("#ff0000", 1.0), ("#00ff00", 1.0))
    assert found == [[0, 51, 255], [0, 255, 51]]


def test_a_map_that_is_stored_on_its_side_is_turned(tmp_path):
    path = tmp_path / "m.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    with_palette().save(path, exif=exif)
    assert decode_mask(path.read_bytes(), path, (("1", 1.0),)).tolist() == [[0, 0], [0, 255], [255, 0]]


def test_numbers_in_a_coloured_picture_are_an_error_that_says_what_to_write():
    with pytest.raises(DataError, match=r'm\.png: has neither a palette nor greys.*"#ff0000"'):
        weights_of(with_palette().convert("RGB"), (("1", 1.0),), Path("m.png"))


def test_colours_in_a_coloured_picture_go_with_numbers_for_others(tmp_path):
    assert read(with_palette().convert("RGB"), tmp_path, ("1", 1.0), ("#00ff00", 1.0)) == [[0, 0, 255], [0, 255, 0]]
