"""Options of the masks."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import check_values, option
from library.options.values import Bounds


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
    mask_token_drop: int | None = option(
        None,
        "Do not compute what lies further than this many latent cells (8 pixels) from all that a mask lets be learnt: "
        "faster, but the model does not see it either. Unset: all is computed.",
        bounds=Bounds(min=0),
    )

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
