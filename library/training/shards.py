"""What FSDP shares out, put together for a while: trained weights, and what an optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

OF_FSDP = "torch.distributed.fsdp"


@contextmanager
def whole_weights(step: nn.Module, *, is_kept: bool = False) -> Iterator[None]:
    """Return a context in which every process has all trained weights whole: for saving, previews and validation.

    All processes enter it together, and none trains inside. Costs nothing where each process has them whole anyway.

    Args:
        step: as prepared.
        is_kept: whether what is written into the weights inside, the same in all processes, is to be kept. Otherwise
            it may be lost, and with DeepSpeed's stage 3 always is.
    """
    if any(hasattr(weight, "ds_id") for weight in step.parameters()):  # ZeRO stage 3
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(step.parameters())):
            yield
        return
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves them gathered in FSDP's own way
    parts: list[tuple[nn.Module, str, Any]] = [
        (module, name, weight)
        for module in step.modules()
        for name, weight in module.named_parameters(recurse=False)
        if isinstance(weight, DTensor)
    ]
    for module, name, weight in parts:
        module.register_parameter(name, nn.Parameter(_whole(weight), weight.requires_grad))
    try:
        with _without_hooks(step):
            yield
        if is_kept:
            for module, name, weight in parts:
                _write(weight, module.get_parameter(name))
    finally:
        for module, name, weight in parts:
            module.register_parameter(name, weight)


@contextmanager
def _without_hooks(step: nn.Module) -> Iterator[None]:
    """Return a context without FSDP's hooks, which would put shared-out weights in the place of the whole ones.

    And processes would wait there for each other, which draw different pictures.
    """
    tables: list[dict[int, Any]] = [
        table
        for module in step.modules()
        for table in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks)
    ]
    before = [list(table.items()) for table in tables]
    for table, hooks in zip(tables, before, strict=True):
        for key, hook in hooks:
            owner = type(hook.__self__) if hasattr(hook, "__self__") else hook
            if owner.__module__.startswith(OF_FSDP):
                del table[key]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def whole_state(saved: dict[str, Any], *, is_wanted: bool) -> dict[str, Any]:
    """Return an optimizer's state with what is shared out put together; all processes call it together.

    Args:
        saved: from `state_dict`.
        is_wanted: whether this process has a use for it; in others what is put together is dropped at once.

    Returns: what is not shared out as it is, the rest on the CPU; nothing of the weights where it is not wanted.
    """
    state: dict[Any, dict[str, Any]] = {}
    for number, kept in saved["state"].items():
        state[number] = {}
        for key, value in kept.items():
            whole = _whole(value) if isinstance(value, DTensor) else value
            if is_wanted:
                state[number][key] = whole.cpu() if isinstance(value, DTensor) else value
    return {**saved, "state": state}


def shared_state(optimizer: Any, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an optimizer's whole state, shared out as the weights are; all processes call it together.

    Args:
        optimizer: as accelerate wraps it.
        saved: from `whole_state`, the same in all processes.

    Raises: ValueError if it is of other groups.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(saved["state"])
    for number, weight in zip(numbers, weights, strict=True):
        if isinstance(weight, DTensor) and number in state:
            state[number] = {key: _shared(value, weight) for key, value in state[number].items()}
    return {**saved, "state": state}


def _shared(value: Any, weight: DTensor) -> Any:
    """Return what an optimizer keeps of a weight, shared out like it; Adafactor's sums of rows whole everywhere."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    placements = weight.placements if value.shape == weight.shape else [Replicate()] * weight.device_mesh.ndim
    return distribute_tensor(value, weight.device_mesh, placements)


def _whole(weight: DTensor) -> Tensor:
    """Return a tensor of which each process has a part, gathered where processes can exchange it."""
    placed: Any = weight.detach().to(weight.device_mesh.device_type)
    whole: Tensor = placed.full_tensor()
    return whole


@torch.no_grad()
def _write(weight: DTensor, whole: Tensor) -> None:
    weight.copy_(distribute_tensor(whole.detach(), weight.device_mesh, weight.placements))
