"""A data set of the user's own class, --dataset_class: pictures with captions and masks, made by its `__getitem__`."""

from __future__ import annotations

import hashlib
import importlib
import math
import random
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.dataset import buckets, framing, placement, regions, scan
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.geometry import Pixels, Size, Transform
from library.dataset.images import Decoded, Given
from library.dataset.scan import NO_MASK, Sample
from library.errors import DataError, OptionError, UserError, did_you_mean
from library.masks import MaskSource

if TYPE_CHECKING:
    from library.options.dataset import DatasetOptions

KEYS = ("image", "caption", "mask", "weight")
KEYS_OF_BATCHES = ("input_ids_list", "images", "latents", "loss_weights", "captions")  # of sd-scripts' MinimalDataset
ONE_PICTURE = 'Let __getitem__ return one picture, {"image": ..., "caption": ...}; see docs/datasets.md.'
_ONE_AT_A_TIME = threading.Lock()  # the generators that are seeded for a picture belong to the whole process


@dataclass(frozen=True)
class OwnClass:
    """An object of the user's class, and what is done to its pictures."""

    made: Any
    name: str  # "package.module.Class"
    config: DatasetConfig  # with one subset

    def size(self, index: int) -> Size:
        """Return the width and height of a picture, without making it. Raises: DataError."""
        declared = self._of_user(lambda: self.made.size(index), f"size({index})")
        if not isinstance(declared, tuple | list) or len(declared) != 2 or not all(_is_side(side) for side in declared):
            raise DataError(f"{self.name}.size({index}) must return (width, height) in pixels, got {declared!r}.")
        return int(declared[0]), int(declared[1])

    def give(self, index: int, seed: str) -> Given:
        """Return the picture at an index.

        Args:
            index: from 0.
            seed: of what the class draws from random, numpy.random or torch meanwhile.

        Raises: DataError for what the class raises, or gives instead of a picture.
        """
        with _seeded(f"{seed} {index}"):
            item = self._of_user(lambda: self.made[index], f"[{index}]")
        place = f"{self.name}[{index}]"
        check_keys(item, place)
        rgb = _pixels(item["image"], f'{place}["image"]')
        mask = None if item.get("mask") is None else _grey(item["mask"], f'{place}["mask"]')
        if mask is not None and mask.shape != rgb.shape[:2]:
            sizes = (mask.shape[1], mask.shape[0], rgb.shape[1], rgb.shape[0])
            message = "the mask is {}x{}, the image {}x{}. Make both the same size.".format(*sizes)
            raise DataError(f"{place}: {message}")
        subset = self.config.subsets[0]
        lines = [line.strip() for line in item["caption"].split("\n")]
        captions = tuple(line for line in lines if line) or ("",) if subset.enable_wildcard else (lines[0],)
        size = (rgb.shape[1], rgb.shape[0])
        image = Decoded(rgb, mask)
        region = regions.of_image(image, mask_source(subset), size) if regions.are_needed(subset) else None
        transform = framing.assign(self.config, subset, size, region, is_bucket_fixed=self.config.enable_bucket)
        weight = _weight(item.get("weight", 1.0), place)
        return Given(image, captions, transform, weight, has_mask="mask" in item, region=region)

    def _of_user(self, call: Any, what: str) -> Any:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # whatever a class of the user's raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise DataError(f"{self.name}{what}: {type(error).__name__}: {error} ({place}).") from error


def scan_any(configs: Sequence[DatasetConfig], options: DatasetOptions, max_token_length: int | None) -> scan.Scan:
    """Return the samples of --dataset_class where it is given, or else those of the files. Raises: UserError."""
    if options.dataset_class is None:
        return scan.scan(configs)
    debug = options.debug_dataset
    return scan_class(options.dataset_class, configs[0], max_token_length=max_token_length, debug_dataset=debug)


