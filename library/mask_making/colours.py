"""Masks from what the pixels of a picture are: transparent, of one colour, or bright."""

from __future__ import annotations

import re

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ImageColor

from library.dataset.geometry import Pixels
from library.errors import OptionError
from library.mask_making.pictures import LEARNT, MASKED_OUT, Drawn, Picture

BORDER_SHARE = 100  # the border is a hundredth of the shorter side wide
BIN = 16  # levels of 256 in which border colours are counted
UNIFORM = 0.5  # of the border: with less in the key colour, there is hardly a flat background

Places = npt.NDArray[np.bool_]
Colour = tuple[int, int, int]  # red, green, blue in 0..255


def read_colour(text: str, flag: str) -> Colour:
    """Return a colour from '#ff00ff', 'ff00ff', '#f0f', '255,0,255' or a name. Raises: OptionError."""
    wanted = text.strip()
    if re.fullmatch(r"[0-9a-fA-F]{6}|[0-9a-fA-F]{3}", wanted):
        wanted = f"#{wanted}"
    elif re.fullmatch(r"\d+\s*,\s*\d+\s*,\s*\d+", wanted):
        numbers = [int(number) for number in wanted.split(",")]
        if max(numbers) <= 255:
            return numbers[0], numbers[1], numbers[2]
    try:
        colour = ImageColor.getrgb(wanted)
    except ValueError:
        raise OptionError(f"{flag}: {text!r} is no colour. Write '#ff00ff', 255,0,255 or a name like white.") from None
    return colour[0], colour[1], colour[2]


def from_alpha(picture: Picture) -> Drawn:
    """Return transparency as a mask, every grade of it kept."""
    if picture.alpha is None:
        return Drawn(np.full(picture.rgb.shape[:2], LEARNT, np.uint8), "has no transparency")
    return Drawn(picture.alpha)


def from_brightness(picture: Picture, threshold: int) -> Drawn:
    """Return a mask of what is at least as bright as threshold, 0..255, by the eye's weights of the colours."""
    grey = cv2.cvtColor(picture.rgb, cv2.COLOR_RGB2GRAY)
    return Drawn(np.where(grey >= threshold, LEARNT, MASKED_OUT).astype(np.uint8))


def from_colour(picture: Picture, colour: Colour | None, *, tolerance: int, learn: bool, connected: bool) -> Drawn:
    """Return a mask of what has a colour, or of all else.

    Args:
        picture: to be masked.
        colour: to look for; None takes the border's.
        tolerance: levels that each of red, green and blue may be off.
        learn: what has the colour is learnt; else it is masked out.
        connected: only what touches the border, over pixels that share a side, counts as of the colour.
    """
    doubt = ""
    if colour is None:
        colour, share = border_colour(picture.rgb, tolerance)
        if share < UNIFORM:
            hexadecimal = "#{:02x}{:02x}{:02x}".format(*colour)
            doubt = f"{share:.0%} of its border have one colour, {hexadecimal}"
    found = is_near(picture.rgb, colour, tolerance)
    if connected:
        found = touching_border(found)
    return Drawn(np.where(found == learn, LEARNT, MASKED_OUT).astype(np.uint8), doubt)


def is_near(rgb: Pixels, colour: Colour, tolerance: int) -> Places:
    """Return where each of red, green and blue is at most tolerance away from colour; rgb is (..., 3)."""
    low = np.array([max(0, level - tolerance) for level in colour], np.uint8)
    high = np.array([min(255, level + tolerance) for level in colour], np.uint8)
    return np.asarray(((rgb >= low) & (rgb <= high)).all(axis=-1))


def touching_border(found: Places) -> Places:
    """Return the connected parts of found, (H, W) bool, that reach the border of the picture."""
    _, labels = cv2.connectedComponents(found.astype(np.uint8), connectivity=4)
    reached = np.zeros(labels.max() + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        reached[edge] = True
    reached[0] = False  # what was not found
    return reached[labels]


def border_colour(rgb: Pixels, tolerance: int) -> tuple[Colour, float]:
    """Return the most frequent colour along the border, and the share of the border that is near it."""
    width = max(1, min(rgb.shape[:2]) // BORDER_SHARE)
    sides = (rgb[:width], rgb[-width:], rgb[width:-width, :width], rgb[width:-width, -width:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    bins = (border // BIN).astype(np.int64) @ np.array([BIN**2, BIN, 1])
    fullest = np.bincount(bins).argmax()
    colour = np.median(border[bins == fullest], axis=0)
    # A colour at the edge of its bin lies half in the next one: look again around what was found.
    nearby = np.abs(border - colour).max(axis=-1) <= BIN
    red, green, blue = (int(level) for level in np.median(border[nearby], axis=0))
    return (red, green, blue), float(is_near(border, (red, green, blue), tolerance).mean())
