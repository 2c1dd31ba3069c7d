import itertools
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.errors import OptionError
from library.models import block_swap, float8
from library.models.block_swap import BlockSwap, allowed, install, spread
from library.models.family import LoraTarget
from library.models.layout.mmdit import MmditShape
from library.models.mmdit import Mmdit
from networks.layers import Dropout, LoraLayer

WIDTH, HEADS, DEPTH = 16, 2, 7
CPU = torch.device("cpu")


class Stream(nn.Module):
    """One of a block's two streams."""

    def __init__(self, *, is_last: bool, is_dual: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH if is_last else 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS, eps=1e-6), nn.RMSNorm(WIDTH // HEADS, eps=1e-6)
        if not is_last:
            self.proj = nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(
                nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
            )
        if is_dual:
            self.qkv2, self.proj2 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("offset", torch.full((1,), 0.1), persistent=False)

    def before(self, x, c):
        table = self.modulation(F.silu(c))[:, None].chunk(2 if "proj" not in self._modules else 6, dim=-1)
        normed = F.layer_norm(x, (WIDTH,)) * (1 + table[1]) + table[0] + self.offset.to(x.dtype)
        q, k, v = split_heads(self.qkv(normed))
        return (norm(q, self.norm_q.weight), norm(k, self.norm_k.weight), v), table, normed

    def after(self, x, attended, table, normed):
        x = x + table[2] * self.proj(attended)
        if "qkv2" in self._modules:
            x = x + self.proj2(attend(*split_heads(self.qkv2(normed))))
        return x + table[5] * self.mlp(F.layer_norm(x, (WIDTH,)) * (1 + table[4]) + table[3])


def norm(x, weight):
    return F.rms_norm(x.float(), weight.shape, weight.float(), 1e-6).to(x.dtype)


def split_heads(qkv):
    return qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, *, is_last: bool, is_dual: bool) -> None:
        super().__init__()
        self.x_block = Stream(is_last=False, is_dual=is_dual)
        self.context_block = Stream(is_last=is_last, is_dual=False)

    def forward(self, x, context, c):
        own, table, normed = self.x_block.before(x, c)
        other, other_table, other_normed = self.context_block.before(context, c)
        both = attend(*(torch.cat(pair, dim=2) for pair in zip(other, own, strict=True)))
        ours, theirs = both[:, context.shape[1] :], both[:, : context.shape[1]]
        x = self.x_block.after(x, ours, table, normed)
        if "proj" not in self.context_block._modules:
            return x, None
        return x, self.context_block.after(context, theirs, other_table, other_normed)


