"""Options of the masks."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option
from library.options.values import Bounds, read_range

FILLS = ("keep", "extend", "mean", "noise")  # what may stand where a picture is masked out
SHARE = Bounds(min=0, max=1)
PIXELS = Bounds(min=0, max=512)


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
    mask_fill: tuple[str, ...] = option(
        ("keep",),
        "What the model sees where the mask is black: the picture as it is, its learnt colours extended, their mean, "
        "or noise of their colours. Of several, each draw takes one.",
        choices=FILLS,
    )
    mask_invert: bool = option(False, "Learn what is black in a mask, and not what is white.")
    mask_erode: float = option(0.0, "Shrink what is learnt by this many pixels of the image.", bounds=PIXELS)
    mask_dilate: float = option(0.0, "Grow what is learnt by this many pixels of the image.", bounds=PIXELS)
    mask_feather: float = option(0.0, "Soften the edge of a mask over this many pixels of the image.", bounds=PIXELS)
    mask_weight_min: float = option(0.0, "The least weight of a latent cell, however black its mask.", bounds=SHARE)
    mask_area_norm: float = option(
        0.0,
        "Divide an image's loss by its mean weight to this power: at 1 a small mask pulls as hard as a large one. "
        "Images with an empty mask are left out.",
        bounds=SHARE,
    )
    mask_area_floor: float = option(
        0.01, "The least mean weight that --mask_area_norm divides by.", bounds=Bounds(above=0, max=1)
    )
    unmasked_probability: float = option(0.0, "Probability of showing an image without its mask.", bounds=SHARE)
    mask_prior_weight: float = option(
        0.0,
        "Weight of a loss that holds the prediction where the mask is black to that of the untrained model.",
        bounds=Bounds(min=0),
    )
    mask_prior_every: int = option(
        1, "Predict with the untrained model every N optimizer steps, and count it N times.", bounds=Bounds(min=1)
    )
    mask_drop_tags: tuple[str, ...] | None = option(
        None, "Tags left out of a caption while the image is masked: they name what is masked out."
    )
    mask_captions: bool = option(False, "Take the caption that lies beside an image's mask, where there is one.")
    mask_aware_crop: bool = option(False, "Choose bucket and cut so that what a mask lets be learnt stays whole.")
    mask_aware_zoom: float = option(
        1.0, "How many times closer than needed to fill its bucket --mask_aware_crop may show it.", bounds=Bounds(min=1)
    )
    random_placement: bool = option(
        False, "Place each image at random in its bucket: scaled, moved, turned; what is left free is masked out."
    )
    placement_scale: str = option(
        "0.5,1.0", "MIN,MAX of the scale of --random_placement; 1 fits the whole image into its bucket."
    )
    placement_rotate: float = option(
        0.0, "Most degrees by which --random_placement turns an image.", bounds=Bounds(min=0, max=180)
    )
    placement_variants: int = option(
        4, "Different placements of an image that a latent cache holds; each draw takes one.", bounds=Bounds(min=1)
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
        try:
            read_range(self.placement_scale)
        except ValueError as expected:
            raise OptionError(f"--placement_scale must be {expected}, got {self.placement_scale}.") from None
