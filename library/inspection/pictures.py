"""Checks of picture files and of their transparency."""

from __future__ import annotations

from collections.abc import Iterator

from library.dataset.problems import Problem
from library.inspection.kinds import found
from library.inspection.scene import Scene

LARGE = 80_000_000  # pixels: a picture that takes seconds to decode, at each step if it is not cached
SHALLOW = 8  # bits
OPAQUE = 250  # nearly so: scanners and editors leave 254
HIDDEN = 0.01  # share of a picture under transparency that matters
DETAIL = 0.12  # share of pixels that differ from their neighbour: a picture, and not a plain or smooth ground


def unreadable(scene: Scene) -> Iterator[Problem]:
    """Yield what cannot be decoded."""
    for looked in scene.looked:
        yield from looked.problems


def too_large(scene: Scene) -> Iterator[Problem]:
    """Yield pictures that take very long to decode."""
    for sample in scene.of_files:
        width, height = sample.transform.source
        if width * height > LARGE:
            size = "{}x{}".format(*sample.transform.target)
            reason = f"has {width}x{height} pixels, {width * height / 1e6:.0f} million, and is trained at {size}."
            yield found("image-too-large", sample.path, reason, severity="warning", joint="pictures are very large")


def animated(scene: Scene) -> Iterator[Problem]:
    """Yield pictures that move."""
    for looked in scene.looked_once:
        if looked.picture and looked.picture.file.num_frames > 1:
            reason = f"is animated: of its {looked.picture.file.num_frames} pictures the first is seen."
            yield found("image-animated", looked.sample.path, reason, joint="pictures are animated")


def deep(scene: Scene) -> Iterator[Problem]:
    """Yield pictures with more bits than are read."""
    for looked in scene.looked_once:
        if looked.picture and looked.picture.file.bits > SHALLOW:
            reason = f"has {looked.picture.file.bits} bits a channel, of which 8 are read."
            yield found("image-16-bit", looked.sample.path, reason, joint="pictures have more than 8 bits a channel")


def of_print(scene: Scene) -> Iterator[Problem]:
    """Yield pictures in the colours of print."""
    for looked in scene.looked_once:
        if looked.picture and looked.picture.file.mode == "CMYK":
            reason = "is in CMYK, which is turned into RGB without its colour profile."
            yield found("image-cmyk", looked.sample.path, reason, joint="pictures are in CMYK")


def with_palette(scene: Scene) -> Iterator[Problem]:
    """Yield palette pictures with transparency."""
    for looked in scene.looked_once:
        picture = looked.picture
        if picture and picture.file.mode == "P" and picture.alpha is not None:
            reason = "is a palette picture with transparency: 256 colours, and as a rule no half transparent edges."
            yield found("image-palette", looked.sample.path, reason, joint="palette pictures have transparency")


def unused_transparency(scene: Scene) -> Iterator[Problem]:
    """Yield pictures with transparent parts in subsets that do not use them as masks."""
    for looked in scene.looked_once:
        alpha = looked.picture.alpha if looked.picture else None
        if alpha and alpha.least < OPAQUE and not looked.sample.mask.is_given:
            reason = "has transparent parts, which are learnt with whatever colour lies under them."
            joint = f"pictures of {looked.sample.subset.source} have transparent parts that are learnt like the rest"
            yield found("alpha-unused", looked.sample.path, reason, joint=joint)


def hidden_pictures(scene: Scene) -> Iterator[Problem]:
    """Yield pictures that go on where they are transparent, and that the model so sees."""
    for looked in scene.looked_once:
        sample, alpha = looked.sample, looked.picture.alpha if looked.picture else None
        if alpha is None or sample.mask.kind != "alpha" or "keep" not in sample.subset.mask_fill:
            continue
        if alpha.hidden > HIDDEN and alpha.hidden_detail > DETAIL and alpha.most > 0:
            reason = f"goes on under its transparency, which is {alpha.hidden:.0%} of it: not learnt, but seen."
            joint = "pictures go on under their transparency: not learnt, but seen"
            yield found("alpha-hidden-picture", sample.path, reason, joint=joint)