class Toy(nn.Module):
    """Blocks of three sizes between two layers that every block's turn leaves alone."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.joint_blocks = nn.ModuleList(
            Block(is_last=index == depth - 1, is_dual=index < depth // 2) for index in range(depth)
        )
        self.swap: BlockSwap | None = None
        self.is_checkpointed = False
        self.requires_grad_(False)

    def forward(self, x, context, c):
        x = self.first(x)
        for index, block in enumerate(self.joint_blocks):
            if self.swap is not None:
                self.swap.enter(index)
            if self.is_checkpointed and torch.is_grad_enabled():
                x, context = checkpoint(block.__call__, x, context, c, use_reentrant=False)
            else:
                x, context = block(x, context, c)
            if self.swap is not None:
                x, context = self.swap.leave(index, x, context)
        return self.last(x)


@dataclass(frozen=True)
class Made:
    """A toy, with what learns on it."""

    toy: Toy
    layers: nn.ModuleList
    dtype: torch.dtype

    def loss(self, seed: int) -> torch.Tensor:
        draws = torch.Generator().manual_seed(seed)
        x, context, target = (torch.randn(2, n, WIDTH, generator=draws) for n in (12, 5, 12))
        c = torch.randn(2, WIDTH, generator=draws)
        device = next(self.toy.parameters()).device
        x, context, c = (each.to(device, self.dtype) for each in (x, context, c))
        return (self.toy(x, context, c).float() - target.to(device)).square().mean()

    def gradients(self) -> list[torch.Tensor]:
        return [torch.zeros(0) if each.grad is None else each.grad.clone() for each in self.layers.parameters()]

    def weights(self) -> list[torch.Tensor]:
        return [each.detach().clone() for each in self.layers.parameters()]


def make(
    num_swapped=0, *, is_checkpointed=False, kind="float32", device=CPU, trained=range(DEPTH), depth=DEPTH
) -> Made:
    """Return a toy whose LoRA layers have learnt something already; kind: "float32", "mixed" or "float8"."""
    toy = Toy(depth)
    toy.is_checkpointed = is_checkpointed
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    toy.to(dtype)
    if kind == "mixed":  # formats alternate within each block
        for block in toy.joint_blocks:
            block.x_block.offset = block.x_block.offset.float()
            block.context_block.norm_k.float()
            block.x_block.norm_q.float()
    if kind == "float8":
        float8.store(toy.joint_blocks)
    if device == CPU or num_swapped:
        install(toy, num_swapped, device)
    else:
        toy.to(device)
    torch.manual_seed(1)
    layers = nn.ModuleList()
    for index in trained:
        for name, module in toy.joint_blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                layers.append(
                    LoraLayer(LoraTarget(f"{index}.{name}", module, "unet", "attention", index), 2, 2, Dropout())
                )
    for layer in layers:
        nn.init.normal_(layer.lora_up.weight, std=0.1)
        layer.attach()
    return Made(toy, layers.to(device), dtype)


def assert_same(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def steps(made: Made, num_steps: int = 3, *, accumulated: int = 1) -> list[torch.Tensor]:
    """Return the losses, gradients and weights of some steps, a validation before each of them."""
    optimizer = torch.optim.AdamW(made.layers.parameters(), lr=1e-2)
    found = []
    for step in range(num_steps):
        with torch.no_grad():
            found.append(made.loss(100 + step))
        for part in range(accumulated):
            loss = made.loss(accumulated * step + part)
            loss.backward()
            found.append(loss.detach())
        found += made.gradients()
        optimizer.step()
        optimizer.zero_grad()
    return found + made.weights()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "mixed", "float8"])
def test_training_is_the_same_to_the_bit_however_many_blocks_are_swapped(kind, is_checkpointed):
    expected = steps(make(kind=kind, is_checkpointed=is_checkpointed))
    for num_swapped in range(1, DEPTH - 1):
        assert_same(steps(make(num_swapped, kind=kind, is_checkpointed=is_checkpointed)), expected)


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_a_short_model_trains_the_same(depth):
    expected = steps(make(depth=depth, trained=range(depth)))
    for num_swapped in range(1, depth - 1):
        assert_same(steps(make(num_swapped, depth=depth, trained=range(depth))), expected)


@pytest.mark.parametrize("num_swapped", [1, DEPTH - 2])
def test_accumulated_gradients_are_the_same(num_swapped):
    assert_same(steps(make(num_swapped), accumulated=3), steps(make(), accumulated=3))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("num_swapped", [1, 4, DEPTH - 2])
def test_two_forward_passes_before_one_backward_pass_give_the_same_gradients(num_swapped, is_checkpointed):
    found = []
    for number in (0, num_swapped):
        made = make(number, is_checkpointed=is_checkpointed)
        (made.loss(1) * 2 + made.loss(2)).backward()
        found.append(made.gradients())
    assert_same(*found)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backward_passes_in_any_order_give_the_same_gradients(order):
    found = []
    for number in (0, DEPTH - 2):
        made = make(number)
        losses = [made.loss(1), made.loss(2)]
        for index in order:
            losses[index].backward()
        found.append(made.gradients())
    assert_same(*found)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("num_swapped", [1, 4, DEPTH - 2])
def test_passes_without_gradient_between_forward_and_backward_do_no_harm(num_swapped, is_checkpointed):
    found = []
    for number in (0, num_swapped):
        made = make(number, is_checkpointed=is_checkpointed)
        loss = made.loss(1)
        with torch.no_grad():
            between = [made.loss(2)]
        with torch.inference_mode():
            between.append(made.loss(3))
        loss.backward()
        found.append([*between, *made.gradients()])
    assert_same(*found)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("trained", [[4], [2, 5], [DEPTH - 1], [0]])
def test_a_backward_pass_that_ends_half_way_does_no_harm(trained, is_checkpointed):
    expected = steps(make(trained=trained, is_checkpointed=is_checkpointed))
    for num_swapped in (1, 3, DEPTH - 2):
        assert_same(steps(make(num_swapped, trained=trained, is_checkpointed=is_checkpointed)), expected)


def test_a_pass_that_breaks_off_does_no_harm():
    made, whole = make(DEPTH - 2), make()
    broken = made.toy.joint_blocks[3]
    handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too little")))
    with pytest.raises(torch.OutOfMemoryError):
        made.loss(1)
    handle.remove()
    assert_same(steps(made), steps(whole))


def test_a_condition_that_learns_gets_the_same_gradient():
    """It goes into every block, and its gradient comes out of every block's side."""
    found = []
    for number in (0, DEPTH - 2):
        toy = make(number, trained=[]).toy
        draws = torch.Generator().manual_seed(0)
        x, context, c = (
            torch.randn(2, 12, 16, generator=draws),
            torch.randn(2, 5, 16, generator=draws),
            torch.ones(2, 16),
        )
        context.requires_grad_()
        c.requires_grad_()
        toy(x, context, c).square().mean().backward()
        found.append([c.grad, context.grad])
    assert_same(*found)


