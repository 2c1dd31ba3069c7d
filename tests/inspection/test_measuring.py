"""Measures of pixels: numbers worked out by hand."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library import mask_shaping
from library.dataset import geometry, images
from library.dataset.geometry import Transform
from library.inspection import measuring
from library.inspection.measuring import THIN
from library.masks import MaskShape, shrink, to_array

SIZE = (512, 384)
WHOLE = Transform(SIZE, SIZE, (0, 0), SIZE)
HALVED = Transform(SIZE, (256, 192), (0, 0), (256, 192))


def strokes_of(mask: np.ndarray, transform: Transform = WHOLE) -> measuring.Strokes | None:
    cut = geometry.apply(transform, mask)
    return measuring.strokes(cut, to_array(shrink(cut)), transform)


def hair(thickness: int) -> np.ndarray:
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[203 : 203 + thickness, 20:490] = 255
    return mask


@pytest.mark.parametrize("transform", [WHOLE, HALVED], ids=["as it is", "halved"])
@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_growing_thin_strokes_as_advised_lets_them_keep_their_weight(thickness, transform):
    found = strokes_of(hair(thickness), transform)
    assert found is not None
    assert found.share > 0.9
    grown = mask_shaping.shape(hair(thickness), MaskShape(dilate=found.dilate), SIZE)
    weights = to_array(shrink(geometry.apply(transform, grown)))
    assert float(np.median(weights.max(axis=0)[8:-8])) >= THIN
    assert strokes_of(grown, transform) is None


def test_the_edge_of_something_large_is_no_thin_stroke():
    mask = np.zeros(SIZE[::-1], np.uint8)
    cv2.ellipse(mask, (250, 190), (171, 97), 23, 0, 360, 255, -1)
    assert strokes_of(mask) is None
    assert strokes_of(np.zeros_like(mask)) is None
    assert strokes_of(np.full_like(mask, 255)) is None


def test_what_the_cut_leaves_out_is_told_as_a_share_of_what_is_white():
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[:, :256] = 255
    right = Transform(SIZE, SIZE, (128, 0), (384, 384))
    assert measuring.lost(mask, geometry.apply(right, mask), right) == pytest.approx(0.5)
    assert measuring.lost(mask * 0, geometry.apply(right, mask * 0), right) == 0


@pytest.mark.parametrize("scale", [1, 3], ids=["coarse", "fine"])
def test_specks_of_both_colours_are_counted(scale):
    mask = np.zeros((200 * scale, 300 * scale), np.uint8)
    mask[:, 150 * scale :] = 255
    for number in range(7):
        place = slice(20 + 20 * number, 20 + 20 * number + scale)
        mask[place, 30 : 30 + scale] = 255
        mask[place, -30:-29] = 0
    assert measuring.specks(mask) == 14


def test_jpeg_leaves_what_png_does_not():
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    assert measuring.ringing(mask) == 0
    mask[:8, :8] = 250
    mask[-8:, -8:] = 9
    assert measuring.ringing(mask) == 2 * 64 / 4096


def test_labels_that_a_table_does_not_list_are_told_with_their_share():
    numbers = np.zeros((10, 10), np.uint8)
    numbers[:2], numbers[2:5] = 7, 1
    image = Image.fromarray(numbers)
    unlisted, listed = measuring.label_shares(image, {"1": 1.0, "9": 0.5})
    assert dict(unlisted) == {"7": pytest.approx(0.2)}
    assert listed == {"1"}
    assert measuring.label_shares(image, {"1": 1.0, "other": 0.5})[0] == ()


def test_the_same_picture_is_alike_whatever_its_size_and_format_and_another_is_not():
    random = np.random.default_rng(3)
    coarse = random.integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    first, second = (cv2.resize(each, SIZE, interpolation=cv2.INTER_CUBIC) for each in coarse)
    small = cv2.resize(first, (300, 225), interpolation=cv2.INTER_AREA)
    packed = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    profiles, bits = zip(*(measuring.likeness(each, None) for each in (first, packed, second)), strict=True)
    assert profiles[0] @ profiles[1] > 0.99
    assert (bits[0] != bits[1]).mean() < 0.05
    assert profiles[0] @ profiles[2] < 0.9
    assert measuring.likeness(np.full_like(first, 90), None)[0] is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "JPEG", "BMP"])
def test_masks_of_every_mode_can_be_measured(mode, format_name):
    written = io.BytesIO()
    try:
        Image.new(mode, (40, 32)).save(written, format_name)
    except (OSError, ValueError, KeyError):
        pytest.skip("there is no such file")
    image = images.open_mask(written.getvalue(), Path("mask"))
    unlisted, listed = measuring.label_shares(image, {"0": 1.0, "#000000": 1.0, "#ffffff": 1.0})  # 0 of CMYK
    assert unlisted == ()
    assert listed
    assert measuring.coloured(image) == 0
    assert measuring.transparency(image) in (None, (0, 0))