def scan_class(name: str, config: DatasetConfig, *, max_token_length: int | None, debug_dataset: bool) -> scan.Scan:
    """Return the samples of a class, by index; its first picture is made, and so found to be right.

    Args:
        name: "package.module.Class", the last part of which is called as sd-scripts does.
        config: the resolution and all that the command line says of pictures and captions.
        max_token_length: --max_token_length.
        debug_dataset: --debug_dataset.

    Raises: OptionError for a class that cannot be loaded, DataError for one that gives no pictures.
    """
    made = _load(name)(None, max_token_length, config.resolution, debug_dataset)
    own = OwnClass(made, name, config)
    try:
        count = len(made)
    except TypeError:
        raise OptionError(f"--dataset_class {name}: has no __len__, the number of its pictures.") from None
    if count < 1:
        raise OptionError(f"--dataset_class {name}: its length is {count}. It must have a picture at least.")
    has_sizes = hasattr(made, "size")
    if config.enable_bucket and not has_sizes:
        raise OptionError(
            f"--enable_bucket needs the sizes of all pictures, and {name} has no method size(index) -> (width, height)."
            " Add one, or leave --enable_bucket out."
        )
    subset = config.subsets[0]
    mask = mask_source(subset) if own.give(0, "first").has_mask else NO_MASK
    samples = [
        Sample(
            path=Path(name) / str(index),
            captions=("",),
            subset=subset,
            dataset=0,
            is_reg=False,
            num_repeats=subset.num_repeats,
            orientation=1,
            transform=_transform(own, index, has_sizes),
            mask=placement.mask_of(mask, subset.random_placement),
            give=partial(own.give, index),
        )
        for index in range(count)
    ]
    return scan.Scan(tuple(samples), tuple(regions.idle(subset, [mask])))


def mask_source(subset: SubsetConfig) -> MaskSource:
    """Return what the masks of a class are, once they are shaped; it has no label maps."""
    return MaskSource("own", shape=replace(subset.mask_shape, labels=()))


def _transform(own: OwnClass, index: int, has_sizes: bool) -> Transform:
    size = own.size(index) if has_sizes else own.config.resolution
    return buckets.assign(own.config, own.config.subsets[0], size)


def _load(name: str) -> Any:
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise OptionError(f"--dataset_class takes package.module.Class, got {name}.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = getattr(error, "name", None) or ""
        if missing.partition(".")[0] == "library":  # train_util, where MinimalDataset is
            raise OptionError(
                f"--dataset_class {name}: needs a part of sd-scripts ({error}). Leave out its base class. {ONE_PICTURE}"
            ) from None
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise OptionError(
                f"--dataset_class {name}: there is no module {module_name}. Check the name, or add its folder to "
                "PYTHONPATH."
            ) from None
        raise OptionError(f"--dataset_class {name}: {module_name} cannot be imported ({error}).") from None
    found = getattr(module, class_name, None)
    if not callable(found):
        near = did_you_mean(class_name, [key for key, value in vars(module).items() if isinstance(value, type)])
        raise OptionError(f"--dataset_class {name}: {module_name} has no class {class_name}.{near}")
    return found


def check_keys(item: Any, place: str) -> None:
    """Refuse what is not the description of one picture. Raises: DataError."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place} is of type {type(item).__name__}. {ONE_PICTURE}")
    if any(key in item for key in KEYS_OF_BATCHES):
        raise DataError(f"{place} is a batch, as sd-scripts wants it. {ONE_PICTURE}")
    for key in item:
        if key not in KEYS:
            raise DataError(f'{place} has "{key}", and can have {", ".join(KEYS)}.{did_you_mean(str(key), KEYS)}')
    for key in KEYS[:2]:
        if key not in item:
            raise DataError(f'{place} has no "{key}". {ONE_PICTURE}')
    if not isinstance(item["caption"], str):
        raise DataError(f'{place}["caption"] must be a text, got {item["caption"]!r}.')


def _pixels(image: Any, place: str) -> Pixels:
    """Return a PIL image, or an array (H, W, 3) uint8, as the latter. Raises: DataError."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise DataError(f"{place} must be (H, W, 3) uint8 or a PIL image, got {pixels.shape} {pixels.dtype}.")
    return np.ascontiguousarray(pixels)


def _grey(mask: Any, place: str) -> Pixels:
    """Return a PIL image, or an array (H, W) uint8, as the latter. Raises: DataError."""
    pixels = np.asarray(mask.convert("L") if hasattr(mask, "convert") else mask)
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise DataError(f"{place} must be (H, W) uint8 or a PIL image, got {pixels.shape} {pixels.dtype}.")
    return np.ascontiguousarray(pixels)


def _weight(weight: Any, place: str) -> float:
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise DataError(f'{place}["weight"] must be a number of at least 0, got {weight!r}.')
    return float(weight)


def _is_side(side: Any) -> bool:
    return isinstance(side, int | np.integer) and int(side) > 0


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seed what a class may draw from, and give the run its own state back: the same draws in whatever process."""
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
    torch: Any = sys.modules.get("torch")  # a class that draws from it has imported it
    with _ONE_AT_A_TIME:
        plain, arrays = random.getstate(), np.random.get_state()
        tensors = None if torch is None else torch.default_generator.get_state()
        random.seed(number)
        np.random.seed(number % 2**32)
        if torch is not None:
            torch.default_generator.manual_seed(number >> 1)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
            if torch is not None:
                torch.default_generator.set_state(tensors)
