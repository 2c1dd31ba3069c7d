"""Optimizer steps within the backward pass: equal to plain ones, with each gradient gone at once."""

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.training import fused, optimizers

FUSABLE = (
    OptimizerOptions(optimizer_type="Adafactor"),
    OptimizerOptions(optimizer_type="Adafactor", optimizer_args=("relative_step=False", "scale_parameter=False")),
    OptimizerOptions(optimizer_type="AdamW"),
    OptimizerOptions(optimizer_type="AdamW8bit"),
    OptimizerOptions(optimizer_type="SGDNesterov"),
    OptimizerOptions(optimizer_type="AdamWScheduleFree"),
)
STEPS = 4


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


def optimizer_of(options: OptimizerOptions, trained: nn.Sequential) -> torch.optim.Optimizer:
    """Return an optimizer with a rate of its own for each layer."""
    layers = [layer for layer in trained if isinstance(layer, nn.Linear)]
    groups = [{"params": list(layer.parameters()), "lr": 0.01 / (1 + i)} for i, layer in enumerate(layers)]
    if options.optimizer_type.endswith("ScheduleFree"):
        pytest.importorskip("schedulefree")
    optimizer = optimizers.create(options, groups)
    optimizers.train_mode(optimizer)
    return optimizer


def backward(trained: nn.Module, number: int) -> None:
    torch.manual_seed(number)
    trained(torch.randn(3, 6)).square().mean().backward()


def train(options: OptimizerOptions, *, is_fused: bool, max_grad_norm: float = 0) -> tuple[nn.Sequential, dict]:
    trained = model()
    optimizer = optimizer_of(options, trained)
    schedule = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if _has_rate(optimizer) else None
    )
    if is_fused:
        fused.step_in_backward(optimizer, max_grad_norm)
    for number in range(STEPS):
        backward(trained, number)
        if not is_fused and max_grad_norm:
            for parameter in trained.parameters():
                nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return trained, optimizer.state_dict()


def _has_rate(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer.param_groups[0]["lr"] is not None


@pytest.mark.parametrize("options", FUSABLE, ids=lambda options: options.optimizer_type)
@pytest.mark.parametrize("max_grad_norm", [0, 0.01])
def test_weights_and_states_are_those_of_plain_steps(options: OptimizerOptions, max_grad_norm: float) -> None:
    """With different rates and a schedule; a norm to clip to counts for each weight alone."""
    plain, plain_state = train(options, is_fused=False, max_grad_norm=max_grad_norm)
    trained, state = train(options, is_fused=True, max_grad_norm=max_grad_norm)
    for one, other, start in zip(trained.parameters(), plain.parameters(), model().parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)
    assert state["state"].keys() == plain_state["state"].keys()
    for number, kept in plain_state["state"].items():  # of the weight with that number
        torch.testing.assert_close(dict(state["state"][number]), dict(kept), rtol=0, atol=0)


def test_no_gradient_is_left_and_no_two_are_there_at_a_time() -> None:
    trained = model()
    fused.step_in_backward(optimizer_of(FUSABLE[2], trained), 0)
    seen: list[int] = []

    def count(_: torch.Tensor) -> None:
        seen.append(sum(parameter.grad is not None for parameter in trained.parameters()))

    for parameter in trained.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    backward(trained, 0)
    assert seen == [0] * 6
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_states_are_taken_back_after_a_resume() -> None:
    """Loading replaces the optimizer's groups; the steps go on with those that were loaded."""
    options = FUSABLE[2]
    whole, _ = train(options, is_fused=True)
    first = model()
    first_optimizer = optimizer_of(options, first)
    fused.step_in_backward(first_optimizer, 0)
    second = model()
    second_optimizer = optimizer_of(options, second)
    fused.step_in_backward(second_optimizer, 0)
    for number in range(STEPS):
        if number == 2:
            second.load_state_dict(first.state_dict())
            second_optimizer.load_state_dict(first_optimizer.state_dict())
        trained, optimizer = (first, first_optimizer) if number < 2 else (second, second_optimizer)
        for group, rate in zip(optimizer.param_groups, (0.01, 0.005, 0.01 / 3), strict=True):
            group["lr"] = rate / (1 + number)
        backward(trained, number)
    for one, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", FUSABLE, ids=lambda options: options.optimizer_type)
def test_optimizers_that_work_weight_by_weight_are_taken(options: OptimizerOptions) -> None:
    fused.check(OptimizerOptions(**{**vars(options), "fused_backward_pass": True}))


@pytest.mark.parametrize(("name", "package"), [("Prodigy", "prodigyopt"), ("DAdaptAdam", "dadaptation")])
def test_optimizers_that_look_at_all_weights_are_refused(name: str, package: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(OptionError, match=f"--fused_backward_pass .* {name} looks at all of them"):
        fused.check(OptimizerOptions(optimizer_type=name, fused_backward_pass=True))


def test_without_the_option_any_optimizer_is_taken() -> None:
    fused.check(OptimizerOptions(optimizer_type="Prodigy"))


def test_several_processes_are_refused() -> None:
    fused.check_processes(fused.WEIGHTS, 1)
    with pytest.raises(OptionError, match="--fused_backward_pass is for one process, and there are 2"):
        fused.check_processes(fused.WEIGHTS, 2)
