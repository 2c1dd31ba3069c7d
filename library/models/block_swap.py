"""Blocks of a frozen model that wait in main memory and take turns on the device (`--blocks_to_swap`).

A block that takes turns has one copy of its weights in main memory, which never changes, and a place on the device, its
slot, which it shares with others. It is copied there when it is needed, and nothing is copied back. Two slots let the
next block arrive while another computes: upwards in the forward pass, downwards in the backward pass, which begins with
the two blocks that the forward pass ended with.

A block's weights are views of its slot from beginning to end. So what autograd has saved of them for the backward pass
is right again as soon as the block is back; until then it may be another block's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError

log = logging.getLogger(__name__)

NUM_SLOTS = 2  # one computes, one is being filled
ALIGNMENT = 256  # bytes, as the device's allocator has it: a kernel chosen by alignment is then the same one


def install(denoiser: nn.Module, num_swapped: int | None, device: torch.device) -> None:
    """Bring a model to the device, but for the blocks that take turns there.

    To be called when the weights are final: cast, stored in float8, merged with what is merged into them, and read by
    a network that computes with them when it is made. Later on the model can be asked for its `state_dict`, but its
    weights must not be written, nor read outside a forward pass; `to` moves no block that takes turns.

    Args:
        denoiser: frozen, with `joint_blocks` and `swap`; on any device.
        num_swapped: by how many blocks the device is relieved, see `allowed`; 0 or None brings all of them there.
        device: to compute on.

    Raises: OptionError.
    """
    model: Any = denoiser
    assert model.swap is None, "the blocks take turns already"
    num_swapped = allowed(num_swapped, len(model.joint_blocks))
    if num_swapped:
        model.swap = BlockSwap(model.joint_blocks, num_swapped, device)
        log.info(
            "block swap: %d of %d blocks take turns in %d places, %.1f GB of weights wait in main memory",
            num_swapped + NUM_SLOTS,
            len(model.joint_blocks),
            NUM_SLOTS,
            model.swap.num_bytes / 1e9,
        )
    denoiser.to(device)


def allowed(num_swapped: int | None, depth: int) -> int:
    """Return how many blocks are swapped, 0 for none: at most depth - 2, as two are on the device at any time.

    sd-scripts stops at a larger number, and so at its own guide's 32 with a model of 24 blocks.

    Args:
        num_swapped: as asked for.
        depth: of the model.

    Raises: OptionError for a negative number.
    """
    if num_swapped is not None and num_swapped < 0:
        raise OptionError(f"--blocks_to_swap must be 0 or more, got {num_swapped}. Leave it out to swap none.")
    most = max(0, depth - NUM_SLOTS)
    if num_swapped is not None and num_swapped > most:
        log.warning(
            "--blocks_to_swap %d is too much for this model, which has %d blocks: %d are swapped",
            num_swapped,
            depth,
            most,
        )
    return min(num_swapped or 0, most)


def spread(num_streamed: int, depth: int) -> tuple[int, ...]:
    """Return the blocks that take turns, rising: the first, the last, and the others evenly between them.

    Nothing can be copied before the first of them has computed, nor in the forward pass after the last has begun.

    Args:
        num_streamed: how many, at least 3.
        depth: of the model, at least as many.
    """
    return tuple(
        (2 * place * (depth - 1) + num_streamed - 1) // (2 * (num_streamed - 1)) for place in range(num_streamed)
    )


class BlockSwap:
    """Which blocks are on the device, and which are on their way.

    A block is named by its index in the model or, if it takes turns, by its place among those that do. Blocks of even
    places share one slot, those of odd places the other.
    """

    def __init__(self, blocks: nn.ModuleList, num_swapped: int, device: torch.device) -> None:
        """Put every block where it belongs.

        Args:
            blocks: frozen, of any sizes and formats; on any device.
            num_swapped: from 1 to len(blocks) - 2. The device has room for the others.
            device: to compute on.
        """
        assert 1 <= num_swapped <= len(blocks) - NUM_SLOTS, f"cannot swap {num_swapped} of {len(blocks)} blocks"
        indices = spread(num_swapped + NUM_SLOTS, len(blocks))
        self._places: Mapping[int, int] = {index: place for place, index in enumerate(indices)}
        for index, block in enumerate(blocks):
            if index not in self._places:
                block.to(device)
        masters = [_Master(blocks[index], is_pinned=device.type == "cuda") for index in indices]
        self._slots = [
            _Slot(max(master.num_bytes for master in masters[first::NUM_SLOTS]), device) for first in range(NUM_SLOTS)
        ]
        for place, master in enumerate(masters):
            master.move_in(blocks[indices[place]], self._slot_of(place).memory)
        self._masters = masters
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            for slot in self._slots:
                slot.memory.record_stream(self._stream)  # a model that is dropped waits for its last copy
        self._fetch(0)
        self._fetch(1)

    @property
    def num_bytes(self) -> int:
        """The weights in main memory."""
        return sum(master.num_bytes for master in self._masters)

    def enter(self, index: int) -> None:
        """Have a block's weights in place for what is computed from now on; called before its forward."""
        place = self._places.get(index)
        if place is not None:
            self._bring(place)
            self._fetch(place + 1)

    def leave(self, index: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a block's outputs as they are; the rest of the model takes these instead.

        By them the backward pass comes to the block, which is fetched for it.

        Args:
            index: of the block.
            tensors: all of its outputs; None where the last block gives none.
        """
        with_gradient = [each is not None and each.requires_grad for each in tensors]
        is_followed_by_backward = torch.is_grad_enabled() and any(with_gradient)
        place = self._places.get(index)
        if place is not None:
            self._fetch(place + NUM_SLOTS)  # into the slot that the block leaves
            if place == len(self._masters) - 1 and not is_followed_by_backward:
                self._fetch(0)  # the next pass goes upwards again
                self._fetch(1)
        if not is_followed_by_backward:
            return tensors
        marked: tuple[Tensor, ...] = _Mark.apply(self, index, *(each for each in tensors if each is not None))
        rest = iter(marked)
        return tuple(None if each is None else next(rest) for each in tensors)

    def enter_backward(self, index: int) -> None:
        """Have a block's weights in place for its backward pass, which is next; that of the block above is over."""
        place, place_above = self._places.get(index), self._places.get(index + 1)
        if place is not None:
            self._bring(place)
            self._fetch(place - 1)
        if place_above is not None:
            self._fetch(place_above - NUM_SLOTS)

    def _slot_of(self, place: int) -> _Slot:
        return self._slots[place % NUM_SLOTS]

    def _bring(self, place: int) -> None:
        """Let what is computed from now on wait until the block is there."""
        self._fetch(place)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._slot_of(place).filled)

    def _fetch(self, place: int) -> None:
        """Begin to copy a block into its slot, unless it is there or there is no such block.

        What was computed up to now may need the slot's former contents; what is computed from now on must not.
        """
        slot = self._slot_of(place)
        if not 0 <= place < len(self._masters) or slot.place == place:
            return
        if self._stream is None:
            slot.fill(self._masters[place].memory)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                slot.fill(self._masters[place].memory)
                slot.filled.record(self._stream)
        slot.place = place


