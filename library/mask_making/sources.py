"""From the options to what draws the masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from library.mask_making import boxes, colours
from library.mask_making.options import SourceOptions
from library.mask_making.pictures import Source, one_by_one

log = logging.getLogger(__name__)


def source_of(options: SourceOptions, names: Sequence[str]) -> Source:
    """Return what draws the masks.

    Args:
        options: with exactly one source.
        names: of all pictures, to find names in a list of boxes that no picture has.

    Raises: OptionError, CheckpointError.
    """
    assert options.tolerance is not None
    assert options.batch_size is not None
    if options.from_alpha:
        return one_by_one(colours.from_alpha)
    if options.threshold is not None:
        return one_by_one(partial(colours.from_brightness, threshold=options.threshold))
    if options.boxes is not None:
        listed = boxes.read_boxes(Path(options.boxes))
        unknown = boxes.unknown_names(listed, names)
        if unknown:
            more = f" and {len(unknown) - 10} more" * (len(unknown) > 10)
            log.warning("--boxes %s: no picture is named %s", options.boxes, ", ".join(unknown[:10]) + more)
        return one_by_one(partial(boxes.from_boxes, boxes=listed, learn=options.learn_boxes))
    if options.model is not None:
        from library.mask_making import model_places, segmentation

        path = model_places.find_model(options.model)
        return segmentation.load(path, preset=options.preset, engine=options.engine, batch_size=options.batch_size)
    key = None if options.from_color is None else colours.read_colour(options.from_color, "--from_color")
    draw = partial(
        colours.from_colour,
        colour=key,
        tolerance=options.tolerance,
        learn=options.learn_color,
        connected=options.connected,
    )
    return one_by_one(draw)
