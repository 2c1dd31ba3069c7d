"""Gradient checkpointing, also with checkpoints that wait in main memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


def offloaded(block: nn.Module, *inputs: Any) -> Any:
    """Return what a block makes of its inputs; only these are kept for the backward pass, and in main memory.

    A stand-in for the function that diffusers and transformers call for each checkpointed block. Inputs that are in
    main memory already are not copied.

    Args:
        block: recomputed in the backward pass.
        inputs: tensors and whatever else the block takes.
    """
    is_on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in inputs)
    with save_on_cpu(pin_memory=is_on_gpu):
        return checkpoint(block.__call__, *inputs, use_reentrant=False)


def enable(denoiser: nn.Module, text_encoders: Iterable[nn.Module], *, is_offloaded: bool) -> None:
    """Trade time for memory: the activations of these models are computed twice.

    They are put in train mode, without which transformers ignores the setting; none has dropout.

    Args:
        denoiser: a model of diffusers.
        text_encoders: models of transformers; those that are not trained need none.
        is_offloaded: the denoiser's checkpoints wait in main memory; a text encoder's are some 100 kB each.
    """
    model: Any = denoiser
    model.enable_gradient_checkpointing(offloaded if is_offloaded else None)
    denoiser.train()
    for text_encoder in text_encoders:
        reader: Any = text_encoder
        switch = getattr(reader, "activation_checkpointing_enable", None)  # its name from transformers 5 on
        (switch or reader.gradient_checkpointing_enable)({"use_reentrant": False})
        text_encoder.train()
