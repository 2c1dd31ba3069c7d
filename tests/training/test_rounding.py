"""Weights in bf16 learn as they would in float32, on average; rounded to the nearest they do not learn."""

import pytest
import torch
from torch import nn

from library.options.optimizer import OptimizerOptions
from library.training import fused, optimizers, rounding

BF16 = torch.bfloat16
KINDS = (
    OptimizerOptions(optimizer_type="AdamW"),
    OptimizerOptions(optimizer_type="AdamW", optimizer_args=("foreach=False",)),
    OptimizerOptions(optimizer_type="SGDNesterov"),
    OptimizerOptions(optimizer_type="torch.optim.SGD"),
    OptimizerOptions(optimizer_type="Adafactor", optimizer_args=("relative_step=False", "scale_parameter=False")),
    OptimizerOptions(optimizer_type="AdamW8bit"),
)
WAYS = ("plain", "weights", "groups")


def name_of(options: OptimizerOptions) -> str:
    return " ".join([options.optimizer_type, *(options.optimizer_args or ())])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(BF16)


def optimizer_of(options: OptimizerOptions, trained: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    return optimizers.create(options, [{"params": list(layer.parameters()), "lr": rate} for layer in trained[::2]])


def rounded(options: OptimizerOptions, trained: nn.Module, way: str = "plain", seed: int = 1) -> torch.optim.Optimizer:
    """Return an optimizer that rounds by chance, stepping after the backward pass or within it."""
    optimizer = optimizer_of(options, trained)
    rounding.attach(optimizer, seed)
    if way == "weights":
        fused.step_in_backward(optimizer, 0)
    elif way == "groups":
        fused.step_by_group(optimizer, [[0], [1]], 0)
    return optimizer


def train(trained: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        trained(torch.randn(8, 64).to(BF16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(trained: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trained.parameters()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -0.3, 1e-39])
def test_rounding_by_chance_takes_both_neighbours_and_is_right_on_average(value: float) -> None:
    values = torch.full((200_000,), value)
    found = rounding.rounded_by_chance(values, generator()).double()
    low, high = found.unique().tolist()
    assert low < value < high
    error = found.mean().item() - values[0].double().item()
    assert abs(error) < 5 * (high - low) / 2 / 200_000**0.5  # five standard deviations at the most


def test_what_bf16_has_stays_and_what_is_no_number_does_too() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan")])
    patterns = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # no numbers, as GPUs write them
    found = rounding.rounded_by_chance(torch.cat([special, patterns]), generator())
    torch.testing.assert_close(found[:7].float(), special, rtol=0, atol=0, equal_nan=True)
    assert found[-2:].isnan().all()


def test_tiny_steps_move_weights_on_average_as_float32_would() -> None:
    """2000 steps of a hundredth of what bf16 tells apart; rounded to the nearest nothing moves at all."""
    options = OptimizerOptions(optimizer_type="torch.optim.SGD")
    rate, steps, width = 1e-5, 2000, 4096
    ends = {}
    for kind in ("chance", "nearest", "float32"):
        weight = nn.Parameter(torch.full((width,), 1.0, dtype=torch.float32 if kind == "float32" else BF16))
        optimizer = optimizers.create(options, [{"params": [weight], "lr": rate}])
        if kind == "chance":
            rounding.attach(optimizer, seed=3)
        for _ in range(steps):
            weight.grad = torch.full_like(weight, -1)
            optimizer.step()
        ends[kind] = weight.detach().double()
    assert ends["nearest"].eq(1).all()
    assert ends["float32"].mean().item() == pytest.approx(1.02, abs=1e-4)
    # each weight is a sum of chances with a deviation of (0.02 · 2^-7)^½ = 0.0125; the mean of 4096 has 0.0002
    assert ends["chance"].mean().item() == pytest.approx(1.02, abs=1e-3)


def test_adams_averages_decay_as_in_float32() -> None:
    """A second moment in bf16 with beta 0.999 would stay where it is: each step takes a thousandth of it away."""
    ends = {}
    for kind in ("chance", "nearest", "float32"):
        weight = nn.Parameter(torch.ones(4096, dtype=torch.float32 if kind == "float32" else BF16))
        optimizer = optimizers.create(OptimizerOptions(), [{"params": [weight], "lr": 1e-6}])
        if kind == "chance":
            rounding.attach(optimizer, seed=3)
        for step in range(300):
            weight.grad = torch.full_like(weight, 1.0 if step == 0 else 0.0)
            optimizer.step()
        kept = optimizer.state[weight]["exp_avg_sq"]
        assert kept.dtype == weight.dtype
        ends[kind] = kept.double().mean().item()
    assert ends["chance"] == pytest.approx(ends["float32"], rel=0.01)
    assert ends["nearest"] > 1.2 * ends["float32"]


@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_every_optimizer_learns_and_keeps_its_state_in_its_own_formats(options: OptimizerOptions) -> None:
    """Beside the same optimizer in float32, over ten steps; formats are those it has for bf16 weights without this."""
    trained, plain, exact = model(), model(), model().float()
    optimizer, other = rounded(options, trained), optimizer_of(options, plain)
    train(trained, optimizer, range(10))
    train(plain, other, range(10))
    reference = optimizer_of(options, exact)
    for number in range(10):
        torch.manual_seed(number)
        exact(torch.randn(8, 64)).square().mean().backward()
        reference.step()
        reference.zero_grad()
    start = torch.cat([value.flatten() for value in values(model())]).float()
    moved, wanted = (torch.cat([v.flatten() for v in values(each)]).float() - start for each in (trained, exact))
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    formats = [
        [
            {key: value.dtype for key, value in each.items() if isinstance(value, torch.Tensor)}
            for each in state.values()
        ]
        for state in (optimizer.state_dict()["state"], other.state_dict()["state"])
    ]
    assert formats[0] == formats[1]
    assert all(weight.dtype == BF16 for weight in trained.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_a_resumed_run_draws_what_the_whole_one_draws(options: OptimizerOptions, way: str) -> None:
    whole, half, resumed = model(), model(), model()
    train(whole, rounded(options, whole, way), range(6))
    first = rounded(options, half, way)
    train(half, first, range(3))
    second = rounded(options, resumed, way)
    resumed.load_state_dict(half.state_dict())
    optimizers.load_state(second, first.state_dict())
    train(resumed, second, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(values(whole), values(resumed), strict=True))


def test_another_seed_draws_otherwise_and_each_step_too() -> None:
    one, other = model(), model()
    train(one, rounded(KINDS[0], one, seed=1), range(1))
    train(other, rounded(KINDS[0], other, seed=2), range(1))
    assert not all(torch.equal(*pair) for pair in zip(values(one), values(other), strict=True))
    weight = nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = optimizers.create(KINDS[3], [{"params": [weight], "lr": 1e-3}])
    rounding.attach(optimizer, 1)
    moved = []
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, -1)
        optimizer.step()
        moved.append(weight.detach() != before)
    assert not torch.equal(*moved)


@pytest.mark.parametrize("way", ["weights", "groups"])
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_steps_within_the_backward_pass_learn_the_same_but_for_what_is_drawn(
    options: OptimizerOptions, way: str
) -> None:
    plain, parted = model(), model()
    train(plain, rounded(options, plain), range(1))
    train(parted, rounded(options, parted, way), range(1))
    for one, other in zip(values(plain), values(parted), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)  # one neighbour or the other
    assert all(weight.grad is None for weight in parted.parameters())


def test_weights_in_other_formats_step_as_they_did() -> None:
    trained, plain = model(), model()
    for each in (trained, plain):
        each[2].float()
    gradients = [torch.full_like(weight, 0.1) for weight in trained.parameters()]
    ends = []
    for each in (trained, plain):
        optimizer = optimizer_of(KINDS[0], each)
        if each is trained:
            rounding.attach(optimizer, 1)
        for _ in range(3):
            for weight, gradient in zip(each.parameters(), gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
        ends.append(values(each[2]))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_only_a_few_weights_are_widened_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(rounding, "AT_ONCE", 7000)
    weights = [nn.Parameter(torch.zeros(size, dtype=BF16)) for size in (3000, 4000, 9000, 10, 20)]
    for weight in weights[:-1]:
        weight.grad = torch.zeros_like(weight)
    assert [[each.numel() for each in portion] for portion in rounding.portions(weights)] == [
        [3000, 4000],
        [9000],
        [10],
    ]


def test_gradients_are_still_there_after_a_step() -> None:
    trained = model()
    optimizer = rounded(KINDS[0], trained)
    trained(torch.ones(1, 64).to(BF16)).sum().backward()
    optimizer.step()
    assert all(weight.grad is not None and weight.grad.dtype == BF16 for weight in trained.parameters())


def test_schedules_reach_the_steps() -> None:
    trained = model()
    optimizer = rounded(KINDS[0], trained)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = values(trained)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
    train(trained, optimizer, range(2))
    schedule.step()
    assert all(torch.equal(*pair) for pair in zip(before, values(trained), strict=True))


@pytest.mark.parametrize(("name", "is_possible"), [("AdamW", True), ("Adafactor", True), ("Prodigy", False)])
def test_optimizers_that_look_at_all_weights_are_known(name: str, is_possible: bool) -> None:
    if name == "Prodigy":
        pytest.importorskip("prodigyopt")
    assert fused.works_by_weight(OptimizerOptions(optimizer_type=name)) == is_possible
