"""Options of the run: its length, its number formats, its processes."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option, settle
from library.options.values import Bounds


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long and in which way training runs."""

    max_train_steps: int = option(1600, "Number of optimizer steps.", bounds=Bounds(min=1))
    max_train_epochs: int | None = option(
        None, "Number of epochs; decides instead of --max_train_steps.", bounds=Bounds(min=1)
    )
    initial_epoch: int | None = option(
        None,
        "Epoch to begin with, counted from 1; the learning rate's curve begins at its own start. 0 is off.",
        bounds=Bounds(min=0),
    )
    initial_step: int | None = option(
        None, "Steps that count as done; beats --initial_epoch and a resumed state's own.", bounds=Bounds(min=0)
    )
    stop_text_encoder_training: int | None = option(
        None, "Leave the text encoder as it is after N optimizer steps; 0 or less: from the start. Unset: never."
    )
    train_text_encoder: bool = option(False, "Train the text encoders too, not the U-Net alone.")
    seed: int | None = option(
        None, "Seed of every random draw; unset: a random one, which is recorded.", bounds=Bounds(min=0, max=2**32 - 1)
    )
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients are added up for one optimizer step.", bounds=Bounds(min=1)
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them: less memory, slower."
    )
    cpu_offload_checkpointing: bool = option(
        False,
        "Keep the U-Net's checkpoints in main memory: still less GPU memory. Switches --gradient_checkpointing on.",
    )
    blocks_to_swap: int | None = option(
        None,
        "Keep this many blocks of the model in main memory and fetch them when they are needed; at most all but two. "
        "0 is off.",
        bounds=Bounds(min=0),
    )
    max_data_loader_n_workers: int = option(
        8, "Processes that load images, at most one per CPU core; 0 loads in the main process.", bounds=Bounds(min=0)
    )
    mixed_precision: str = option(
        "no", "Number format of the frozen weights and of most of the arithmetic.", choices=("no", "fp16", "bf16")
    )
    full_fp16: bool = option(False, "Keep the trained weights in fp16 too. Needs --mixed_precision fp16.")
    full_bf16: bool = option(False, "Keep the trained weights in bf16 too. Needs --mixed_precision bf16.")
    fp8_base: bool = option(
        False, "Store the frozen weights in one byte each (float8_e4m3fn). Needs --mixed_precision fp16 or bf16."
    )
    fp8_base_unet: bool = option(False, "The same for the U-Net alone; beats --fp8_base.")
    xformers: bool = option(
        False, "Use the attention of the xformers package instead of torch's scaled_dot_product_attention."
    )
    ema_decay: float | None = option(
        None,
        "Keep a moving average of the trained weights, in which the old average has this share after each step, like "
        "0.999. Needs --save_ema. 0 is off.",
        bounds=Bounds(min=0, below=1),
    )
    torch_compile: bool = option(False, "Compile the models with torch.compile.")
    dynamo_backend: str = option(
        "inductor",
        "Backend of --torch_compile.",
        choices=(
            "no", "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt",
            "onnxrt", "tensort", "ipex", "tvm",
        ),
    )  # fmt: skip
    ddp_timeout: int | None = option(
        None, "Minutes that the processes of one run wait for each other; unset: torch's default.", bounds=Bounds(min=1)
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, "Let gradients be views of the buffers that several processes exchange: less memory."
    )
    ddp_static_graph: bool = option(False, "Promise that each step of several processes uses the same weights.")

    def __post_init__(self) -> None:
        """Check the values."""
        check_values(self)
        for name in ("initial_epoch", "blocks_to_swap", "ema_decay"):
            if getattr(self, name) == 0:
                settle(self, name, None)
        if self.cpu_offload_checkpointing:
            settle(self, "gradient_checkpointing", True)
            if self.blocks_to_swap is not None:
                raise OptionError(
                    f"--blocks_to_swap {self.blocks_to_swap} cannot be with --cpu_offload_checkpointing: both use the "
                    "way to main memory. Leave one of them out."
                )
        for is_full, name in ((self.full_fp16, "fp16"), (self.full_bf16, "bf16")):
            if is_full and self.mixed_precision != name:
                raise OptionError(
                    f"--full_{name} needs --mixed_precision {name}, got {self.mixed_precision}. Change one of them."
                )
        for is_float8, name in ((self.fp8_base, "fp8_base"), (self.fp8_base_unet, "fp8_base_unet")):
            if is_float8 and self.mixed_precision == "no":
                raise OptionError(f"--{name} needs --mixed_precision fp16 or bf16 to compute in. Add one of them.")
        if self.torch_compile and self.dynamo_backend == "no":
            raise OptionError("--torch_compile with --dynamo_backend no compiles nothing. Leave one of them out.")
