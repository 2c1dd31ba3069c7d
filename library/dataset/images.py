"""Image files to pixels, read alike for training, caching and checking; no torch in here."""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from library import isolation, mask_shaping
from library.dataset import geometry, label_maps, looks, placement
from library.dataset.geometry import Box, Pixels, Size, Transform
from library.dataset.label_maps import Labels
from library.errors import DataError
from library.masks import MaskSource, Sums, shrink, to_array

if TYPE_CHECKING:
    from library.dataset.looks import Look
    from library.dataset.scan import Sample
    from library.isolation import Fill

ORIENTATION = 0x0112  # the EXIF tag
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Decoded:
    """The pixels of one file as seen: its EXIF orientation applied."""

    rgb: Pixels  # (H, W, 3) uint8; colours under transparent pixels are kept
    alpha: Pixels | None  # (H, W) uint8; None if the file has no transparency, or it was not wanted


@dataclass(frozen=True)
class Given:
    """One picture as a class of the user's gives it."""

    image: Decoded  # its mask in place of transparency
    captions: tuple[str, ...]  # lines, one unless wildcards are on
    transform: Transform  # into the bucket, cut in the middle
    weight: float  # of its loss
    has_mask: bool  # which may be None, for a picture that is learnt whole
    region: Box | None = None  # that its mask lets be learnt, in its pixels, where that is asked for


def of_sample(sample: Sample, *, seed: str = "") -> tuple[Decoded, Sample, float]:
    """Return a sample's pixels, the sample as these show it to be, and the weight of its loss.

    A class of the user's tells caption and size only with the picture; of other samples both are known before.

    Args:
        sample: in a file, or of a class.
        seed: of what a class draws.

    Raises: DataError.
    """
    if sample.give is None:
        return read_image(sample.path, want_alpha=sample.mask.kind == "alpha"), sample, 1.0
    given = sample.give(seed)
    if given.transform.target != sample.transform.target:
        raise DataError(f"{sample.path}: its image is not as large as the size() of its class says.")
    if given.has_mask and sample.mask.kind in ("none", "padding"):
        raise DataError(f'{sample.path}: has a mask, and the first picture has none. Let that have "mask": None.')
    shown = replace(sample, captions=given.captions, transform=given.transform, region=given.region)
    return given.image, shown, given.weight


def read_image(path: Path, *, want_alpha: bool) -> Decoded:
    """Return the pixels of an image file.

    Raises: DataError naming the file, if it is missing, no image, or damaged.
    """
    return decode(read_bytes(path), path, want_alpha=want_alpha)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds. Raises: DataError naming the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def decode(data: bytes, path: Path, *, want_alpha: bool) -> Decoded:
    """Return the pixels of an image file's bytes; path is for messages. Raises: DataError."""
    if _is_plain_png(data):
        return _decode_plain_png(data, path, want_alpha)
    try:
        with Image.open(io.BytesIO(data)) as file:
            _widen_key(file, data)
            image = _upright(file)
            if image.mode.startswith("I") or image.mode == "F":
                grey = _grey_8_bit(image, path)
                return Decoded(np.dstack((grey, grey, grey)), _alpha_of_grey(image) if want_alpha else None)
            if not image.has_transparency_data:
                return Decoded(np.asarray(image.convert("RGB")), None)
            rgba = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    return Decoded(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3]) if want_alpha else None)


def read_mask(path: Path) -> Pixels:
    """Return a mask file as (H, W) uint8: white 255 is learnt, black 0 is not, grey in between in proportion.

    As sd-scripts the red channel counts, after palettes and greys have become RGB; transparency is ignored. Sixteen
    bits are scaled down to eight (65535 is white), where sd-scripts clips them.

    Raises: DataError naming the file.
    """
    return decode_mask(read_bytes(path), path)


def decode_mask(data: bytes, path: Path, labels: Labels = ()) -> Pixels:
    """Return a mask file's bytes as (H, W) uint8, see read_mask; of a label map if there are labels, see label_maps.

    Raises: DataError.
    """
    return mask_values(open_mask(data, path), path, labels)


