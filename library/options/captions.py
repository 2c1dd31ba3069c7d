"""Options of the captions."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option, settle
from library.options.values import Bounds

RATE = Bounds(min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Where captions come from and how they are varied; defaults for what a dataset config leaves open."""

    caption_extension: str = option(".caption", "Ending of caption files, which lie beside the images.")
    caption_extention: str | None = option(None, "Old spelling of --caption_extension, which it overrides.")
    shuffle_caption: bool = option(False, "Put the tags of a caption in a new order each time.")
    caption_separator: str = option(",", "What separates the tags of a caption.")
    keep_tokens: int = option(0, "Number of leading tags that shuffling and dropout leave alone.", bounds=Bounds(min=0))
    keep_tokens_separator: str = option(
        "", "Mark in captions; tags before it, and after a second one, stay. Beats --keep_tokens."
    )
    secondary_separator: str | None = option(
        None, "Mark inside a tag that becomes --caption_separator at the end, so that tags stay together."
    )
    enable_wildcard: bool = option(False, "Pick one of {a|b|c} at random, and one line of a caption file with several.")
    caption_prefix: str | None = option(None, "Text before every caption.")
    caption_suffix: str | None = option(None, "Text after every caption.")
    token_warmup_min: int = option(1, "Number of tags shown at step 0 of --token_warmup_step.", bounds=Bounds(min=1))
    token_warmup_step: float = option(
        0.0, "Show more and more tags until this step; below 1, this part of all steps. 0 is off.", bounds=Bounds(min=0)
    )
    caption_dropout_rate: float = option(0.0, "Probability of an empty caption.", bounds=RATE)
    caption_dropout_every_n_epochs: int = option(
        0, "Every caption is empty in each N-th epoch. 0 is never.", bounds=Bounds(min=0)
    )
    caption_tag_dropout_rate: float = option(0.0, "Probability of leaving a tag out.", bounds=RATE)

    def __post_init__(self) -> None:
        """Check the values; the old spelling becomes the new one, and a missing dot is added."""
        check_values(self)
        extension = self.caption_extention or self.caption_extension
        settle(self, "caption_extension", extension if extension.startswith(".") else f".{extension}")
