"""Filling what is masked out of a picture, and shaping its mask: processor time for 1024x1024 on one thread.

The picture is a cut of an example photo with a sensor's noise; its mask is an ellipse with a soft edge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import cv2
from measuring import Figure, conclude, load, make_parser
from pictures import photo, soft_mask

from library import mask_shaping
from library.isolation import Fill, fill
from library.masks import MaskShape

MAX_MS = 60.0
FILLS = ("extend", "mean", "noise")
SHAPE = MaskShape(invert=True, erode=4.0, dilate=12.0, feather=8.0)


def measure(name: str, work: Callable[[], object], runs: int, warm_up: int, at_most: float | None = None) -> Figure:
    """Return the milliseconds of processor time that each of some calls of work took."""
    taken = []
    for _ in range(warm_up + runs):
        start = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - start))
    return Figure(name, "ms", tuple(taken[warm_up:]), warm_up, at_most=at_most)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--side", type=int, default=1024, help="of the picture in pixels (default 1024)")
    parser.add_argument("--runs", type=int, default=30, help="runs that count (default 30)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.side, arguments.runs = 128, 1
    warm_up = 0 if arguments.quick else 3
    picture, mask = photo(0, arguments.side), soft_mask(0, arguments.side)
    load_before, num_threads = load(), cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        figures = [
            measure(
                f"fill: {kind}", lambda kind=kind: fill(picture, mask, Fill(kind), "a"), arguments.runs, warm_up, MAX_MS
            )
            for kind in FILLS
        ]
        size = (arguments.side, arguments.side)
        shape = measure(
            "shape: invert, erode 4, dilate 12, feather 8",
            lambda: mask_shaping.shape(mask, SHAPE, size),
            arguments.runs,
            warm_up,
        )
    finally:
        cv2.setNumThreads(num_threads)
    conclude(arguments, [*figures, shape], load_before)


if __name__ == "__main__":
    main()