class _Slot:
    """Memory on the device that one block at a time is copied to, for as long as the model lives."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.place: int | None = None  # of the block whose weights are here, or will be when `filled` has happened
        self.filled: Any = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, weights: Tensor) -> None:
        self.memory[: len(weights)].copy_(weights, non_blocking=True)


class _Master:
    """A block's weights in main memory, one behind the other in one piece."""

    def __init__(self, block: nn.Module, *, is_pinned: bool) -> None:
        self._offsets: dict[str, int] = {}
        self.num_bytes = 0
        for name, parameter in block.named_parameters():
            assert not parameter.requires_grad, f"{name} learns, but what is learnt here would be overwritten"
            self._offsets[name] = self.num_bytes
            self.num_bytes += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        # Zeros between the weights rather than what was there before.
        self.memory = torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

    def move_in(self, block: nn.Module, slot: Tensor) -> None:
        """Take the block's weights over, and let them be views of its slot from now on."""
        kept = {}
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                kept[name] = self._view(self.memory, name, parameter)
                kept[name].copy_(parameter)
                parameter.data = self._view(slot, name, parameter)
            for module in block.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(slot.device))
        _stay(block)
        block.register_state_dict_post_hook(_giving(kept))
        block.register_load_state_dict_pre_hook(_refuse_to_load)

    def _view(self, memory: Tensor, name: str, like: Tensor) -> Tensor:
        start = self._offsets[name]
        return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


class _Mark(torch.autograd.Function):
    """The identity between a block and the next one. Its backward runs when the next one's is over.

    Of all that can be computed, autograd takes what was computed last in the forward pass: so all of the next block
    before this, and, as all that the block gave passes through here, this before all of the block.
    """

    @staticmethod
    def forward(ctx: Any, swap: BlockSwap, index: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.swap, ctx.index = swap, index
        ctx.set_materialize_grads(False)
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        needs = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(each for each, is_needed in zip(outputs, needs, strict=True) if not is_needed))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.swap.enter_backward(ctx.index)
        return None, None, *gradients


def _stay(block: nn.Module) -> None:
    """Let `to` and its like pass the block by: weights that were moved would no longer be views of the slot."""
    dtypes = {parameter.dtype for parameter in block.parameters()}

    def pass_by(change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dtypes:
            changed = change(torch.empty(0, dtype=dtype)).dtype
            assert changed == dtype, f"blocks that take turns cannot become {changed}: cast the model before"
        return block

    block._apply = pass_by  # type: ignore[method-assign]


def _giving(weights: Mapping[str, Tensor]) -> Callable[..., None]:
    """Return a hook that puts weights into a module's state, where its slot may hold another's."""

    def put(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({prefix + name: weight for name, weight in weights.items()})

    return put


def _refuse_to_load(*_: Any) -> None:
    raise AssertionError("weights would be loaded into a slot, and overwritten there: load them before")
