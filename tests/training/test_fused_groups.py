"""Groups of weights that step within the backward pass: each as with an optimizer of its own."""

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.training import fused, optimizers
from library.training.assembly import learning_rates, make_optimizer
from networks.plugin import OptimizerGroups

BY_WEIGHT = ("AdamW", "AdamW8bit", "Adafactor", "SGDNesterov")  # look at no other weight
TOGETHER = {"Prodigy": "prodigyopt", "DAdaptAdam": "dadaptation", "AdamWScheduleFree": "schedulefree"}
STEPS = 4


class Model(nn.Module):
    """Three layers, of which the middle one can be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, is_middle_used: bool = True) -> torch.Tensor:
        x = self.first(x).tanh()
        return self.last(self.middle(x).tanh() if is_middle_used else x)


def options_of(name: str, num_groups: int | None = None, max_grad_norm: float = 0) -> OptimizerOptions:
    if name in TOGETHER:
        pytest.importorskip(TOGETHER[name])
    return OptimizerOptions(
        optimizer_type=name, learning_rate=1.0, max_grad_norm=max_grad_norm, fused_optimizer_groups=num_groups
    )


def wanted_of(model: Model, rates: tuple[float, float]) -> OptimizerGroups:
    """Return what a trainee does: a group for the first two layers, one for the last."""
    first = {"params": [*model.first.parameters(), *model.middle.parameters()], "lr": rates[0]}
    return OptimizerGroups([first, {"params": list(model.last.parameters()), "lr": rates[1]}], ["first", "last"])


def optimizer_of(model: Model, options: OptimizerOptions, rates: tuple[float, float] = (1.0, 1.0)):
    return make_optimizer(options, wanted_of(model, rates), 1)[0]


def plain_optimizers(model: Model, options: OptimizerOptions, num_parts: int) -> list[torch.optim.Optimizer]:
    """Return an optimizer for each of the parts that as many fused groups have."""
    parting = fused.part(wanted_of(model, (1.0, 1.0)).groups, num_parts)
    made = [optimizers.create(options, [parting.groups[index] for index in each]) for each in parting.members]
    for optimizer in made:
        optimizers.train_mode(optimizer)
    return made


def run(model: Model, made: list, numbers: range, *, max_grad_norm: float = 0, skipped: tuple[int, ...] = ()) -> None:
    """Take steps as the loop does; a norm to clip to counts for each optimizer; skipped: steps without a layer."""
    for number in numbers:
        torch.manual_seed(number)
        model(torch.randn(3, 6), is_middle_used=number not in skipped).square().mean().backward()
        for optimizer in made:
            if max_grad_norm:
                nn.utils.clip_grad_norm_([w for g in optimizer.param_groups for w in g["params"]], max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


def assert_same_training(one: Model, other: Model) -> None:
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
        assert not torch.equal(weight, Model().get_parameter(name)), name


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_groups_step_as_a_plain_optimizer_that_looks_at_weights_alone(name):
    rates = (0.01, 0.02)
    plain, parted = Model(), Model()
    run(plain, [optimizer_of(plain, options_of(name), rates)], range(STEPS))
    run(parted, [optimizer_of(parted, options_of(name, 3), rates)], range(STEPS))
    assert_same_training(parted, plain)


@pytest.mark.parametrize("name", [*BY_WEIGHT, *TOGETHER])
@pytest.mark.parametrize("max_grad_norm", [0, 0.01])
@pytest.mark.parametrize("skipped", [(), (1, 2)], ids=["all layers", "a layer left out"])
def test_each_group_steps_as_with_an_optimizer_of_its_own(name, max_grad_norm, skipped):
    """Whatever the optimizer looks at; the norm of a gradient is that of its group; no gradient may reach a group."""
    plain, parted = Model(), Model()
    run(plain, plain_optimizers(plain, options_of(name), 3), range(STEPS), max_grad_norm=max_grad_norm, skipped=skipped)
    run(parted, [optimizer_of(parted, options_of(name, 3, max_grad_norm))], range(STEPS), skipped=skipped)
    assert_same_training(parted, plain)


@pytest.mark.parametrize("name", [*BY_WEIGHT, *TOGETHER])
def test_a_resumed_run_is_the_uninterrupted_one(name):
    """What a group adapts to itself is in the state too."""
    options = options_of(name, 3, max_grad_norm=1)
    whole, first, second = Model(), Model(), Model()
    run(whole, [optimizer_of(whole, options)], range(STEPS))
    before, after = optimizer_of(first, options), optimizer_of(second, options)
    run(first, [before], range(2))
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    run(second, [after], range(2, STEPS))
    assert_same_training(second, whole)


def test_the_gradients_of_a_group_are_gone_before_the_next_one_is_complete():
    model = Model()
    optimizer_of(model, options_of("AdamW", 3))
    held = []
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(
            lambda _: held.append([name for name, each in model.named_parameters() if each.grad is not None])
        )
    model(torch.randn(3, 6)).square().mean().backward()
    groups = [{"first.weight", "first.bias"}, {"middle.weight"}, {"middle.bias", "last.weight", "last.bias"}]
    assert all(not group <= set(names) for names in held for group in groups)  # a whole group is stepped at once
    assert len(held) == 6
    assert all(weight.grad is None for weight in model.parameters())


def test_groups_have_the_rate_that_their_schedule_says():
    model = Model()
    optimizer = optimizer_of(model, options_of("SGDNesterov", 3), (0.5, 0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    run(model, [optimizer], range(1))
    scheduler.step()
    start = [weight.detach().clone() for weight in model.parameters()]
    momenta = [optimizer.state[weight]["momentum_buffer"].clone() for weight in model.parameters()]
    run(model, [optimizer], range(1, 2))
    for weight, old, before, rate in zip(model.parameters(), start, momenta, (0.25,) * 4 + (0.05,) * 2, strict=True):
        now = optimizer.state[weight]["momentum_buffer"]
        gradient = now - 0.9 * before
        torch.testing.assert_close(weight, old - rate * (gradient + 0.9 * now))
    assert learning_rates(optimizer, ["first", "first", "first", "last"]) == {"first": 0.25, "last": 0.05}


def test_what_each_group_adapts_its_rate_to_is_told():
    model = Model()
    made, names = make_optimizer(options_of("Prodigy", 3), wanted_of(model, (1.0, 1.0)), 1)
    run(model, [made], range(STEPS))
    found = learning_rates(made, names)
    assert list(found) == ["first", "d*lr/first", "d*lr/first/2", "d*lr/first/3", "last", "d*lr/last"]
    assert found["d*lr/first"] != found["d*lr/first/2"]
    assert found["d*lr/first/3"] == found["d*lr/last"]  # one fused group, though of two rates


@pytest.mark.parametrize(
    ("num_parts", "sizes"), [(2, [[56], [72, 36]]), (3, [[56], [64], [8, 36]]), (99, [[48], [8], [64], [8], [32], [4]])]
)
def test_parts_are_about_equally_large_and_keep_their_order(num_parts, sizes):
    parting = fused.part(wanted_of(Model(), (1.0, 2.0)).groups, num_parts)
    found = [sum(weight.numel() for weight in group["params"]) for group in parting.groups]
    assert [[found[index] for index in members] for members in parting.members] == sizes
    assert [group["lr"] for group in parting.groups] == [1.0 + origin for origin in parting.origins]


@pytest.mark.parametrize("name", [*BY_WEIGHT, *TOGETHER])
def test_optimizers_that_keep_all_in_their_groups_are_taken(name):
    fused.check(options_of(name, 4))


class Restless(torch.optim.SGD):
    """Takes smaller and smaller steps, and keeps their number to itself."""

    num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data -= weight.grad / self.num_steps


def test_an_optimizer_that_keeps_something_for_all_weights_is_refused():
    name = f"{__name__}.Restless"
    with pytest.raises(OptionError, match=f"--fused_optimizer_groups steps parts .* {name} keeps something for all"):
        fused.check(options_of(name, 4))


def test_several_processes_are_refused():
    with pytest.raises(OptionError, match="--fused_optimizer_groups is for one process, and there are 2"):
        make_optimizer(options_of("AdamW", 2), wanted_of(Model(), (1.0, 1.0)), 2)
