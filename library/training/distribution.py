"""How a run is spread over processes: what accelerate's DDP, FSDP and DeepSpeed are told, and what they ask for.

All three are accelerate's. DDP is what several processes do unless something else is asked for: every process holds
all trained weights. FSDP, chosen with `accelerate launch --use_fsdp --fsdp_version 2`, and DeepSpeed, chosen with
--deepspeed, share weights, gradients or the optimizer's state out, so that no process need have them whole.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from library.errors import OptionError
from library.options.sharing import check_sharing

if TYPE_CHECKING:
    from library.options import Options
    from library.options.deepspeed import DeepSpeedOptions
    from library.options.training import TrainingOptions

log = logging.getLogger(__name__)

USE_DEEPSPEED, USE_FSDP, FSDP_VERSION = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"


def check(options: Options) -> None:
    """Refuse what cannot be run here: no package, no launcher, both ways at once, the old FSDP.

    Raises: OptionError.
    """
    is_deepspeed_wanted = options.deepspeed.deepspeed or is_asked_for(USE_DEEPSPEED)
    if is_asked_for(USE_FSDP):
        if is_deepspeed_wanted:
            raise OptionError("DeepSpeed and FSDP exclude each other. Leave out --deepspeed, or --use_fsdp.")
        if os.environ.get(FSDP_VERSION, "1") != "2":
            raise OptionError(
                "FSDP 1 hides the weights that a network's file is made of. Use accelerate launch --fsdp_version 2."
            )
        check_sharing(options, "FSDP")
    if not is_deepspeed_wanted:
        return
    if not options.deepspeed.deepspeed:
        raise OptionError("accelerate is to start DeepSpeed, which is switched on by --deepspeed here. Add it.")
    if importlib.util.find_spec("deepspeed") is None:
        raise OptionError("--deepspeed needs the package deepspeed, which is not installed: pip install deepspeed")
    if "LOCAL_RANK" not in os.environ:
        raise OptionError(
            "--deepspeed needs processes that know of each other. Start with accelerate launch --use_deepspeed "
            "train_network.py ..., or with torchrun."
        )


def check_validation(options: DeepSpeedOptions, num_images: int) -> None:
    """Refuse held-back images where no process can compute alone. Raises: OptionError."""
    if options.deepspeed and options.zero_stage == 3 and num_images:
        raise OptionError(
            "--zero_stage 3 has no weights for validation, as the processes measure different images. "
            "Use --zero_stage 2, or hold no images back."
        )


def is_asked_for(name: str) -> bool:
    """Return whether `accelerate launch` has switched this on, which it tells by an environment variable."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def accelerator(
    training: TrainingOptions,
    deepspeed: DeepSpeedOptions,
    *,
    max_grad_norm: float,
    batch_size: int,
    may_leave_weights_out: bool,
    **more: Any,
) -> Accelerator:
    """Return accelerate's view of the machine: device, processes, and how they share the work.

    Args:
        training: for what DDP is told.
        deepspeed: for DeepSpeed's plugin.
        max_grad_norm: DeepSpeed clips by itself.
        batch_size: images a process has in a batch, at most.
        may_leave_weights_out: whether a step may use only some of the trained weights.
        more: other arguments of Accelerator.

    Raises: OptionError.
    """
    plugin = None
    if deepspeed.deepspeed:
        plugin = deepspeed_plugin(deepspeed, training.gradient_accumulation_steps, max_grad_norm)
    AcceleratorState._reset_state()  # else a second run in this process could not have another precision
    before = os.environ.get(USE_DEEPSPEED)
    made = Accelerator(
        kwargs_handlers=handlers(training, may_leave_weights_out),
        deepspeed_plugin=plugin,
        # DDP and FSDP leave the accumulation to the loop; DeepSpeed has to know of it
        gradient_accumulation_steps=1 if plugin is None else training.gradient_accumulation_steps,
        **more,
    )
    if before is None:  # accelerate switches DeepSpeed on for all runs to come in this process
        os.environ.pop(USE_DEEPSPEED, None)
    check_processes(made, deepspeed)
    if is_deepspeed(made):
        fill_in(made, batch_size, max_grad_norm)
    if made.distributed_type == DistributedType.FSDP:
        # accelerate fails at a network's alphas there, and every process has loaded its models already
        made.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return made


def handlers(training: TrainingOptions, may_leave_weights_out: bool) -> list[Any]:
    """Return what DDP and the processes' connection are told."""
    told: list[Any] = [
        DistributedDataParallelKwargs(
            broadcast_buffers=False,  # they are constants, and there are hundreds
            find_unused_parameters=may_leave_weights_out,
            gradient_as_bucket_view=training.ddp_gradient_as_bucket_view,
            static_graph=training.ddp_static_graph,
        )
    ]
    if training.ddp_timeout is not None:
        told.append(InitProcessGroupKwargs(timeout=timedelta(minutes=training.ddp_timeout)))
    return told


