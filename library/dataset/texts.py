"""Samples and the text cache: which captions can be drawn, and where their entries stand."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from library.cache import text
from library.cache.text import Key
from library.dataset import captions, mask_captions
from library.dataset.config import DatasetConfig
from library.dataset.scan import Sample
from library.errors import DataError, OptionError

# What makes other captions of the same tags without end.
ENDLESS = ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate")
MOST_CAPTIONS = 1000  # of one image: wildcards multiply


def refuse_uncacheable(configs: Iterable[DatasetConfig]) -> None:
    """Raise OptionError if a subset wants a new caption at each draw; for --cache_text_encoder_outputs."""
    for config in configs:
        for subset in config.subsets:
            for name in ENDLESS:
                if getattr(subset, name):
                    raise OptionError(
                        f"--cache_text_encoder_outputs: {name} is on for {subset.source}, but captions that are "
                        "encoded before training cannot change from draw to draw. Leave out one of the two."
                    )


def captions_of(samples: Iterable[Sample]) -> dict[str, Path]:
    """Return every caption that can be drawn, in order, and the folder of the first image that has it.

    Where an image is shown with its mask as well as without, both its captions are there.

    Raises: DataError for a caption whose wildcards make too many.
    """
    found: dict[str, Path] = {}
    for sample in samples:
        ways = (captions.every(sample.captions, sample.subset, tags) for tags in mask_captions.ways(sample))
        drawn = list(islice(chain.from_iterable(ways), MOST_CAPTIONS + 1))
        if len(drawn) > MOST_CAPTIONS:
            raise DataError(
                f"{sample.path}: the wildcards of its caption make more than {MOST_CAPTIONS} captions, which are too "
                "many for --cache_text_encoder_outputs. Leave it out, or use fewer wildcards."
            )
        for caption in drawn:
            found.setdefault(caption, sample.path.parent)
    return found


def places_of(folders: dict[Key, Path], family: str, cache_dir: Path | None) -> dict[Key, Path]:
    """Return where the entry of each text stands: in a folder beside the images, or in cache_dir.

    Args:
        folders: each text once, with the folder of the images it goes with.
        family: "sd": outputs of different families do not meet.
        cache_dir: None for beside the images.
    """
    return {
        key: text.entry_path(text.entry_folder(cache_dir or folder, family), key) for key, folder in folders.items()
    }
