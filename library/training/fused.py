"""Optimizer steps within the backward pass: gradients are used and freed while others are still to come.

Either each weight steps alone (--fused_backward_pass), or the weights are parted into groups, each of which steps once
the last of its gradients is there (--fused_optimizer_groups). A group steps as if it had an optimizer of its own, so
that optimizers which look at all weights together, and adapt something to them, do so within each group.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import OptionError
from library.training import optimizers

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.optimizer import OptimizerOptions

WEIGHTS, GROUPS = "--fused_backward_pass", "--fused_optimizer_groups"
REHEARSED_STEPS = 3  # some optimizers adapt from the second step on only
TOYS = ((4, 3), (2, 5), (3, 3), (5, 2))  # shapes of the weights that are stepped to see how an optimizer works


@dataclass(frozen=True)
class Parting:
    """The weights of an optimizer, parted into groups that step one after the other."""

    groups: list[dict[str, Any]]  # for the optimizer, cut where a part ends
    parts: tuple[int, ...]  # of each of them: which part it belongs to, rising from 0
    origins: tuple[int, ...]  # of each of them: the index of the group that it was cut from

    @property
    def members(self) -> list[list[int]]:
        """The indices of the groups of each part."""
        return [
            [index for index, part in enumerate(self.parts) if part == wanted] for wanted in sorted(set(self.parts))
        ]


def flag_of(options: OptimizerOptions) -> str | None:
    """Return the option by which steps are taken within the backward pass, None where none is."""
    if options.fused_backward_pass:
        return WEIGHTS
    return GROUPS if options.fused_optimizer_groups else None


def check(options: OptimizerOptions) -> None:
    """Refuse an optimizer that cannot step in parts, found by stepping over toy weights as a whole and in parts.

    Raises: OptionError. --fused_backward_pass: for optimizers that look at all weights at once: Prodigy, D-Adaptation.
        --fused_optimizer_groups: for those that keep something outside of their parameter groups.
    """
    flag = flag_of(options)
    if flag is None:
        return
    name = optimizers.resolve(optimizers.name_of(options)).name
    if flag == WEIGHTS and not works_by_weight(options):
        raise OptionError(
            f"{WEIGHTS} takes one weight's step at a time, and {name} looks at all of them together. "
            f"Take another optimizer, like Adafactor or AdamW8bit, use {GROUPS}, or leave the option out."
        )
    halves = [range(2), range(2, 4)]
    if flag == GROUPS and not _are_alike(_rehearsed(options, halves), _rehearsed_by_group(options, halves)):
        raise OptionError(
            f"{GROUPS} steps parts of the weights one after the other, and {name} keeps something for all of them "
            "together outside of its groups. Take another optimizer or leave the option out."
        )


def works_by_weight(options: OptimizerOptions) -> bool:
    """Return whether the chosen optimizer steps each weight as if it were alone."""
    return _are_alike(_rehearsed(options, [range(4)]), _rehearsed_by_weight(options))


def check_processes(flag: str, num_processes: int) -> None:
    """Refuse several processes. Raises: OptionError."""
    if num_processes > 1:
        raise OptionError(
            f"{flag} is for one process, and there are {num_processes}: their gradients meet only after the backward "
            "pass. Leave it out."
        )


def part(groups: Iterable[Mapping[str, Any]], num_parts: int) -> Parting:
    """Return the groups cut into parts of about equal size, in their order.

    A backward pass meets weights in nearly the reverse of that order, so that a part is complete while most of the
    others are not begun.

    Args:
        groups: {"params": [...], "lr": 1e-4}, as torch takes them.
        num_parts: at most; there are fewer where there are fewer weights, or where single ones are large.
    """
    whole = [{**group, "params": list(group["params"])} for group in groups]
    total = sum(weight.numel() for group in whole for weight in group["params"])
    cut: dict[tuple[int, int], list[Tensor]] = {}  # (part, origin) -> weights
    before = 0
    for origin, group in enumerate(whole):
        for weight in group["params"]:
            middle = before + weight.numel() / 2
            cut.setdefault((int(middle * num_parts / total), origin), []).append(weight)
            before += weight.numel()
    numbers = {number: index for index, number in enumerate(dict.fromkeys(number for number, _ in cut))}
    return Parting(
        [{**whole[origin], "params": weights} for (_, origin), weights in cut.items()],
        tuple(numbers[number] for number, _ in cut),
        tuple(origin for _, origin in cut),
    )


def step_in_backward(optimizer: Optimizer, max_grad_norm: float) -> None:
    """Make each backward pass an optimizer step: of every weight, once its gradient is whole, which is freed then.

    Afterwards `optimizer.step()` finds no gradients: it moves no weight, but counts the step where optimizers count.

    Args:
        optimizer: not accelerate's wrapper of it; one that `check` does not refuse.
        max_grad_norm: to this norm each weight's gradient is clipped on its own; 0: no clipping.
    """
    for index, group in enumerate(optimizer.param_groups):
        learning = (parameter for parameter in group["params"] if parameter.requires_grad)
        for parameter in learning:  # not those that have stopped, of a run that is resumed after that
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


def step_by_group(optimizer: Optimizer, members: Sequence[Sequence[int]], max_grad_norm: float) -> None:
    """Make each backward pass an optimizer step: of every part, once its gradients are whole, which are freed then.

    Afterwards `optimizer.step()` steps only the parts that some gradient did not reach.

    Args:
        optimizer: not accelerate's wrapper of it; one that `check` does not refuse.
        members: the indices of the parameter groups of each part, see `Parting.members`.
        max_grad_norm: to this norm each part's gradient is clipped on its own; 0: no clipping.
    """
    parts = [_Part(optimizer, tuple(indices), max_grad_norm, optimizer.step) for indices in members]
    for each in parts:
        for parameter in each.weights():
            parameter.register_post_accumulate_grad_hook(each.arrive)

    def step_rest(_: Optimizer, closure: object = None) -> None:
        assert closure is None, "the loss is computed before"
        for each in parts:
            each.end_step()

    # a method of this one, as torch's schedules ask of what they wrap
    optimizer.step = types.MethodType(step_rest, optimizer)  # type: ignore[method-assign]


class _Part:
    """Parameter groups that step together, and how far a backward pass has got with them."""

    def __init__(
        self, optimizer: Optimizer, members: tuple[int, ...], max_grad_norm: float, step: Callable[[], Any]
    ) -> None:
        self.optimizer, self.members, self.max_grad_norm, self.step = optimizer, members, max_grad_norm, step
        self.num_weights = len(self.weights())
        self.num_arrived, self.is_stepped = 0, False

    def groups(self) -> list[dict[str, Any]]:
        """Return the part's groups: looked up each time, as loading a state replaces them."""
        return [self.optimizer.param_groups[index] for index in self.members]

    def weights(self) -> list[Tensor]:
        """Return the weights that get gradients."""
        return [weight for group in self.groups() for weight in group["params"] if weight.requires_grad]

    def arrive(self, _: Tensor) -> None:
        """Count a weight's gradient; with the last one, step."""
        self.num_arrived += 1
        if self.num_arrived == self.num_weights:
            self.step_alone()

    def step_alone(self) -> None:
        """Step, as if the part were all there is, and free its gradients."""
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.weights(), self.max_grad_norm)
        everything, own = self.optimizer.param_groups, self.groups()
        self.optimizer.param_groups = own
        try:
            self.step()
        finally:
            self.optimizer.param_groups = everything
        for weight in self.weights():
            weight.grad = None
        self.is_stepped = True

    def end_step(self) -> None:
        """Step unless that is done, and be ready for the next backward pass."""
        if not self.is_stepped:
            self.step_alone()
        self.num_arrived, self.is_stepped = 0, False


