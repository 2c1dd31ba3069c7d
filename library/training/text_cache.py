"""The text cache of a run: captions and prompts of previews, encoded before the text encoders are let go."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.cache import entries, text_fill
from library.cache.text_fill import Survey, TextSettings
from library.dataset import texts
from library.models import checkpoint
from library.training import painting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.cache.store import TextStore
    from library.cache.text import Key
    from library.models.family import ModelFamily, Parts
    from library.options import Options
    from library.options.caching import CachingOptions
    from library.training.data import Data
    from library.training.precision import Precision
    from library.training.prompts import SamplePrompt

log = logging.getLogger(__name__)

PREVIEWS = "previews"  # their prompts have a folder of their own, as they are encoded in another way


@dataclass(frozen=True)
class Texts:
    """What stands for the text encoders of a run."""

    captions: TextStore
    prompts: TextStore  # of the previews


@dataclass(frozen=True)
class Pending:
    """What is there of the texts of a run, and what has to be encoded."""

    captions: Survey
    prompts: Survey

    @property
    def num_missing(self) -> int:
        """Texts that this process has to encode."""
        return len(self.captions.missing) + len(self.prompts.missing)


def places_of(
    data: Data, prompts: Sequence[SamplePrompt], options: CachingOptions, family: str
) -> tuple[dict[Key, Path], dict[Key, Path]]:
    """Return where the entries of all captions stand, and of all prompts, which go with the first image.

    Raises: DataError for a caption that stands for too many.
    """
    cache_dir = Path(options.cache_dir) if options.cache_dir else None
    captions: dict[Key, Path] = {(caption,): folder for caption, folder in texts.captions_of(data.all_samples).items()}
    folder = data.samples[0].path.parent
    drawn: dict[Key, Path] = {painting.captions_of(prompt): folder for prompt in prompts}
    return (
        texts.places_of(captions, family, cache_dir),
        texts.places_of(drawn, f"{family}_{PREVIEWS}", cache_dir),
    )


def check(data: Data, prompts: Sequence[SamplePrompt], options: CachingOptions, family: str) -> None:
    """Find out, before any model is loaded, whether all captions can be cached. Raises: DataError."""
    for places in places_of(data, prompts, options, family):
        if options.cache_text_encoder_outputs_to_disk:
            entries.check_writable(places.values(), "text cache")


def survey(
    data: Data,
    prompts: Sequence[SamplePrompt],
    options: Options,
    family: ModelFamily,
    formats: Precision,
    accelerator: Accelerator,
) -> Pending:
    """Return what this process has to encode, without loading a model.

    Raises: CheckpointError if the text encoders' file cannot be read.
    """
    caching = options.caching
    place = options.model.pretrained_model_name_or_path or ""
    merged = _merged_identity(options.network.base_weights or (), options.network.base_weights_multiplier or ())

    def settings(as_called: ModelFamily, batch_size: int) -> TextSettings:
        return TextSettings(
            encoder=" ".join(filter(None, (as_called.text_identity(place), merged))),
            dtype=formats.frozen,
            batch_size=batch_size,
            to_disk=caching.cache_text_encoder_outputs_to_disk,
            skip_check=caching.skip_cache_check,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    of_captions, of_prompts = places_of(data, prompts, caching, family.name)
    batch_size = caching.text_encoder_batch_size or max(config.batch_size for config in data.configs)
    found = text_fill.survey(of_captions, settings(family, batch_size))
    previews = settings(painting.preview_family(family), 1) if of_prompts else found.settings
    return Pending(found, text_fill.survey(of_prompts, previews))


def fill(
    pending: Pending, family: ModelFamily, parts: Parts, autocast: torch.dtype | None, accelerator: Accelerator
) -> Texts:
    """Return all texts, encoding what is missing with the text encoders, which are on the device.

    Args:
        pending: from `survey`.
        family: tokenizes and encodes.
        parts: only the text encoders are used; none are needed where nothing is missing.
        autocast: what most of the arithmetic is done in; None: float32.
        accelerator: several processes wait for each other here.

    Raises: DataError, see cache.text_fill.fill.
    """
    device = accelerator.device

    def in_format(encode: Callable[[Sequence[Key]], list[dict[str, Tensor]]]) -> text_fill.TextEncoder:
        def encode_so(keys: Sequence[Key]) -> list[dict[str, Tensor]]:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                return encode(keys)

        return encode_so

    def encode_captions(keys: Sequence[Key]) -> list[dict[str, Tensor]]:
        tokens = family.tokenize([caption for (caption,) in keys]).to(device)
        outputs = family.text_outputs(family.encode_text(parts, tokens))
        return [{name: tensor[i] for name, tensor in outputs.items()} for i in range(len(keys))]

    def encode_prompts(keys: Sequence[Key]) -> list[dict[str, Tensor]]:
        encoded: list[Any] = [painting.encode_prompts(family, parts, key, device) for key in keys]
        return [family.text_outputs(text) for text in encoded]

    made = Texts(
        text_fill.fill(pending.captions, in_format(encode_captions)),
        text_fill.fill(pending.prompts, in_format(encode_prompts)),
    )
    _tell(pending, made, accelerator)
    accelerator.wait_for_everyone()  # nobody reads before all is written
    return made


def _tell(pending: Pending, made: Texts, accelerator: Accelerator) -> None:
    num_texts = len(made.captions) + len(made.prompts)
    settings = pending.captions.settings
    if not settings.to_disk:
        log.info("text: %d captions and prompts encoded and kept in memory", num_texts)
        return
    own = torch.tensor([pending.num_missing], device=accelerator.device)
    num_encoded = int(accelerator.reduce(own, "sum"))
    state = "taken unchecked" if settings.skip_check else "up to date"
    log.info("text: %d entries %s, %d encoded", num_texts - num_encoded, state, num_encoded)


def _merged_identity(files: Sequence[str], multipliers: Sequence[float]) -> str:
    """Return what identifies the files of --base_weights with their multipliers, nothing where there are none."""
    if not files:
        return ""
    identities = [checkpoint.fingerprint(checkpoint.open_tensors(Path(file))) for file in files]
    content = json.dumps([identities, list(multipliers)[: len(files)]])
    return f"merged {hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"