def deepspeed_plugin(
    options: DeepSpeedOptions, gradient_accumulation_steps: int, max_grad_norm: float
) -> DeepSpeedPlugin:
    """Return accelerate's plugin for DeepSpeed."""
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_clipping=max_grad_norm,
        zero_stage=options.zero_stage,
        offload_optimizer_device=options.offload_optimizer_device or "none",
        offload_optimizer_nvme_path=options.offload_optimizer_nvme_path,
        offload_param_device=options.offload_param_device or "none",
        offload_param_nvme_path=options.offload_param_nvme_path,
        zero3_init_flag=False,  # it would share out the models that are not trained, which then nothing puts together
        zero3_save_16bit_model=options.zero3_save_16bit_model,
    )
    # On by default: puts another F.linear in place of torch's in the whole process, for a little memory and other bits.
    plugin.deepspeed_config["zero_optimization"]["memory_efficient_linear"] = False
    if options.fp16_master_weights_and_gradients:
        plugin.deepspeed_config["fp16"] = {"enabled": True, "fp16_master_weights_and_grads": True}
    return plugin


def fill_in(accelerator: Accelerator, batch_size: int, max_grad_norm: float) -> None:
    """Tell DeepSpeed what accelerate reads off its own loaders, which are not used here, or leaves to a default."""
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    if plugin.is_auto("train_micro_batch_size_per_gpu"):
        config["train_micro_batch_size_per_gpu"] = batch_size
    if plugin.is_auto("gradient_clipping") or "gradient_clipping" not in config:
        config["gradient_clipping"] = max_grad_norm  # 0 must be said: without a word DeepSpeed clips to 1


def check_processes(accelerator: Accelerator, deepspeed: DeepSpeedOptions) -> None:
    """Refuse what accelerate lets pass in silence: processes that know nothing of each other, and no DeepSpeed.

    Raises: OptionError.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise OptionError(
            f"{started} processes were started, but without GPUs accelerate makes each train alone. "
            "Set ACCELERATE_USE_CPU=true to let them train together on the CPU."
        )
    if deepspeed.deepspeed and not is_deepspeed(accelerator):
        raise OptionError("--deepspeed: accelerate was told to use the CPU, where it does without. Leave it out.")
    if is_asked_for(USE_FSDP) and accelerator.distributed_type != DistributedType.FSDP:
        log.warning("FSDP was asked for, but accelerate uses it on several GPUs only: nothing is shared out")


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed trains."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_shared_out(accelerator: Accelerator) -> bool:
    """Return whether a process may have only a part of the weights or of the optimizer's state."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def prepare(
    accelerator: Accelerator, step: nn.Module, optimizer: Any, autocast_dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """Return the step and the optimizer, as accelerate wraps them.

    Args:
        accelerator: of the run.
        step: what computes the losses.
        optimizer: of its weights.
        autocast_dtype: what most of the arithmetic is done in; None: float32 throughout.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        step._no_split_modules = blocks_of(step)  # type: ignore[assignment]  # accelerate asks a model for them
    if is_deepspeed(accelerator) and autocast_dtype is not None:
        # accelerate leaves that to DeepSpeed, which casts the weights of the step but not what is computed with them
        step.forward = torch.autocast(accelerator.device.type, autocast_dtype)(step.forward)
    prepared = accelerator.prepare(step, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        blocks = sum(isinstance(module, FSDPModule) for module in step.modules()) - 1  # without the step itself
        log.info("FSDP gathers %d blocks one at a time, and the rest at once", blocks)
    return prepared


def blocks_of(step: nn.Module) -> list[str]:
    """Return the names of classes whose modules FSDP may gather one at a time, instead of all weights at once.

    The models name them; networks, which are small, name none.
    """
    names = {name for module in step.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return sorted(names & {type(module).__name__ for module in step.modules()})


def innermost(optimizer: Any) -> Any:
    """Return the optimizer below all wrappers, whose learning rates count; DeepSpeed may have put in another."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def gradients_of(accelerator: Accelerator, step: nn.Module, *, is_update: bool) -> Iterator[None]:
    """Return a context for the forward and backward pass of one micro-batch: processes exchange gradients once a step.

    Args:
        accelerator: of the run.
        step: as prepared.
        is_update: whether the optimizer steps after this micro-batch.
    """
    accelerator.sync_gradients = is_update  # DeepSpeed steps inside the backward pass where this says so
    with nullcontext() if is_update else accelerator.no_sync(step):
        yield


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """Add the gradient of a loss () that is divided by the accumulation steps already."""
    accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed(accelerator) else {}))
