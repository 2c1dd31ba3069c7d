import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from dataset import pictures
from PIL import Image, PngImagePlugin

from library.dataset.geometry import Transform
from library.dataset.images import (
    ORIENTATION,
    augment_colour,
    decode,
    in_bucket,
    mask_in_bucket,
    read_image,
    read_mask,
    read_mask_weights,
    read_training_pixels,
)
from library.errors import DataError
from library.masks import FULL, MaskSource


def pixels_of(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_rgba_keeps_the_colours_under_transparent_pixels(tmp_path):
    pixels = pixels_of(6, 9, 4)
    pixels[..., 3] = 0
    for name in ("a.png", "a.webp"):
        path = save(tmp_path / name, pixels, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
        image = read_image(path, want_alpha=True)
        assert (image.rgb == pixels[..., :3]).all()
        assert (image.alpha == 0).all()


def test_alpha_is_left_out_when_it_is_not_wanted(tmp_path):
    pixels = pixels_of(6, 9, 4)
    for name in ("a.png", "a.tif"):
        image = read_image(save(tmp_path / name, pixels), want_alpha=False)
        assert image.alpha is None
        assert (image.rgb == pixels[..., :3]).all()


def test_an_image_without_transparency_has_no_alpha(tmp_path):
    for mode in ("RGB", "L", "1", "P", "CMYK"):
        name = "a.tif" if mode == "CMYK" else "a.png"
        Image.fromarray(pixels_of(6, 9, 3)).convert(mode).save(tmp_path / name)
        image = read_image(tmp_path / name, want_alpha=True)
        assert image.alpha is None
        assert image.rgb.shape == (6, 9, 3)


@pytest.mark.parametrize("chunk", [b"", b"gAMA", b"sRGB", b"tEXt"])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_fast_png_reader_gives_pillows_bytes(chunk, channels):
    info = PngImagePlugin.PngInfo()
    if chunk:
        info.add(chunk, {b"gAMA": b"\0\0\xb1\x8f", b"sRGB": b"\0", b"tEXt": b"Title\0cat"}[chunk])
    pixels, file = pixels_of(33, 57, channels), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    image = decode(file.getvalue(), "a.png", want_alpha=True)
    assert (image.rgb == pixels[..., :3]).all()
    assert image.alpha is None if channels == 3 else (image.alpha == pixels[..., 3]).all()


def test_palette_transparency_is_honoured(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=bytes([0, 200]))
    read = read_image(tmp_path / "a.png", want_alpha=True)
    assert read.rgb[0, 0].tolist() == [255, 0, 0]
    assert read.rgb[1, 3].tolist() == [0, 255, 0]
    assert read.alpha.tolist() == [[0, 200, 200, 200], [200, 200, 200, 200]]


def test_a_transparent_colour_of_an_rgb_png_is_honoured(tmp_path):
    pixels = np.zeros((1, 2, 3), dtype=np.uint8)
    pixels[0, 1] = (10, 20, 30)
    save(tmp_path / "a.png", pixels, transparency=(10, 20, 30))
    assert read_image(tmp_path / "a.png", want_alpha=True).alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_transparent_value_of_a_grey_of_sixteen_bits_is_honoured(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[0, 1000, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=1000, exif=exif)
    assert read_image(tmp_path / "a.png", want_alpha=True).alpha.ravel().tolist() == [255, 0, 255]
    assert read_image(tmp_path / "a.png", want_alpha=False).alpha is None


@pytest.mark.parametrize(("depth", "row"), [(1, 0b01000000), (2, 0b00011011), (4, 0b00000001)])
def test_a_transparent_value_of_a_grey_of_few_bits_is_honoured(depth, row):
    """The second pixel of a row has the value 1, which is transparent."""
    width = 8 // depth
    header = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in (
        (b"IHDR", header),
        (b"tRNS", b"\0\1"),
        (b"IDAT", zlib.compress(bytes([0, row]))),
        (b"IEND", b""),
    ):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    alpha = decode(data, Path("a.png"), want_alpha=True).alpha
    assert alpha.tolist() == [[255, 0, *[255] * (width - 2)]]


def test_grey_with_alpha_is_honoured(tmp_path):
    save(tmp_path / "a.png", pixels_of(3, 4, 2))
    image = read_image(tmp_path / "a.png", want_alpha=True)
    assert (image.rgb == pixels_of(3, 4, 2)[..., :1]).all()
    assert (image.alpha == pixels_of(3, 4, 2)[..., 1]).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_image_and_mask(tmp_path, name, orientation):
    upright = pixels_of(5, 7, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    save(tmp_path / name, np.ascontiguousarray(turned), exif=exif, **({"lossless": True} if "webp" in name else {}))
    assert (read_image(tmp_path / name, want_alpha=False).rgb == upright).all()
    assert (read_mask(tmp_path / name) == upright[..., 0]).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 64 * 257, 65535, 128]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png").tolist() == [[0, 64, 255, 0]]
    assert read_image(tmp_path / "a.png", want_alpha=False).rgb[0, :, 1].tolist() == [0, 64, 255, 0]


def test_a_masks_red_channel_counts(tmp_path):
    for channels in (3, 4):
        pixels = pixels_of(4, 6, channels)
        assert (read_mask(save(tmp_path / "m.png", pixels)) == pixels[..., 0]).all()
    pixels = pixels_of(4, 6, 2)
    assert (read_mask(save(tmp_path / "m.png", pixels)) == pixels[..., 0]).all()
    Image.fromarray(pixels_of(4, 6, 3)).convert("1").save(tmp_path / "m.png")
    assert set(np.unique(read_mask(tmp_path / "m.png"))) <= {0, 255}


def test_a_mask_with_a_palette_is_read_by_its_colours(tmp_path):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([255, 0, 0, 90, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "m.png", transparency=bytes([0, 0]))
    assert read_mask(tmp_path / "m.png").tolist() == [[255, 90]]


def test_floating_point_pixels_are_refused_by_name(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "m.tif")
    for read in (read_mask, lambda path: read_image(path, want_alpha=False)):
        with pytest.raises(DataError, match=r"m\.tif: has floating-point pixels"):
            read(tmp_path / "m.tif")


def test_what_cannot_be_read_is_named(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(pixels_of(64, 64, 4)).save(whole, "PNG")
    flipped = bytearray(whole.getvalue())
    flipped[2000] ^= 0xFF
    broken = {
        "text.png": b"not an image at all",
        "empty.jpg": b"",
        "cut.png": whole.getvalue()[:3000],
        "flipped.png": bytes(flipped),
        "joined.png": whole.getvalue()[:3000] + whole.getvalue()[-12:],
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name, want_alpha=True)
        with pytest.raises(DataError, match=name):
            read_mask(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        read_image(tmp_path / "gone.png", want_alpha=True)


def sample_of(path, transform, mask):
    return pictures.sample_of(path, mask, transform=transform)


def test_a_file_and_alpha_of_the_same_shape_give_the_same_mask(tmp_path):
    pixels = pixels_of(40, 60, 4)
    image_path = save(tmp_path / "a.png", pixels)
    mask_path = save(tmp_path / "m.png", np.ascontiguousarray(pixels[..., 3]))
    transform = Transform((60, 40), (96, 64), (16, 0), (64, 64))
    by_alpha = read_mask_weights(sample_of(image_path, transform, MaskSource("alpha")))
    by_file = read_mask_weights(sample_of(image_path, transform, MaskSource("file", mask_path)))
    assert by_alpha.shape == (8, 8)
    assert by_alpha.dtype == np.float32
    assert (by_alpha == by_file).all()


def test_no_mask_and_no_transparency_weigh_one(tmp_path):
    path = save(tmp_path / "a.png", pixels_of(64, 64, 3))
    transform = Transform((64, 64), (64, 64), (0, 0), (64, 64))
    assert read_mask_weights(sample_of(path, transform, MaskSource("none"))) is None
    assert read_mask_weights(sample_of(path, transform, MaskSource("alpha"))) is None


def test_a_mask_of_another_size_covers_the_same_cut(tmp_path):
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[:, :15] = 255
    path = save(tmp_path / "m.png", mask)
    transform = Transform((120, 80), (120, 80), (28, 8), (64, 64), "nearest")
    image = decode_any(tmp_path, 80, 120)
    sums = mask_in_bucket(image, MaskSource("file", path), transform)
    assert (sums[:, :4] == FULL).all()  # 60 - 28 = 32 pixels = 4 cells of white
    assert (sums[:, 4:] == 0).all()


def decode_any(folder, height, width):
    return read_image(save(folder / "any.png", pixels_of(height, width, 3)), want_alpha=True)


def test_training_pixels_are_those_of_the_bucket(tmp_path):
    pixels = pixels_of(80, 120, 3)
    transform = Transform((120, 80), (120, 80), (28, 8), (64, 64))
    seen = read_training_pixels(sample_of(save(tmp_path / "a.png", pixels), transform, MaskSource("none")))
    assert (seen == pixels[8:72, 28:92]).all()


def test_an_image_that_changed_its_size_is_refused(tmp_path):
    path = save(tmp_path / "a.png", pixels_of(80, 120, 3))
    transform = Transform((100, 80), (100, 80), (0, 0), (64, 64))
    with pytest.raises(DataError, match=r"a\.png: is 120x80 but was 100x80"):
        in_bucket(read_image(path, want_alpha=False), transform, path)


def test_colour_augmentation_changes_a_third_of_the_draws_and_only_slightly():
    pixels = pixels_of(16, 16, 3)
    pixels = (pixels // 4 + 90).astype(np.uint8)
    changed = 0
    for seed in range(300):
        augmented = augment_colour(pixels, random.Random(seed))
        assert augmented.shape == pixels.shape
        assert augmented.dtype == np.uint8
        assert np.abs(augmented.astype(int) - pixels).max() < 40
        changed += bool((augmented != pixels).any())
    assert 60 < changed < 130
