"""Options of DeepSpeed, which shares the memory of training out among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import OptionError
from library.options.declare import check_values, option

NVME = "nvme"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """What accelerate's DeepSpeedPlugin is made from."""

    deepspeed: bool = option(False, "Train through DeepSpeed, a package to be installed beside this one.")
    zero_stage: int = option(
        2,
        "What the processes share out among them: 0 nothing, 1 the optimizer's state, 2 the gradients too, "
        "3 the trained weights too.",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = option(
        None,
        "Where the optimizer's state is kept instead of the GPU; nvme needs --zero_stage 3.",
        choices=("cpu", NVME),
    )
    offload_optimizer_nvme_path: str | None = option(
        None, "Folder on a fast disk, for --offload_optimizer_device nvme.", is_path=True
    )
    offload_param_device: str | None = option(
        None, "Where the trained weights are kept instead of the GPU; needs --zero_stage 3.", choices=("cpu", NVME)
    )
    offload_param_nvme_path: str | None = option(
        None, "Folder on a fast disk, for --offload_param_device nvme.", is_path=True
    )
    zero3_save_16bit_model: bool = option(
        False, "Let DeepSpeed gather 16-bit weights where it saves a model itself; needs --zero_stage 3."
    )
    fp16_master_weights_and_gradients: bool = option(
        False, "Keep the optimizer's copies in fp16 too. Needs --zero_stage 2 and --offload_optimizer_device cpu."
    )

    def __post_init__(self) -> None:
        """Check the values; without --deepspeed only each for itself."""
        check_values(self)
        if not self.deepspeed:
            return
        self._check_offloading()
        if self.fp16_master_weights_and_gradients and (self.zero_stage, self.offload_optimizer_device) != (2, "cpu"):
            raise OptionError(
                "--fp16_master_weights_and_gradients needs --zero_stage 2 and --offload_optimizer_device cpu. "
                "Add them, or leave it out."
            )

    def _check_offloading(self) -> None:
        for name, least in (("optimizer", 1), ("param", 3)):
            device = getattr(self, f"offload_{name}_device")
            if device is None:
                continue
            needed = 3 if device == NVME else least
            if self.zero_stage < needed:
                raise OptionError(
                    f"--offload_{name}_device {device} needs --zero_stage {needed} or more, got {self.zero_stage}. "
                    "Change one of them."
                )
            if device == NVME and not getattr(self, f"offload_{name}_nvme_path"):
                raise OptionError(f"--offload_{name}_device nvme needs --offload_{name}_nvme_path=FOLDER. Add it.")
        if self.zero3_save_16bit_model and self.zero_stage != 3:
            raise OptionError(
                f"--zero3_save_16bit_model needs --zero_stage 3, got {self.zero_stage}. Change one of them."
            )
