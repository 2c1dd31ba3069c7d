"""Optimizer steps within the backward pass: each weight's gradient is used and freed as soon as it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import OptionError
from library.training import optimizers

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.optimizer import OptimizerOptions

FLAG = "--fused_backward_pass"
REHEARSED_STEPS = 3  # some optimizers adapt from the second step on only


def check(options: OptimizerOptions) -> None:
    """Refuse an optimizer that does not work weight by weight, found by stepping both ways over two toy weights.

    Raises: OptionError for optimizers that look at all weights at once: Prodigy, D-Adaptation, schedule-free ones.
    """
    if not options.fused_backward_pass:
        return
    together, alone = _rehearsed(options, is_fused=False), _rehearsed(options, is_fused=True)
    if not _are_alike(together, alone):
        name = optimizers.resolve(optimizers.name_of(options)).name
        raise OptionError(
            f"{FLAG} takes one weight's step at a time, and {name} looks at all of them together. "
            "Take another optimizer, like Adafactor or AdamW8bit, or leave the option out."
        )


def check_processes(num_processes: int) -> None:
    """Refuse several processes. Raises: OptionError."""
    if num_processes > 1:
        raise OptionError(
            f"{FLAG} is for one process, and there are {num_processes}: their gradients meet only after the backward "
            "pass. Leave it out."
        )


def step_in_backward(optimizer: Optimizer, max_grad_norm: float) -> None:
    """Make each backward pass an optimizer step: of every weight, once its gradient is whole, which is freed then.

    Afterwards `optimizer.step()` finds no gradients and changes nothing.

    Args:
        optimizer: not accelerate's wrapper of it; one that `check` does not refuse.
        max_grad_norm: to this norm each weight's gradient is clipped on its own; 0: no clipping.
    """
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_Step(optimizer, index, max_grad_norm))


class _Step:
    """The hook of one weight."""

    def __init__(self, optimizer: Optimizer, index: int, max_grad_norm: float) -> None:
        self.optimizer, self.index, self.max_grad_norm = optimizer, index, max_grad_norm

    def __call__(self, parameter: Tensor) -> None:
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_([parameter], self.max_grad_norm)
        groups = self.optimizer.param_groups
        # looked up at each step, as loading a state replaces the groups; the schedule has written its rate there
        self.optimizer.param_groups = [{**groups[self.index], "params": [parameter]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None


def _rehearsed(options: OptimizerOptions, *, is_fused: bool) -> list[Any]:
    """Return what a few steps make of two toy weights, of their states and of the settings of their groups."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # some optimizers have no other kernels
    draws = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (2, 5))
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draws).to(device)) for shape in shapes]
    optimizer = optimizers.build(
        optimizers.resolve(optimizers.name_of(options)),
        optimizers.arguments(options),
        [{"params": [weight]} for weight in weights],
        options.learning_rate or 1.0,
    )
    optimizers.train_mode(optimizer)
    if is_fused:
        step_in_backward(optimizer, 0)
    for _ in range(REHEARSED_STEPS):
        slopes = [torch.randn(shape, generator=draws).to(device) for shape in shapes]
        torch.stack([(weight * slope).sum() for weight, slope in zip(weights, slopes, strict=True)]).sum().backward()
        if not is_fused:
            optimizer.step()
            optimizer.zero_grad()
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    states = [dict(optimizer.state[weight]) for weight in weights]
    return [[weight.detach() for weight in weights], states, settings]


def _are_alike(one: Any, other: Any) -> bool:
    """Return whether two nested values are the same, but for rounding."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.allclose(one.float(), other.float())
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_are_alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_are_alike, one, other))
    return bool(one == other)
