"""Options of the network that is trained on top of the base model."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_pairs, check_values, option, settle
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The LoRA: its kind, its size, its learning rates, and what it starts from."""

    network_module: str | None = option(None, "Python module that makes the network, like networks.lora.")
    network_weights: str | None = option(None, "LoRA file to go on training from.", is_path=True)
    network_dim: int | None = option(None, "Rank of the LoRA; unset is 4.", bounds=Bounds(min=1))
    network_alpha: float = option(1.0, "The LoRA is scaled by alpha / rank. 0 is alpha = rank.", bounds=Bounds(min=0))
    network_dropout: float | None = option(
        None, "Probability of dropping a value between the two LoRA matrices.", bounds=Bounds(min=0, below=1)
    )
    network_args: tuple[str, ...] | None = option(
        None, "key=value settings of the network module, like conv_dim=4 conv_alpha=1."
    )
    network_train_unet_only: bool = option(False, "Leave the text encoder as it is.")
    network_train_text_encoder_only: bool = option(False, "Leave the U-Net as it is.")
    unet_lr: float | None = option(
        None,
        "Learning rate of the U-Net's part; unset is --learning_rate, 0 leaves it untrained.",
        bounds=Bounds(min=0),
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        None,
        "Learning rate of the text encoder's part, or one for each text encoder; unset is --learning_rate, 0 leaves it "
        "untrained.",
        bounds=Bounds(min=0),
    )
    text_encoder_lr1: float | None = option(
        None,
        "Learning rate of the first text encoder's part (CLIP-L); unset is --text_encoder_lr, then --learning_rate.",
        bounds=Bounds(min=0),
    )
    text_encoder_lr2: float | None = option(
        None,
        "Learning rate of the second text encoder's part (OpenCLIP bigG); unset as for the first.",
        bounds=Bounds(min=0),
    )
    dim_from_weights: bool = option(False, "Take ranks and alphas from --network_weights.")
    scale_weight_norms: float | None = option(
        None, "Longest norm of each module's LoRA matrix; longer ones are scaled down. 0 is off.", bounds=Bounds(min=0)
    )
    base_weights: tuple[str, ...] | None = option(
        None, "LoRA files that are merged into the base model before training.", is_path=True
    )
    base_weights_multiplier: tuple[float, ...] | None = option(
        None, "Factor of each file of --base_weights; 1 for those without."
    )

    def __post_init__(self) -> None:
        """Check the values; a norm of 0 is no limit."""
        check_values(self)
        check_pairs(self.network_args, "--network_args")
        if self.scale_weight_norms == 0:
            settle(self, "scale_weight_norms", None)
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            raise OptionError(
                "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train. "
                "Leave one of them out."
            )
        if self.dim_from_weights and not self.network_weights:
            raise OptionError("--dim_from_weights takes the ranks from --network_weights, which is not given. Add it.")
        num_files, num_factors = len(self.base_weights or ()), len(self.base_weights_multiplier or ())
        if num_factors > num_files:
            raise OptionError(
                f"--base_weights_multiplier has {num_factors} values for {num_files} files of --base_weights. "
                "Give one per file."
            )
