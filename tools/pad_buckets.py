"""Place pictures at random on the canvases of buckets, so that a subject does not stand at one place in all of them.

python tools/pad_buckets.py photos padded --variants 3 --rotate 10 [--mask_dir masks --mask_out padded_masks]
    [--sheet sheet.png]

Folders within, names and captions stay. What is left free of the canvas is masked out: black in --mask_out, or else
transparent in the pictures. The result is a data set for conditioning_data_dir, or for alpha_mask. What is there
already is not made again. The exit code is 0, or 2 after an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from library.cli import set_up_logging  # noqa: E402
from library.errors import DataError, OptionError  # noqa: E402
from library.options.declare import check_values, option  # noqa: E402
from library.options.logging import LoggingOptions  # noqa: E402
from library.options.values import Bounds, read_range  # noqa: E402
from networks import command_line  # noqa: E402

if TYPE_CHECKING:
    from library.dataset.padded_copies import PaddedCopy, PadSettings

log = logging.getLogger(__name__)

FOLDERS = {"input_dir": "folder of pictures", "output_dir": "folder to write the copies to"}  # given without a flag
FILLS = ("mean", "extend", "noise")


@dataclass(frozen=True, kw_only=True)
class PadOptions:
    """What is read, how it is placed, and what is written."""

    input_dir: str = option("", "Folder of pictures; folders within are read too.", is_path=True)
    output_dir: str = option("", "Folder to write the copies to, PNG files named like the pictures.", is_path=True)
    mask_dir: str | None = option(None, "Folder of masks, with the folders and names of the pictures.", is_path=True)
    mask_out: str | None = option(
        None, "Folder to write masks to; unset: a copy's mask is its alpha channel.", is_path=True
    )
    variants: int = option(1, "Copies of each picture.", bounds=Bounds(min=1))
    resolution: str = option("512", "Side, or WIDTH,HEIGHT, of which buckets have the area.")
    min_bucket_reso: int = option(256, "Shortest side of a bucket.", bounds=Bounds(min=1))
    max_bucket_reso: int = option(1024, "Longest side of a bucket.", bounds=Bounds(min=1))
    bucket_reso_steps: int = option(64, "Sides of buckets are multiples of it.", bounds=Bounds(min=8))
    bucket_aspect: float = option(
        1.5,
        "How many times wider or narrower than its picture a bucket may be; 1 takes the nearest one.",
        bounds=Bounds(min=1),
    )
    scale: str = option("0.5,1.0", "MIN,MAX of the scale; 1 fits the whole picture into its bucket, more cuts it.")
    shift: float = option(
        1.0, "How far from the middle a picture may stand: 0 in the middle, 1 anywhere.", bounds=Bounds(min=0, max=1)
    )
    rotate: float = option(0.0, "Most degrees by which a picture is turned.", bounds=Bounds(min=0, max=180))
    crop: str = option("1,1", "MIN,MAX share of each side of the picture that is kept, cut at random before placing.")
    fill: str = option(
        "mean", "What the free canvas shows: mean (the picture's colour), extend, noise, or a colour like #808080."
    )
    fill_masked: bool = option(False, "Fill what is masked out of the pictures as well, not only the free canvas.")
    seed: int = option(0, "Of all draws: the same picture gets the same copies, whatever else is there.")
    overwrite: bool = option(False, "Make copies again that are there.")
    sheet: str | None = option(
        None, "Write pictures before and after, with their masks, to this PNG file.", is_path=True
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        for name in ("scale", "crop"):
            try:
                read_range(getattr(self, name))
            except ValueError as expected:
                raise OptionError(f"--{name} must be {expected}, got {getattr(self, name)}.") from None
        if read_range(self.crop)[1] > 1:
            raise OptionError(f"--crop must not be above 1, which keeps all of a side, got {self.crop}.")
        if self.sheet is not None and Path(self.sheet).suffix.lower() != ".png":
            raise OptionError(f"--sheet {self.sheet}: the ending must be .png.")
        _size(self.resolution)
        if self.fill not in FILLS:
            _check_colour(self.fill)


def _size(resolution: str) -> tuple[int, int]:
    """Return width and height. Raises: OptionError."""
    try:
        sides = [int(side) for side in resolution.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 8:
        raise OptionError(f"--resolution must be a side or WIDTH,HEIGHT of at least 8 pixels, got {resolution}.")
    return sides[0], sides[-1]


def _check_colour(fill: str) -> None:
    from PIL import ImageColor

    from library.errors import did_you_mean

    try:
        ImageColor.getrgb(fill)
    except ValueError:
        near = did_you_mean(fill, (*FILLS, *ImageColor.colormap))
        raise OptionError(
            f"--fill must be one of {', '.join(FILLS)}, or a colour like #808080, got {fill}.{near}"
        ) from None


def settings_of(options: PadOptions) -> PadSettings:
    """Return how pictures are placed. Raises: OptionError for limits that leave no bucket."""
    from library.dataset import buckets
    from library.dataset.padded_copies import PadSettings

    resolution, step = _size(options.resolution), options.bucket_reso_steps
    shortest, longest = buckets.rounded_limits(options.min_bucket_reso, options.max_bucket_reso, step)
    if not 0 < shortest <= min(resolution) or longest < max(resolution):
        raise OptionError(
            f"--min_bucket_reso {options.min_bucket_reso} and --max_bucket_reso {options.max_bucket_reso} must enclose "
            f"--resolution {options.resolution}, and be at least --bucket_reso_steps {step}."
        )
    return PadSettings(
        buckets=buckets.sizes_of_area(resolution, shortest, longest, step),
        bucket_aspect=options.bucket_aspect,
        placement_scale=read_range(options.scale),
        placement_rotate=options.rotate,
        shift=options.shift,
        crop=read_range(options.crop),
        fill=options.fill,
        fill_masked=options.fill_masked,
        seed=options.seed,
    )


def pad(options: PadOptions) -> None:
    """Write the copies. Raises: UserError."""
    from library.dataset import files, padded_copies

    root, output = Path(options.input_dir), Path(options.output_dir)
    mask_root, mask_output = (Path(name) if name else None for name in (options.mask_dir, options.mask_out))
    padded_copies.check_places(root, mask_root, output, mask_output)
    settings = settings_of(options)
    originals = padded_copies.find(root, mask_root)
    lacking = [original.path.name for original in originals if original.mask is None]
    if mask_root is not None and lacking:
        from library.dataset.problems import listed

        log.warning("%d pictures have no mask in %s and are learnt whole: %s", len(lacking), mask_root, listed(lacking))
    copies = [
        copy
        for original in originals
        for copy in padded_copies.copies_of(original, options.variants, output, mask_output)
    ]

    def make(copy: PaddedCopy) -> bool:
        is_made = options.overwrite or not padded_copies.is_whole(copy)
        if is_made:
            padded_copies.make(copy, settings)
        padded_copies.copy_words(copy)
        return is_made

    done = files.read_all(make, copies, label="padding")
    errors = [each for each in done if isinstance(each, DataError)]
    num_made = sum(each is True for each in done)
    num_kept = done.count(False)
    kept = " and stay as they are: --overwrite makes them again" if num_kept else ""
    log.info("%s: %d copies of %d pictures made, %d were there%s", output, num_made, len(originals), num_kept, kept)
    if errors:
        more = f" ({len(errors) - 1} more copies failed)" if errors[1:] else ""
        raise DataError(f"{errors[0]}{more}")
    if options.sheet is not None:
        from library.dataset import padded_sheet

        log.info("sheet: %s", padded_sheet.draw(copies, Path(options.sheet)))


def read(argv: Sequence[str]) -> PadOptions:
    """Return the options. Raises: OptionError."""
    return command_line.read(
        argv,
        prog="pad_buckets.py",
        description="Place pictures at random on the canvases of buckets.",
        group=PadOptions,
        positional=FOLDERS,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    return command_line.run(lambda given: pad(read(given)), lambda: set_up_logging(LoggingOptions()), argv)


if __name__ == "__main__":
    sys.exit(main())
