"""An exponential moving average of the trained weights: steadier than what the last steps happened to make of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import CheckpointError
from library.training.saving import Companion

log = logging.getLogger(__name__)

MARK = "_ema"  # in the names of files: name_ema.safetensors
STEPS = "steps"  # in the header of an average that is part of a state
AT_ONCE = 2**23  # weights that are cast to float32 together


@dataclass(frozen=True)
class Snapshot:
    """An average as a state keeps it."""

    weights: Mapping[str, Tensor]  # float32
    steps: int  # that it was updated


class Average:
    """The average of weights that change with every step.

    The n-th step counts as much as its decay leaves: min(decay, n / (9 + n)), so that the weights before the training,
    with which the average begins, do not weigh for thousands of steps.
    """

    def __init__(self, modules: Sequence[nn.Module], trained: Iterable[nn.Parameter], decay: float) -> None:
        """Begin with the weights as they are; the average stands where they do, in float32.

        Args:
            modules: that are saved; a weight's name is its module's number and its name there.
            trained: the weights among theirs that are averaged; the others are saved as they are.
            decay: 0 to 1, the share of the old average in the new one.
        """
        self.decay = decay
        self.steps = 0
        self._modules = tuple(modules)
        self._live = named(self._modules)
        wanted = {id(weight) for weight in trained}
        self._weights = {name: weight for name, weight in self._live.items() if id(weight) in wanted}
        self._averages: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew, with the weights as they are."""
        self.steps = 0
        self._averages = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    def update(self) -> None:
        """Take the weights after an optimizer step into the average; waits for no device."""
        self.steps += 1
        share = 1 - decay_at(self.steps, self.decay)
        for names in _portions(self._weights):
            current = [self._weights[name].detach().float() for name in names]
            torch._foreach_lerp_([self._averages[name] for name in names], current, share)

    @contextmanager
    def in_place(self, *, is_float32: bool) -> Iterator[None]:
        """Return a context in which the modules have the average for their weights; nothing trains inside.

        Other parameters take the place of the trained ones, which are not touched: their values, and what DDP and an
        optimizer within the backward pass have hung on them, are there afterwards.

        Args:
            is_float32: as it is kept; otherwise in the weights' own format, which costs memory where that is another.
        """
        places = [
            (module, name, weight)
            for root in self._modules
            for module in root.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        names = {id(weight): name for name, weight in self._weights.items()}
        swapped = [(module, name, weight) for module, name, weight in places if id(weight) in names]
        stand_ins = {
            id(weight): nn.Parameter(
                self._averages[names[id(weight)]].to(torch.float32 if is_float32 else weight.dtype),
                requires_grad=False,
            )
            for _, _, weight in swapped
        }
        try:
            for module, name, weight in swapped:
                module._parameters[name] = stand_ins[id(weight)]
            yield
        finally:
            for module, name, weight in swapped:
                module._parameters[name] = weight

    def snapshot(self) -> Snapshot:
        """Return what a state has to keep."""
        return Snapshot(dict(self._averages), self.steps)

    def restore(self, snapshot: Snapshot | None, origin: str) -> None:
        """Go on from a state, whose weights are in place; without an average in it, begin with these.

        Weights that the state averaged and that no longer learn, like a text encoder's that has been stopped, are
        averaged on.

        Raises: CheckpointError if it is of other weights.
        """
        if snapshot is None:
            log.warning("%s: was saved without --ema_decay. The average begins with the weights it has", origin)
            self.restart()
            return
        shapes = {name: weight.shape for name, weight in self._live.items()}
        misfits = [name for name, each in snapshot.weights.items() if shapes.get(name) != each.shape]
        misfits += [name for name in self._weights if name not in snapshot.weights]
        if misfits:
            raise CheckpointError(
                f"{origin}: the average is of other weights than those that are trained now ({misfits[0]}). "
                "Resume with the same options of what is trained, or without --ema_decay and --save_ema."
            )
        self._weights = {name: self._live[name] for name in snapshot.weights}
        self._averages = {
            name: each.to(device=self._live[name].device, dtype=torch.float32, copy=True)
            for name, each in snapshot.weights.items()
        }
        self.steps = snapshot.steps


def decay_at(step: int, decay: float) -> float:
    """Return the share of the old average in that after a step (1-based): it rises with the steps, up to decay."""
    return min(decay, step / (9 + step))


def named(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of modules by name: the module's number, a dot, and the name in the module."""
    return {
        f"{number}.{name}": weight
        for number, module in enumerate(modules)
        for name, weight in module.named_parameters()
    }


def companion(
    average: Average | None, write: Callable[[Path, dict[str, str]], None], save_dtype: torch.dtype | None
) -> tuple[Companion, ...]:
    """Return what writes the average beside each saved file; nothing where there is no average.

    Args:
        average: of the weights that write saves.
        write: Trainee.save.
        save_dtype: of saved files; None: as trained.
    """
    if average is None:
        return ()

    def save(path: Path, metadata: dict[str, str]) -> None:
        with average.in_place(is_float32=save_dtype is not None):  # write casts; what bf16 cannot tell apart is kept
            write(path, metadata)

    return (Companion(MARK, save),)


def write(snapshot: Snapshot, path: Path) -> None:
    """Write an average for a state."""
    tensors = {name: each.cpu().contiguous() for name, each in snapshot.weights.items()}
    save_file(tensors, path, {STEPS: str(snapshot.steps)})


def read(path: Path) -> Snapshot | None:
    """Return what `write` wrote, on the CPU; None where it is not there."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return Snapshot({name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()[STEPS]))  # noqa: SIM118


def _portions(weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of weights, a few at a time: at most AT_ONCE numbers, or one weight that is larger."""
    portion: list[str] = []
    size = 0
    for name, weight in weights.items():
        if portion and size + weight.numel() > AT_ONCE:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += weight.numel()
    if portion:
        yield portion