@pytest.mark.parametrize("num_swapped", range(1, DEPTH - 1))
def test_the_device_holds_only_the_blocks_that_are_not_swapped(num_swapped):
    sizes = [sum(each.nbytes for each in block.parameters()) for block in Toy().joint_blocks]
    blocks = make(num_swapped, trained=[]).toy.joint_blocks
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in blocks.parameters()}
    room = sum(sorted(sizes)[num_swapped:])
    gaps = 256 * 2 * len(list(blocks[0].parameters()))
    assert sum(storages.values()) <= (DEPTH - num_swapped) * max(sizes) + gaps
    assert sum(storages.values()) < room + 2 * (max(sizes) - min(sizes)) + gaps


def test_blocks_that_take_turns_overwrite_each_other():
    """With all of them in turn, at each block the memory of the block two before holds this one's weights."""
    made, whole = make(DEPTH - 2, trained=[]), Toy()
    swap, blocks = made.toy.swap, made.toy.joint_blocks
    name = "x_block.qkv.weight"
    for index, block in enumerate(blocks):
        swap.enter(index)
        assert torch.equal(block.get_parameter(name), whole.joint_blocks[index].get_parameter(name))
        if index >= 2:
            former = blocks[index - 2].get_parameter(name)
            assert former.untyped_storage().data_ptr() == block.get_parameter(name).untyped_storage().data_ptr()
            assert not torch.equal(former, whole.joint_blocks[index - 2].get_parameter(name))
        swap.leave(index)


def fetched(made: Made, work) -> list[int]:
    """Return the blocks that were copied to the device during work, in order, by their places."""
    copies = []
    slots = {id(slot): slot for slot in made.toy.swap._slots}
    masters = {master.memory.data_ptr(): place for place, master in enumerate(made.toy.swap._masters)}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default and args[1].data_ptr() in masters:
                assert any(args[0].data_ptr() == slot.memory.data_ptr() for slot in slots.values())
                copies.append(masters[args[1].data_ptr()])
            return func(*args, **kwargs or {})

    with Recorder():
        work()
    return copies


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_step_copies_each_swapped_block_once_up_and_once_down(is_checkpointed):
    made = make(3, is_checkpointed=is_checkpointed)  # five take turns; the forward pass ends where the backward begins
    for _ in range(2):
        assert fetched(made, lambda: made.loss(1).backward()) == [2, 3, 4, 2, 1, 0]


