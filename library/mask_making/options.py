"""Options of tools/mask_images.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option, settle
from library.options.values import Bounds

SOURCES = ("from_alpha", "from_color", "key_border", "threshold", "boxes", "model")
COLOURS = ("from_color", "key_border")
# Options that change how one kind of source works -> the sources they belong to.
BELONGS_TO: Mapping[str, tuple[str, ...]] = {
    "tolerance": COLOURS,
    "learn_color": COLOURS,
    "connected": COLOURS,
    "learn_boxes": ("boxes",),
    "preset": ("model",),
    "engine": ("model",),
    "batch_size": ("model",),
}
TOLERANCE = 10  # levels of 255: what JPEG does to a flat area
PRESET_NAMES = ("u2net", "isnet", "anime", "selfie")
ENGINES = ("onnxruntime", "opencv")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What masks are made from: exactly one."""

    from_alpha: bool = option(False, "The pictures' transparency: opaque is learnt, half-transparent counts half.")
    from_color: str | None = option(
        None, "Mask out what has this colour, '#ff00ff' or a name such as white. Quotes keep the shell off the #."
    )
    key_border: bool = option(
        False, "Mask out what has the colour that is most frequent along the picture's border, found for each picture."
    )
    threshold: int | None = option(
        None, "Learn what is at least this bright; with --invert, what is darker.", bounds=Bounds(min=1, max=255)
    )
    boxes: str | None = option(
        None,
        "Mask out the boxes in this list, a JSON or CSV file of file name, x, y, w, h in pixels or in fractions of the "
        "picture; the name * stands for every picture, a negative x or y counts from the right or the bottom.",
        is_path=True,
    )
    model: str | None = option(
        None,
        "Ask a segmentation model: an ONNX or TFLite file, or u2netp, which an extra package brings.",
        is_path=True,
    )
    tolerance: int | None = option(
        None,
        "With --from_color and --key_border: how far each of red, green and blue may be off. "
        f"Default: {TOLERANCE}; pictures saved as JPEG may need 30.",
        bounds=Bounds(min=0, max=255),
    )
    learn_color: bool = option(False, "With --from_color and --key_border: learn what has the colour, and only that.")
    connected: bool = option(
        False, "With --from_color and --key_border: only what touches the border counts, not enclosed spots."
    )
    learn_boxes: bool = option(False, "With --boxes: learn the boxes, and mask out all else.")
    preset: str | None = option(
        None,
        "With --model: how pictures are prepared for it. Unset: recognised from the input that its file has.",
        choices=PRESET_NAMES,
    )
    engine: str | None = option(
        None,
        "With --model: what runs it. Unset: onnxruntime where it is installed, else OpenCV; TFLite is for OpenCV.",
        choices=ENGINES,
    )
    batch_size: int | None = option(
        None,
        "With --model: pictures that it gets at a time, where its file allows more than one.",
        bounds=Bounds(min=1),
    )

    def __post_init__(self) -> None:
        """Check the values, and that there is one source."""
        check_values(self)
        given = [name for name in SOURCES if self._is_given(name)]
        flags = ", ".join(f"--{name}" for name in SOURCES)
        if not given:
            raise OptionError(f"what the masks are made from is missing. Give one of {flags}.")
        if len(given) > 1:
            said = " and ".join(f"--{name}" for name in given)
            raise OptionError(
                f"{said} cannot be used together. Give one, then run the command again with the other and --combine."
            )
        for name, sources in BELONGS_TO.items():
            if self._is_given(name) and given[0] not in sources:
                wanted = " or ".join(f"--{source}" for source in sources)
                raise OptionError(f"--{name} belongs to {wanted}, and has no meaning with --{given[0]}.")
        settle(self, "tolerance", TOLERANCE if self.tolerance is None else self.tolerance)
        settle(self, "batch_size", self.batch_size or 1)

    def _is_given(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and value is not False  # 0 is a tolerance


@dataclass(frozen=True, kw_only=True)
class FinishOptions:
    """What is done to a mask once it is made, in this order."""

    threshold_mask: int | None = option(
        None, "Make the mask hard: white from this grey on, black below.", bounds=Bounds(min=1, max=255)
    )
    min_area: float = option(
        0.0,
        "Take away white spots that are smaller than this: pixels, or below 1 a share of the picture.",
        bounds=Bounds(min=0),
    )
    fill_holes: bool = option(False, "Learn what is enclosed by what is learnt.")
    invert: bool = option(False, "Swap learnt and masked out.")
    shrink: float = option(0.0, "Shrink what is learnt by this many pixels.", bounds=Bounds(min=0, max=1000))
    grow: float = option(0.0, "Grow what is learnt by this many pixels.", bounds=Bounds(min=0, max=1000))
    blur: float = option(
        0.0, "Make the edge soft, over about this many pixels; it stays in its place.", bounds=Bounds(min=0, max=1000)
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Where masks go, and what becomes of those that are there."""

    combine: str = option(
        "replace",
        "What becomes of an existing mask: replaced, added to (what either learns), subtracted from (the old one "
        "without what the new one learns), or intersected (what both learn). A picture that has none yet counts as "
        "black for add, else as white.",
        choices=("replace", "add", "subtract", "intersect"),
    )
    combine_with: str | None = option(
        None, "With --combine: folder of the existing masks. Unset: the one that is written to.", is_path=True
    )
    overwrite: bool = option(False, "Make masks anew that are there already. Unset: they are kept.")
    sheet: str | None = option(
        None, "Draw pictures, masks, and pictures under their masks on this sheet, a PNG.", is_path=True
    )
    dry_run: bool = option(False, "Say which masks would be made, and make none.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        if self.combine_with is not None and self.combine == "replace":
            raise OptionError("--combine_with says with which masks, but not how. Add --combine add, or another.")
        if self.sheet is not None and not self.sheet.lower().endswith(".png"):
            raise OptionError(f"--sheet {self.sheet}: the ending must be .png.")
        if self.sheet is not None and self.dry_run:
            raise OptionError("--dry_run makes no masks that --sheet could show. Leave out one of them.")
