"""Options of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_pairs, check_values, option, settle
from library.options.values import Bounds

NUM_BLOCKS = 23  # of SDXL's U-Net


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What turns gradients into steps."""

    optimizer_type: str = option("", "Name of the optimizer, like AdamW or AdamW8bit. Unset: AdamW.")
    optimizer_args: tuple[str, ...] | None = option(
        None, "key=value settings of the optimizer, like weight_decay=0.01 betas=0.9,0.99."
    )
    learning_rate: float = option(2e-6, "Learning rate of all that has none of its own.", bounds=Bounds(min=0))
    learning_rate_te: float | None = option(
        None,
        "Learning rate of the text encoder; unset is --learning_rate, 0 leaves it untrained.",
        bounds=Bounds(min=0),
    )
    learning_rate_te1: float | None = option(
        None,
        "Learning rate of the first text encoder (CLIP-L); unset is --learning_rate, 0 leaves it untrained.",
        bounds=Bounds(min=0),
    )
    learning_rate_te2: float | None = option(
        None,
        "Learning rate of the second text encoder (OpenCLIP bigG); unset and 0 as for the first.",
        bounds=Bounds(min=0),
    )
    block_lr: str | None = option(
        None,
        "Learning rates of the U-Net's blocks in place of --learning_rate, 23 with commas between: time and sizes, 9 "
        "of the way down, 3 of the middle, 9 of the way up, the output.",
    )
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm. 0 is off.", bounds=Bounds(min=0))
    fused_backward_pass: bool = option(
        False, "Step each weight within the backward pass and free its gradient at once: less memory. For one process."
    )
    fused_optimizer_groups: int | None = option(
        None,
        "Part the weights into this many groups, each stepped and its gradients freed within the backward pass, once "
        "they are all there. For one process. 0 is off.",
        bounds=Bounds(min=0),
    )
    use_8bit_adam: bool = option(False, "Old spelling of --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, "Old spelling of --optimizer_type Lion.")

    def __post_init__(self) -> None:
        """Check the values; an old spelling becomes the optimizer's name."""
        check_values(self)
        check_pairs(self.optimizer_args, "--optimizer_args")
        self._check_fused()
        self._check_blocks()
        old_spellings = {
            "--use_8bit_adam": "AdamW8bit" if self.use_8bit_adam else "",
            "--use_lion_optimizer": "Lion" if self.use_lion_optimizer else "",
        }
        for flag, name in old_spellings.items():
            if not name:
                continue
            if self.optimizer_type and self.optimizer_type.lower() != name.lower():
                raise OptionError(
                    f"{flag} means {name}, but {self.optimizer_type} is chosen too. Leave one of them out."
                )
            settle(self, "optimizer_type", name)

    @property
    def text_encoder_rates(self) -> tuple[float | None, float | None]:
        """The rates of the first and the second text encoder; None: the U-Net's."""
        own = (self.learning_rate_te1, self.learning_rate_te2)
        first, second = (self.learning_rate_te if rate is None else rate for rate in own)
        return first, second

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """The rates of the U-Net's blocks; None: all that of the U-Net."""
        return None if self.block_lr is None else tuple(float(text) for text in self.block_lr.split(","))

    def _check_blocks(self) -> None:
        try:
            rates = self.block_rates
        except ValueError:
            raise OptionError(f"--block_lr must be {NUM_BLOCKS} numbers with commas, got {self.block_lr}.") from None
        if rates is not None and (len(rates) != NUM_BLOCKS or not all(0 <= rate < math.inf for rate in rates)):
            raise OptionError(
                f"--block_lr must be {NUM_BLOCKS} rates of at least 0, got {len(rates)}: {self.block_lr}. "
                "Give one for each block."
            )

    def _check_fused(self) -> None:
        if self.fused_optimizer_groups and self.fused_backward_pass:
            raise OptionError(
                "--fused_optimizer_groups steps the weights in groups and --fused_backward_pass each alone. Leave one "
                "of them out."
            )
        if self.fused_optimizer_groups == 1:
            raise OptionError(
                "--fused_optimizer_groups 1 is all weights in one group, whose gradients are there together: nothing "
                "is freed early. Give at least 2."
            )