def test_a_slot_is_filled_again_as_soon_as_its_block_is_over():
    made = make(3)  # blocks 0, 2, 3, 5 and 6 take turns
    swap = made.toy.swap
    assert spread(5, DEPTH) == (0, 2, 3, 5, 6)
    assert fetched(made, lambda: swap.enter(0)) == []
    assert fetched(made, lambda: swap.leave(0)) == [2]
    assert fetched(made, lambda: made.loss(1)) == [0, 2, 3, 4]
    assert fetched(made, lambda: swap.enter_backward(6)) == []
    assert fetched(made, lambda: swap.enter_backward(5)) == [2]  # block 6 is over
    assert fetched(made, lambda: swap.enter_backward(4)) == [1]  # block 5 is over, and block 4 stays where it is


def test_a_pass_without_gradient_leaves_the_first_blocks_ready_for_the_next_one():
    made = make(3)

    def sample() -> None:
        with torch.no_grad():
            made.loss(1)

    assert fetched(made, sample) == [2, 3, 4, 0, 1]
    assert fetched(made, sample) == [2, 3, 4, 0, 1]
    assert fetched(made, lambda: made.loss(1).backward()) == [2, 3, 4, 2, 1, 0]


@pytest.mark.parametrize(("num_streamed", "depth"), [(3, 3), (3, 24), (14, 24), (24, 24), (37, 38), (5, 8)])
def test_the_blocks_that_take_turns_are_spread_evenly(num_streamed, depth):
    found = spread(num_streamed, depth)
    assert (len(found), found[0], found[-1]) == (num_streamed, 0, depth - 1)
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert gaps <= {(depth - 1) // (num_streamed - 1), -(-(depth - 1) // (num_streamed - 1))}


def test_the_state_has_every_blocks_own_weights():
    made, whole = make(DEPTH - 2, kind="float8"), make(kind="float8")
    made.loss(1).backward()
    ours, theirs = made.toy.state_dict(), whole.toy.state_dict()
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight.float(), theirs[name].float()), name


def test_moving_the_model_back_and_forth_does_no_harm():
    made = make(DEPTH - 2)
    before = {each.data_ptr() for each in made.toy.joint_blocks.parameters()}
    made.toy.to("meta")
    assert made.toy.first.weight.is_meta
    assert {each.data_ptr() for each in made.toy.joint_blocks.parameters()} == before


def test_a_cast_after_the_blocks_took_their_places_is_refused():
    with pytest.raises(AssertionError, match="cast the model before"):
        make(1).toy.to(torch.bfloat16)


def test_loading_into_blocks_that_take_turns_is_refused():
    with pytest.raises(AssertionError, match="load them before"):
        make(1).toy.load_state_dict(Toy().state_dict())


def test_weights_that_learn_are_refused():
    toy = Toy()
    toy.joint_blocks[0].x_block.proj.requires_grad_(True)
    with pytest.raises(AssertionError, match="learns"):
        install(toy, 1, CPU)


@pytest.mark.parametrize("num_swapped", [0, None])
def test_none_swapped_leaves_the_model_as_it_is(num_swapped):
    toy = Toy()
    install(toy, num_swapped, CPU)
    assert toy.swap is None


def test_a_negative_number_is_refused():
    with pytest.raises(OptionError, match=r"--blocks_to_swap must be 0 or more, got -1"):
        install(Toy(), -1, CPU)


def test_a_number_too_large_for_the_model_is_lowered_and_said(caplog):
    with caplog.at_level(logging.WARNING, block_swap.__name__):
        assert allowed(32, 24) == 22
    assert "--blocks_to_swap 32" in caplog.text
    assert "24 blocks: 22 are swapped" in caplog.text


def test_the_largest_number_is_taken_without_a_word(caplog):
    assert (allowed(22, 24), allowed(36, 38), allowed(1, 2)) == (22, 36, 0)
    assert "24" not in caplog.text