def _rehearsed_by_weight(options: OptimizerOptions) -> list[Any]:
    """Return what `_rehearsed` does, of one optimizer that steps weight by weight."""
    weights, slopes = _toys()
    optimizer = _made(options, weights)
    step_in_backward(optimizer, 0)
    return _trained(weights, slopes, [optimizer])


def _rehearsed_by_group(options: OptimizerOptions, parts: Sequence[range]) -> list[Any]:
    """Return what `_rehearsed` does, of one optimizer that steps part by part."""
    weights, slopes = _toys()
    optimizer = _made(options, weights)
    step_by_group(optimizer, parts, 0)
    return _trained(weights, slopes, [optimizer])


def _rehearsed(options: OptimizerOptions, parts: Sequence[range]) -> list[Any]:
    """Return what a few plain steps make of toy weights, with an optimizer for each part of them.

    Returns: the weights, their states, and the settings of their groups.
    """
    weights, slopes = _toys()
    return _trained(weights, slopes, [_made(options, [weights[index] for index in each]) for each in parts])


def _toys() -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    """Return weights, and for each step the gradients they will have."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # some optimizers have no other kernels
    draws = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(shape, generator=draws).to(device) for shape in TOYS] for _ in range(1 + REHEARSED_STEPS)]
    return [torch.nn.Parameter(values) for values in drawn[0]], drawn[1:]


def _made(options: OptimizerOptions, weights: Iterable[torch.nn.Parameter]) -> Optimizer:
    """Return the chosen optimizer with a group for each weight."""
    optimizer = optimizers.build(
        optimizers.resolve(optimizers.name_of(options)),
        optimizers.arguments(options),
        [{"params": [weight]} for weight in weights],
        options.learning_rate or 1.0,
    )
    optimizers.train_mode(optimizer)
    return optimizer


def _trained(weights: list[torch.nn.Parameter], slopes: list[list[Tensor]], made: Sequence[Optimizer]) -> list[Any]:
    """Return the weights, their states and the settings of their groups after a step for each list of gradients."""
    for wanted in slopes:
        terms = [(weight * slope).sum() for weight, slope in zip(weights, wanted, strict=True)]
        torch.stack(terms).sum().backward()
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
    groups = [group for optimizer in made for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    states = [
        dict(optimizer.state[weight])
        for optimizer in made
        for group in optimizer.param_groups
        for weight in group["params"]
    ]
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
