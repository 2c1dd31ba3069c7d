"""Steps of weights in bf16 that are not lost: computed in float32, and rounded up or down by chance.

bf16 tells numbers apart that differ by one part in 128 to 256. An optimizer's step is mostly smaller than half of
that, and rounded to the nearest it leaves the weight as it was, for ever. Rounded by chance, up as often as the step is
part of that distance, it is there on average. The same is done to what the optimizer keeps in bf16, such as Adam's
averages.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.training import draws

if TYPE_CHECKING:
    from torch.optim import Optimizer

COUNT = "rounded_steps"  # in each group of the optimizer, and so in the state of a run
AT_ONCE = 2**23  # weights that are there in float32 together, with their gradients and what the optimizer keeps of them


def attach(optimizer: Optimizer, seed: int) -> None:
    """Make the optimizer step its bf16 weights in float32, and round them and what it keeps of them by chance.

    What is kept stays in the formats that the optimizer chooses for bf16 weights, so that only a few weights at a time
    need more memory. Draws are a function of the seed, the number of steps and the weight: a resumed run repeats them,
    and processes that share a seed round alike. To be called before `fused.step_in_backward` or `fused.step_by_group`.

    Args:
        optimizer: not accelerate's wrapper of it; one that can step weight by weight, see `fused.works_by_weight`.
        seed: of the run.
    """
    for group in optimizer.param_groups:
        group.setdefault(COUNT, 0)
    rounder = _Rounder(optimizer, seed, optimizer.step)

    def step(_: Optimizer, closure: object = None) -> None:
        assert closure is None, "the loss is computed before"
        rounder.step()

    # a method of this one, as torch's schedules ask of what they wrap
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


@dataclass
class _Rounder:
    """What a step of bf16 weights needs to know."""

    optimizer: Optimizer
    seed: int
    plain_step: Callable[[], Any]
    numbers: dict[int, int] = field(default_factory=dict)  # of each weight, by its id
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.numbers = {id(weight): number for number, weight in enumerate(weights)}

    def step(self) -> None:
        """Step the groups that the optimizer has now: all of them, or what is stepped within the backward pass."""
        groups = self.optimizer.param_groups
        hidden: list[tuple[Tensor, Tensor]] = []
        try:
            for group in groups:
                for weights in portions(group["params"]):
                    self.step_portion(group, weights)
                    hidden += [(weight, weight.grad) for weight in weights if weight.grad is not None]
                    for weight in weights:
                        weight.grad = None
            # of the rest, and for what optimizers count in their groups, of which the portions had copies
            self.optimizer.param_groups = groups
            self.plain_step()
        finally:
            self.optimizer.param_groups = groups
            for weight, gradient in hidden:
                weight.grad = gradient
        for group in groups:
            group[COUNT] = group.get(COUNT, 0) + 1

    def step_portion(self, group: dict[str, Any], weights: Sequence[Tensor]) -> None:
        """Step some weights of a group by way of float32 copies."""
        state = self.optimizer.state
        formats = self.formats_kept(group, weights)
        copies = [nn.Parameter(weight.detach().float()) for weight in weights]
        for weight, copy in zip(weights, copies, strict=True):
            assert weight.grad is not None, "a portion has gradients"
            copy.grad = weight.grad.float()
            if weight in state:
                state[copy] = {key: _widened(value) for key, value in state[weight].items()}
        self.optimizer.param_groups = [{**group, "params": copies}]
        try:
            self.plain_step()
            stepped = [state.pop(copy, {}) for copy in copies]
        finally:
            for copy in copies:
                state.pop(copy, None)
        seed = draws.seed_of(self.seed, group.get(COUNT, 0), self.numbers[id(weights[0])])
        generator = self.generators.setdefault(weights[0].device, torch.Generator(weights[0].device))
        generator.manual_seed(seed)
        round_into([weight.detach() for weight in weights], [copy.detach() for copy in copies], generator)
        for weight, kept, wanted in zip(weights, stepped, formats, strict=True):
            state[weight] = {key: _narrowed(value, wanted.get(key), generator) for key, value in kept.items()}

    def formats_kept(self, group: dict[str, Any], weights: Sequence[Tensor]) -> list[dict[str, torch.dtype]]:
        """Return the formats of what the optimizer keeps of each weight, by key.

        Those that it has; before the first step, those that it would choose, found by a step of small pieces in bf16
        that are then thrown away.
        """
        state = self.optimizer.state
        new = [weight for weight in weights if weight not in state]
        trials = [nn.Parameter(torch.zeros([min(side, 2) for side in weight.shape]).to(weight)) for weight in new]
        for trial in trials:
            trial.grad = torch.zeros_like(trial)
        if trials:
            self.optimizer.param_groups = [{**group, "params": trials}]
            self.plain_step()
        kept = {id(weight): state.pop(trial, {}) for weight, trial in zip(new, trials, strict=True)}
        return [_formats(kept[id(weight)] if id(weight) in kept else state[weight]) for weight in weights]


def portions(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the bf16 weights that have gradients, a few at a time: of one device, at most AT_ONCE numbers or one."""
    portion: list[Tensor] = []
    size = 0
    for weight in weights:
        if weight.grad is None or weight.dtype != torch.bfloat16:
            continue
        if portion and (size + weight.numel() > AT_ONCE or weight.device != portion[0].device):
            yield portion
            portion, size = [], 0
        portion.append(weight)
        size += weight.numel()
    if portion:
        yield portion


def round_into(targets: Sequence[Tensor], sources: Sequence[Tensor], generator: torch.Generator) -> None:
    """Write float32 numbers into bf16 tensors of the same shapes, rounded up or down so that the mean is right."""
    flat = torch.cat([source.flatten() for source in sources])
    rounded = rounded_by_chance(flat, generator).split([source.numel() for source in sources])
    torch._foreach_copy_(list(targets), [part.view_as(each) for part, each in zip(rounded, sources, strict=True)])


def rounded_by_chance(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values in bf16: up with the probability that they are above the number below, in magnitude.

    bf16 is the upper half of float32. A random number in the lower half, added, carries into the upper one with just
    that probability. What is infinite or no number stays so.
    """
    chance = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    chance.masked_fill_(~values.isfinite(), 0)  # a carry would make a number of what is none
    return (chance + values.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _formats(kept: dict[str, Any]) -> dict[str, torch.dtype]:
    return {key: value.dtype for key, value in kept.items() if isinstance(value, Tensor)}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _narrowed(value: Any, dtype: torch.dtype | None, generator: torch.Generator) -> Any:
    """Return what an optimizer keeps in the format that it is kept in."""
    if not isinstance(value, Tensor) or dtype != torch.bfloat16 or value.dtype != torch.float32:
        return value
    return rounded_by_chance(value, generator)