def open_mask(data: bytes, path: Path) -> Image.Image:
    """Return a mask file's bytes as a picture of whatever mode, upright. Raises: DataError."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            return _upright(file)
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def mask_values(image: Image.Image, path: Path, labels: Labels = ()) -> Pixels:
    """Return a mask that has been opened as (H, W) uint8; see decode_mask. Raises: DataError."""
    if labels:
        return label_maps.weights_of(image, labels, path)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_8_bit(image, path)
    if image.mode in ("L", "LA"):
        return np.asarray(image.getchannel(0))
    if image.mode == "P":  # straight to RGB would warn about palettes with transparency
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB").getchannel(0))


def _upright(file: Image.Image) -> Image.Image:
    file.load()  # before asking for EXIF, which some formats keep behind the pixels
    if file.getexif().get(ORIENTATION, 1) == 1:
        return file
    return ImageOps.exif_transpose(file)


def _grey_8_bit(image: Image.Image, path: Path) -> Pixels:
    if image.mode == "F":
        raise DataError(f"{path}: has floating-point pixels. Save it with 8 or 16 bits a channel.")
    values = np.asarray(image).astype(np.int64)
    return ((values + 128) // 257).clip(0, 255).astype(np.uint8)  # 65535 = 255 * 257


def _widen_key(file: Image.Image, data: bytes) -> None:
    """Bring the transparent value of a grey PNG of 2 or 4 bits to the 8 bits to which Pillow brings its pixels."""
    if data[:8] != PNG_SIGNATURE or data[24] not in (2, 4) or data[25] != 0:  # bit depth, colour type
        return
    most, key = 2 ** data[24] - 1, file.info.get("transparency")
    if isinstance(key, int) and key <= most:  # not yet brought
        file.info["transparency"] = key * (255 // most)


def _alpha_of_grey(image: Image.Image) -> Pixels | None:
    """Return the transparency (H, W) of a grey of 16 bits, of which a PNG can name one value as transparent."""
    key = image.info.get("transparency")
    return None if key is None else np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(f"{path}: cannot be decoded ({reason}). Save it again, or take it out of the folder.")


def _is_plain_png(data: bytes) -> bool:
    """Return whether data is a PNG of 8-bit RGB or RGBA with no say on orientation or transparency elsewhere.

    OpenCV decodes those a sixth faster than Pillow and to the same bytes; all others need Pillow's care.
    """
    if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        return False
    if data[24] != 8 or data[25] not in (2, 6) or data[28] != 0:  # bit depth, colour type, interlace
        return False
    at = 33
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return True
        if kind in (b"eXIf", b"tRNS", b"acTL"):
            return False
        text = data[at + 8 : at + 40]
        if kind[1:] in (b"EXt", b"TXt") and text.startswith((b"XML:com.adobe.xmp", b"Raw profile type")):
            return False
        at += length + 12
    return False  # cut short: Pillow says what is wrong


def _decode_plain_png(data: bytes, path: Path, want_alpha: bool) -> Decoded:
    is_rgba = data[25] == 6
    flags = cv2.IMREAD_UNCHANGED if is_rgba and want_alpha else cv2.IMREAD_COLOR
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # more pixels than OpenCV takes
        pixels = None
    if pixels is None:
        raise DataError(f"{path}: cannot be decoded (damaged PNG). Save it again, or take it out of the folder.")
    if pixels.shape[2] == 3:
        return Decoded(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8), None)
    colours = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), np.uint8)
    return Decoded(colours, np.asarray(cv2.extractChannel(pixels, 3), np.uint8))


def in_bucket(image: Decoded, transform: Transform, path: Path) -> Pixels:
    """Return the colours (h, w, 3) uint8 of an image as its bucket shows them.

    Raises: DataError if the file is not of the size that the transform was made for.
    """
    height, width = image.rgb.shape[:2]
    if (width, height) != transform.source:
        was = "x".join(map(str, transform.source))
        raise DataError(f"{path}: is {width}x{height} but was {was} when the dataset was read. Start again.")
    return geometry.apply(transform, image.rgb)


def mask_of(image: Decoded | None, source: MaskSource, size: Size, *, data: bytes | None = None) -> Pixels | None:
    """Return the mask (H, W) uint8 of an image, shaped, in the size of its file; None: it weighs 1 everywhere.

    Args:
        image: with the mask as its alpha channel where it brings its own, else not looked at.
        source: of the mask.
        size: width and height of the image as seen.
        data: what the mask file holds; None: it is read.

    Raises: DataError if the mask file cannot be read.
    """
    if source.kind == "file":
        assert source.path is not None
        held = read_bytes(source.path) if data is None else data
        pixels = decode_mask(held, source.path, source.shape.labels)
    elif source.kind in ("alpha", "own") and image is not None and image.alpha is not None:
        pixels = image.alpha
    else:
        return None
    return pixels if source.shape.is_plain else mask_shaping.shape(pixels, source.shape, size)


def shrunk(mask: Pixels | None, transform: Transform) -> Sums | None:
    """Return a mask (H, W) at latent size (h, w), cut as transform cuts its image; None: it weighs 1 everywhere.

    The canvas that a placed image leaves free weighs nothing, whether the image has a mask or none.
    """
    if mask is None:
        return None if transform.placement is None else shrink(geometry.coverage(transform))
    return shrink(geometry.apply(transform, mask))


def mask_in_bucket(image: Decoded | None, source: MaskSource, transform: Transform) -> Sums | None:
    """Return the shrunk mask (h, w) of an image; see mask_of and shrunk. Raises: DataError."""
    return shrunk(mask_of(image, source, transform.source), transform)


@dataclass(frozen=True)
class Seen:
    """A sample in its bucket, as training sees it."""

    pixels: Pixels  # (H, W, 3)
    mask: Sums | None  # (h, w); None: it weighs 1 everywhere


def see(image: Decoded, mask: Pixels | None, look: Look, path: Path) -> Seen:
    """Return an image under a look, what is masked out of it being filled as the look says.

    The fill is made at the image's own size, before anything is resized: no masked-out pixel touches another.

    Args:
        image: of the sample.
        mask: (H, W), see mask_of.
        look: one of the sample, perhaps with another cut.
        path: of the image, which names it.

    Raises: DataError if the file is not of the size that the look was made for.
    """
    if mask is not None and not look.fill.is_keep:
        grain = max(1, round(look.transform.source[0] / look.transform.resized[0]))
        image = replace(image, rgb=isolated(image.rgb, mask, look.fill, looks.seed_of(path), grain))
    pixels = in_bucket(image, look.transform, path)
    if look.transform.placement is not None:
        pixels = _on_canvas(pixels, mask, look, path)
    return Seen(pixels, shrunk(mask, look.transform))


def _on_canvas(pixels: Pixels, mask: Pixels | None, look: Look, path: Path) -> Pixels:
    """Return the colours (h, w, 3) of a placed image with the canvas that it leaves free filled as the look says.

    Its fill, too, is made only of what is not masked out; the picture's mean colour stands for keep.
    """
    coverage = geometry.coverage(look.transform)
    if coverage.min() == 255:
        return pixels
    if look.fill.is_keep:
        return placement.over_canvas(pixels, coverage, placement.mean_colour(pixels, coverage))
    shown = coverage if mask is None else geometry.apply(look.transform, mask)
    return isolation.fill(pixels, shown, look.fill, looks.seed_of(path))


def isolated(rgb: Pixels, mask: Pixels, fill: Fill, seed: str, grain: int = 1) -> Pixels:
    """Return colours (H, W, 3) that are filled where a mask is black, which may be a rescaled copy; see isolation."""
    height, width = rgb.shape[:2]
    if mask.shape != rgb.shape[:2]:
        is_smaller = mask.shape[0] < height
        method = cv2.INTER_NEAREST_EXACT if is_smaller else cv2.INTER_AREA
        mask = np.asarray(cv2.resize(mask, (width, height), interpolation=method), np.uint8)
    return isolation.fill(rgb, mask, fill, seed, grain)


def read_training_pixels(sample: Sample) -> Pixels:
    """Return what training sees of a sample in its first look, without augmentation: (h, w, 3) uint8.

    Raises: DataError.
    """
    image, sample, _ = of_sample(sample)
    look = looks.look_of(sample, 0)
    mask = None if look.fill.is_keep else mask_of(image, sample.mask, sample.transform.source)
    return see(image, mask, look, sample.path).pixels


def read_mask_weights(sample: Sample) -> npt.NDArray[np.float32] | None:
    """Return a sample's weights at latent size, without augmentation: (h, w) float32 in [0, 1]; None: 1 everywhere.

    Raises: DataError.
    """
    image = None
    if sample.mask.kind in ("alpha", "own"):
        image, sample, _ = of_sample(sample)
    sums = mask_in_bucket(image, sample.mask, looks.look_of(sample, 0).transform)
    return None if sums is None else to_array(sums)


def read_cover(sample: Sample) -> npt.NDArray[np.float32] | None:
    """Return how much of each latent cell the picture covers in its first look: (h, w) in [0, 1]; None: all of it.

    Raises: DataError.
    """
    if not sample.subset.random_placement:
        return None
    if sample.mask.kind == "own":  # a class may give its pictures in any size
        _, sample, _ = of_sample(sample)
    sums = shrunk(None, looks.look_of(sample, 0).transform)
    return None if sums is None else to_array(sums)


def augment_colour(pixels: Pixels, rng: random.Random) -> Pixels:
    """Return pixels (H, W, 3) uint8 with another hue or gamma in one case of three, else unchanged.

    As sd-scripts: either the hue turns by up to 8 of OpenCV's 180 steps, or the gamma lies between 0.95 and 1.05.
    """
    if rng.random() >= 0.33:
        return pixels
    if rng.random() < 0.5:
        turned = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        shift = rng.uniform(-8, 8)
        turned[..., 0] = np.rint(turned[..., 0] + shift).astype(np.int64) % 180
        return np.asarray(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB), np.uint8)
    table = np.rint((np.arange(256) / 255) ** rng.uniform(0.95, 1.05) * 255).astype(np.uint8)
    return table[pixels]
