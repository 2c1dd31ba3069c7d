"""Options of the masks."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Which parts of an image count in the loss. White is learnt, black is not, grey counts in proportion."""

    masked_loss: bool = option(False, "Insist on masks: training does not start without any.")
    alpha_mask: bool = option(False, "Use the images' alpha channel as mask; opaque is learnt.")
    conditioning_data_dir: str | None = option(
        None, "Folder of mask images named like the images, for subsets that name none.", is_path=True
    )
    missing_mask: str = option(
        "error",
        "For an image without its mask file: stop, learn all of it, or leave it out.",
        choices=("error", "train_all", "skip"),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