class LateStream:
    """A stream of a GPU that puts each copy off until somebody waits for it."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_late = 0

    def wait_stream(self, other: object) -> None:
        assert other is self

    def wait_event(self, event: "LateEvent") -> None:
        assert event.num_copies is not None, "an event that was never recorded holds nothing up"
        while self.num_late < event.num_copies:
            there, master = self.copies[self.num_late]
            there.copy_(master)
            self.num_late += 1


class LateEvent:
    def __init__(self) -> None:
        self.num_copies: int | None = None

    def record(self, stream: LateStream) -> None:
        self.num_copies = len(stream.copies)


class PutOff(TorchDispatchMode):
    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.stream.copies.append(args[:2])
            return args[0]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("num_swapped", [1, 4, DEPTH - 2])
def test_a_copy_that_arrives_as_late_as_it_may_is_waited_for(num_swapped, is_checkpointed, monkeypatch):
    """That none begins too early is what all other tests show, in which a copy is done as soon as it is begun."""
    expected = steps(make(is_checkpointed=is_checkpointed))
    made, stream = make(num_swapped, is_checkpointed=is_checkpointed), LateStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", PutOff)
    made.toy.swap._stream = stream
    for slot in made.toy.swap._slots:
        slot.memory.fill_(255)  # nan, where nothing has been copied yet
        slot.place, slot.filled = None, LateEvent()
    assert_same(steps(made), expected)
    assert stream.num_late > 3 * 2 * num_swapped


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kept", [None, [[0, 2, 5], [1, 2, 3]]])
def test_the_denoiser_of_sd3_trains_the_same(kept, is_checkpointed):
    shape = MmditShape(5, 64, 16, 2, 16, 16, 256, has_qk_norm=True, num_dual=2, position_side=4)

    def gradients(num_swapped: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        denoiser = Mmdit(shape, torch.randn(1, 16, 64)).requires_grad_(False)
        if is_checkpointed:
            denoiser.enable_gradient_checkpointing()
        install(denoiser, num_swapped, CPU)
        noisy, context, pooled = torch.randn(2, 16, 4, 6), torch.randn(2, 3, 16), torch.randn(2, 16)
        for each in (noisy, context, pooled):
            each.requires_grad_()
        chosen = None if kept is None else torch.tensor(kept)
        denoiser(noisy, torch.tensor([10, 900]), context, pooled, kept_tokens=chosen).square().sum().backward()
        return [each.grad for each in (noisy, context, pooled)]

    expected = gradients(0)
    for num_swapped in (1, 2, 3):
        assert_same(gradients(num_swapped), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_block_trains_the_same():
    made = make(1, depth=3, trained=[1])
    for block in made.toy.joint_blocks:
        block.compile(backend="aot_eager")
    assert_same(steps(made, 2), steps(make(depth=3, trained=[1]), 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "mixed", "float8"])
@pytest.mark.parametrize("num_swapped", [1, 4, DEPTH - 2])
@pytest.mark.filterwarnings("ignore")  # of operations that are known to be deterministic only by and large
def test_training_on_a_gpu_is_the_same_to_the_bit(num_swapped, kind, is_checkpointed):
    how = {"kind": kind, "is_checkpointed": is_checkpointed, "device": torch.device("cuda")}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others add gradients up in any order
            assert_same(steps(make(num_swapped, **how)), steps(make(0, **how)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_that_last_longer_than_a_block_are_waited_for():
    """Linear maps so large that a copy of one takes far longer than its use for a single row."""

    def output(num_swapped: int) -> tuple[torch.Tensor, int]:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        toy = Toy(3)
        toy.joint_blocks = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(8)).requires_grad_(False)
        device = torch.device("cuda")
        install(toy, num_swapped, device) if num_swapped else toy.to(device)
        start = torch.ones(1, 4096, device=device, requires_grad=True)
        x = start
        for index, block in enumerate(toy.joint_blocks):
            if toy.swap is not None:
                toy.swap.enter(index)
            x = block(x)
            if toy.swap is not None:
                (x,) = toy.swap.leave(index, x)
        x.square().sum().backward()
        assert start.grad is not None
        return start.grad, torch.cuda.memory_allocated() - before

    (whole, all_bytes), (swapped, bytes_left) = output(0), output(6)
    assert torch.equal(whole, swapped)
    assert bytes_left < all_bytes - 5.5 * 4096 * 4096 * 4
