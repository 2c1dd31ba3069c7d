"""Isolation: what is masked out of a picture is replaced by a fill that only the rest of the picture decides.

So nothing of what is masked out reaches the model, neither directly nor through its neighbourhood in the latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

FillKind = Literal["keep", "extend", "mean", "noise"]
Colours = npt.NDArray[np.uint8]  # (H, W, 3)
Mask = npt.NDArray[np.uint8]  # (H, W)
Floats = npt.NDArray[np.float32]

MID_GREY = 127  # where nothing is learnt, there is no colour to fill with
SWEEPS = 3  # of smoothing at each size
TINY = np.float32(1e-6)  # stands for a weight of 0 where one divides by it
VERSION = 1  # raised when the same picture and mask would be filled otherwise


@dataclass(frozen=True)
class Fill:
    """What stands where a picture is masked out."""

    kind: FillKind = "keep"
    number: int = 0  # tells noises of one picture apart

    @property
    def is_keep(self) -> bool:
        """Whether the picture stays as it is."""
        return self.kind == "keep"

    @property
    def name(self) -> str:
        """What tells it from other fills in the name of a file, empty for keep."""
        return "" if self.is_keep else f"{self.kind}{self.number or ''}"

    def in_words(self, seed: str) -> str:
        """Return all that decides its pixels but picture and mask, empty for keep: a part of fingerprints."""
        if self.is_keep:
            return ""
        return f"{self.name} {VERSION}" + (f" {seed}" if self.kind == "noise" else "")


KEEP = Fill()


def fill(rgb: Colours, mask: Mask, how: Fill, seed: str, grain: int = 1) -> Colours:
    """Return a picture whose pixels under black are filled; the others stay as they are.

    A fill depends only on the pixels that are not black in the mask, each of which counts as much as it is white. If
    there is none, all becomes a mid-grey.

    Args:
        rgb: (H, W, 3) uint8.
        mask: (H, W) uint8; 0 is masked out.
        how: the fill.
        seed: of noise: the picture's name.
        grain: of noise, in pixels a side: how many times smaller the picture will be shown, so that the noise is not
            averaged away.
    """
    if how.is_keep or mask.all():
        return rgb
    if not mask.any():
        return np.full_like(rgb, MID_GREY)
    filled = FILLS[how.kind](rgb, mask, f"{seed} {how.number}", grain)
    return np.asarray(cv2.copyTo(rgb, mask, filled), np.uint8)


def _mean(rgb: Colours, mask: Mask, _seed: str, _grain: int) -> Colours:
    mean, _covariance = _moments(rgb, mask)
    filled = np.empty_like(rgb)
    filled[:] = np.rint(mean).astype(np.uint8)
    return filled


def _noise(rgb: Colours, mask: Mask, seed: str, grain: int) -> Colours:
    """Return normal noise, each grain alone, with mean and covariance of the colours that are learnt."""
    mean, covariance = _moments(rgb, mask)
    mixing = np.column_stack((_root(covariance), mean)).astype(np.float32)
    number = int.from_bytes(hashlib.blake2b(seed.encode("utf-8", "surrogateescape"), digest_size=16).digest(), "little")
    height, width = mask.shape
    grains = (-(-height // grain), -(-width // grain), 3)
    drawn = np.random.Generator(np.random.SFC64(number)).standard_normal(grains, dtype=np.float32)
    colours = _to_bytes(np.asarray(cv2.transform(drawn, mixing), np.float32))
    if grain > 1:
        colours = np.ascontiguousarray(colours.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width])
    return colours


def _moments(rgb: Colours, mask: Mask) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean (3,) and covariance (3, 3) of the colours, each pixel weighed by its mask, of which some is not 0.

    All sums are of whole numbers that their types hold exactly, so that they do not depend on the order of adding.
    """
    weights = mask.astype(np.float32)
    total = float(cv2.sumElems(weights)[0])
    channels = [channel.astype(np.float32) for channel in cv2.split(rgb)]
    weighed = [channel * weights for channel in channels]
    mean = np.array([cv2.sumElems(channel)[0] for channel in weighed]) / total
    covariance = np.empty((3, 3))
    for i in range(3):
        for j in range(i + 1):
            product = float(cv2.sumElems(weighed[i] * channels[j])[0])  # at most 255^3 < 2^24 a pixel
            covariance[i, j] = covariance[j, i] = product / total - mean[i] * mean[j]
    return mean, covariance


def _root(covariance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the lower triangle (3, 3) whose product with its transpose is a covariance, which may be singular."""
    root = np.zeros((3, 3))
    for i in range(3):
        for j in range(i + 1):
            rest = covariance[i, j] - root[i, :j] @ root[j, :j]
            if i == j:
                root[i, i] = math.sqrt(max(rest, 0.0))
            elif root[j, j] > 1e-6:  # below, the channel is a mixture of those before it
                root[i, j] = rest / root[j, j]
    return root


def _extend(rgb: Colours, mask: Mask, _seed: str, _grain: int) -> Colours:
    """Return the learnt colours carried outwards, the further the smoother.

    The picture is halved until it is a pixel, black cells getting the colours of their parts; on the way back each
    size fills what is black in it from the one before, and smooths it while the learnt cells hold their colours. That
    comes near to a soap film that hangs from the edge of what is learnt.
    """
    weights = mask.astype(np.float32) * np.float32(1 / 255)
    colours = np.asarray(rgb * weights[..., None], np.float32)
    return _to_bytes(_from_half(colours, weights))  # those of the learnt pixels themselves are not needed


def _from_half(colours: Floats, weights: Floats) -> Floats:
    """Return what colours (H, W, 3) that are multiplied by weights (H, W) become, seen at half the size."""
    height, width = weights.shape
    size = (-(-width // 2), -(-height // 2))
    odd = (0, height % 2, 0, width % 2)  # a row or column of weight 0 more
    halves = [
        np.asarray(cv2.resize(cv2.copyMakeBorder(each, *odd, cv2.BORDER_CONSTANT), size, interpolation=cv2.INTER_AREA))
        for each in (colours, weights)
    ]
    gain = np.minimum(4, 1 / np.maximum(halves[1], TINY))  # one white pixel of four makes a white cell
    half_colours, half_weights = (
        np.asarray(each, np.float32) for each in (halves[0] * gain[..., None], halves[1] * gain)
    )
    coarse = _carried(half_colours, half_weights)
    spread = cv2.resize(coarse, (2 * size[0], 2 * size[1]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(spread[:height, :width], np.float32)


def _carried(colours: Floats, weights: Floats) -> Floats:
    """Return colours (H, W, 3) for all cells: the known ones as far as weights go, for the rest what lies around.

    Args:
        colours: multiplied by their weights.
        weights: (H, W) in [0, 1], one of them above 0.
    """
    share = weights[..., None]
    known = colours / np.maximum(share, TINY)
    if weights.size == 1:
        return np.asarray(known, np.float32)
    spread = _from_half(colours, weights)
    for _ in range(SWEEPS):
        held = spread + (known - spread) * share
        spread = np.asarray(cv2.blur(held, (3, 3), borderType=cv2.BORDER_REPLICATE), np.float32)
    return np.asarray(spread + (known - spread) * share, np.float32)


def _to_bytes(colours: Floats) -> Colours:
    return np.rint(colours, out=colours).clip(0, 255, out=colours).astype(np.uint8)


FILLS: Mapping[str, Callable[[Colours, Mask, str, int], Colours]] = MappingProxyType(
    {"extend": _extend, "mean": _mean, "noise": _noise}
)
