"""Label maps: masks whose pixels name what they show, and a table that says what each of these weighs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from library.dataset.geometry import Pixels
from library.errors import DataError

Labels = tuple[tuple[str, float], ...]  # weights in [0, 1] by label
OTHER = "other"  # the label of all that the table does not name


def weights_of(image: Image.Image, labels: Labels, path: Path) -> Pixels:
    """Return a label map as a mask (H, W) uint8; what the table does not name weighs its "other", or nothing.

    A number is an entry of the palette, or a value of grey; a colour is one of the picture, palette or not. Where both
    name a pixel, the number decides.

    Args:
        image: upright, of any mode.
        labels: the table: ("1", 0.5), ("#ff0000", 1.0), ("other", 0.0).
        path: of the file, for messages.

    Raises: DataError for a picture without numbers where the table holds nothing else.
    """
    table = {label: round(weight * 255) for label, weight in labels}
    other = table.pop(OTHER, 0)
    by_number = {int(label): weight for label, weight in table.items() if not label.startswith("#")}
    by_colour = {int(label[1:], 16): weight for label, weight in table.items() if label.startswith("#")}
    numbers = _numbers(image)
    if numbers is None and by_number and not by_colour:
        raise DataError(
            f"{path}: has neither a palette nor greys, and mask_labels holds numbers. Save it with its palette, or "
            'write the labels as colours, like "#ff0000".'
        )
    weights = np.full((image.height, image.width), other, np.uint8)
    if by_colour:
        colours = _colours(image)
        for colour, weight in by_colour.items():
            weights[colours == colour] = weight
    if numbers is not None:
        for number, weight in by_number.items():
            weights[numbers == number] = weight
    return weights


def _numbers(image: Image.Image) -> npt.NDArray[np.int32] | None:
    """Return the entry of the palette, or the grey, of each pixel; None for a coloured picture without a palette."""
    if image.mode in ("P", "PA", "L", "LA"):
        return np.asarray(image.getchannel(0), np.int32)
    if image.mode == "1" or image.mode.startswith("I"):
        return np.asarray(image).astype(np.int32)
    colours = np.asarray(image.convert("RGB"))
    is_grey = (colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all()
    return colours[..., 0].astype(np.int32) if is_grey else None


def _colours(image: Image.Image) -> npt.NDArray[np.int32]:
    """Return the colour 0xrrggbb of each pixel, whatever its transparency."""
    if image.mode in ("P", "PA"):  # straight to RGB would warn about palettes with transparency
        image = image.convert("RGBA")
    elif image.mode.startswith("I") or image.mode == "F":
        image = image.convert("L")
    red, green, blue = (channel.astype(np.int32) for channel in np.moveaxis(np.asarray(image.convert("RGB")), 2, 0))
    return (red << 16) | (green << 8) | blue
