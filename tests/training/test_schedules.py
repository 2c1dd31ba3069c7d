"""Learning rates by step: against numbers from sd-scripts, against transformers and diffusers, and by their rules."""

from __future__ import annotations

import diffusers.optimization
import pytest
import torch
import transformers.optimization
from torch import nn

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.options.schedule import ScheduleOptions as Options
from library.training import optimizers, schedules

STEPS = (0, 1, 5, 10, 25, 50, 75, 99)


def sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (1.0,)])


def rates_of(options: Options, *rates: float, total: int = 100) -> list[list[float]]:
    """Return the groups' rates at each step of a run."""
    optimizer = sgd(*rates)
    scheduler = schedules.create(options, optimizer, total)
    seen = []
    for _ in range(total):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedules.advance(scheduler, lambda: 0.0)
    return seen


def curve(options: Options, rate: float = 1.0, total: int = 100) -> list[float]:
    return [step[0] / rate for step in rates_of(options, rate, total=total)]


# sd-scripts, T = 100, at STEPS
REFERENCE = {
    "linear": (Options(lr_scheduler="linear", lr_warmup_steps=10), (0, 0.1, 0.5, 1, 0.8333, 0.5556, 0.2778, 0.0111)),
    "cosine": (Options(lr_scheduler="cosine"), (1, 0.9998, 0.9938, 0.9755, 0.8536, 0.5, 0.1464, 0.0002)),
    "restarts": (
        Options(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3),
        (1, 0.9978, 0.9455, 0.7939, 0.1464, 0.5, 0.8536, 0.0022),
    ),
    "polynomial": (Options(lr_scheduler="polynomial"), (1, 0.9905, 0.9525, 0.905, 0.7625, 0.525, 0.2875, 0.0595)),
    "inverse_sqrt": (
        Options(lr_scheduler="inverse_sqrt", lr_warmup_steps=10),
        (0, 0.1, 0.5, 1, 0.6325, 0.4472, 0.3651, 0.3178),
    ),
    "warmup_stable_decay": (
        Options(
            lr_scheduler="warmup_stable_decay", lr_warmup_steps=0.1, lr_decay_steps=0.2, lr_scheduler_min_lr_ratio=0.1
        ),
        (0.1, 0.19, 0.55, 1, 1, 1, 1, 0.1055),
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_rates_are_those_of_sd_scripts(name):
    options, expected = REFERENCE[name]
    rates = curve(options, rate=2e-6)
    assert [rates[step] for step in STEPS] == pytest.approx(expected, abs=6e-5)


# our options, the arguments of transformers' function
TWINS = [
    (Options(lr_scheduler="constant"), {}),
    (Options(lr_scheduler="constant_with_warmup", lr_warmup_steps=7), {}),
    (Options(lr_scheduler="linear", lr_warmup_steps=7), {}),
    (Options(lr_scheduler="cosine", lr_warmup_steps=7, lr_scheduler_args=("num_cycles=1.5",)), {"num_cycles": 1.5}),
    (Options(lr_scheduler="cosine_with_restarts", lr_warmup_steps=7, lr_scheduler_num_cycles=4), {"num_cycles": 4}),
    (Options(lr_scheduler="polynomial", lr_warmup_steps=7, lr_scheduler_power=2.5), {"power": 2.5}),
    (Options(lr_scheduler="polynomial", lr_scheduler_args=("lr_end=0.2",)), {"lr_end": 0.2}),
    (Options(lr_scheduler="inverse_sqrt"), {}),
    (Options(lr_scheduler="inverse_sqrt", lr_warmup_steps=7, lr_scheduler_timescale=30), {"timescale": 30}),
    (
        Options(
            lr_scheduler="cosine_with_min_lr",
            lr_warmup_steps=7,
            lr_scheduler_num_cycles=3,
            lr_scheduler_min_lr_ratio=0.2,
        ),
        {"num_cycles": 1.5, "min_lr_rate": 0.2},
    ),
    (Options(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=0.3",)), {"min_lr": 0.3}),
    (
        Options(lr_scheduler="cosine_warmup_with_min_lr", lr_warmup_steps=7, lr_scheduler_min_lr_ratio=0.2),
        {"num_cycles": 0.5, "min_lr_rate": 0.2},
    ),
    (
        Options(
            lr_scheduler="cosine_warmup_with_min_lr",
            lr_warmup_steps=7,
            lr_scheduler_min_lr_ratio=0.2,
            lr_scheduler_args=("warmup_lr_rate=0.4",),
        ),
        {"num_cycles": 0.5, "min_lr_rate": 0.2, "warmup_lr_rate": 0.4},
    ),
    (Options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=7, lr_decay_steps=30), {"num_decay_steps": 30}),
    (
        Options(
            lr_scheduler="warmup_stable_decay",
            lr_warmup_steps=7,
            lr_decay_steps=30,
            lr_scheduler_min_lr_ratio=0.1,
            lr_scheduler_args=("warmup_type='1-sqrt'", "decay_type='linear'"),
        ),
        {"num_decay_steps": 30, "min_lr_ratio": 0.1, "warmup_type": "1-sqrt", "decay_type": "linear"},
    ),
    (
        Options(
            lr_scheduler="warmup_stable_decay",
            lr_decay_steps=0.5,
            lr_warmup_steps=0.2,
            lr_scheduler_args=("warmup_type='cosine'", "decay_type='1-sqrt'"),
        ),
        {"num_decay_steps": 30, "warmup_type": "cosine", "decay_type": "1-sqrt"},
    ),
]


@pytest.mark.parametrize(("options", "arguments"), TWINS)
def test_rates_are_those_of_transformers(options, arguments):
    ours = curve(options, total=60)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    warmup = schedules.length_of(options, 60).warmup
    twin = transformers.optimization.get_scheduler(options.lr_scheduler, optimizer, warmup, 60, arguments)
    expected = []
    for _ in range(60):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        twin.step()
    assert ours == pytest.approx(expected, abs=1e-12)


def test_piecewise_rates_are_those_of_diffusers():
    rules = "1:10,0.1:50,0.01"
    ours = curve(Options(lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules='{rules}'",)))
    optimizer = sgd()
    twin = diffusers.optimization.get_piecewise_constant_schedule(optimizer, rules)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        twin.step()
    assert ours == expected
    assert {round(rate, 6) for rate in ours} == {1, 0.1, 0.01}


def test_every_group_of_polynomial_ends_at_the_same_rate():
    last = rates_of(Options(lr_scheduler="polynomial", lr_scheduler_args=("lr_end=1e-5",)), 1e-3, 1e-4, total=1001)[
        1000
    ]
    assert last == pytest.approx([1e-3 * 1 / 1001 + 1e-5 * 1000 / 1001, 1e-4 * 1 / 1001 + 1e-5 * 1000 / 1001])


@pytest.mark.parametrize(("warmup", "expected"), [(0, 0), (10, 10), (0.1, 20), (0.999, 199), (1.0, 200), (1, 1)])
def test_a_float_is_a_ratio_of_the_run_and_an_integer_counts_steps(warmup, expected):
    assert schedules.length_of(Options(lr_scheduler="linear", lr_warmup_steps=warmup), 200).warmup == expected


def test_a_resumed_schedule_goes_on_where_it_was():
    options = Options(lr_scheduler="cosine", lr_warmup_steps=10)
    whole = curve(options)
    optimizer = sgd()
    scheduler = schedules.create(options, optimizer, 100)
    for _ in range(37):
        optimizer.step()
        schedules.advance(scheduler, lambda: 0.0)
    saved = scheduler.state_dict(), optimizer.state_dict()

    again = sgd()
    resumed = schedules.create(options, again, 100)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.param_groups[0]["lr"] == whole[37]
    again.step()
    schedules.advance(resumed, lambda: 0.0)
    assert again.param_groups[0]["lr"] == whole[38]


def test_a_plateau_lowers_the_rate_when_the_loss_stays():
    optimizer = sgd()
    options = Options(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_args=("patience=3", "factor=0.5"))
    scheduler = schedules.create(options, optimizer, 100)
    rates = []
    for loss in [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        schedules.advance(scheduler, lambda loss=loss: loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1, 1, 1, 1, 1, 1, 0.5]


def test_a_torch_scheduler_is_made_by_name_from_its_arguments():
    options = Options(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=10", "gamma=0.5"))
    rates = curve(options)
    assert [rates[9], rates[10], rates[20]] == [1, 0.5, 0.25]


def test_a_torch_scheduler_is_made_by_path_and_beats_the_name():
    options = Options(
        lr_scheduler="cosine",
        lr_scheduler_type="torch.optim.lr_scheduler.ExponentialLR",
        lr_scheduler_args=("gamma=0.9",),
    )
    assert curve(options)[2] == pytest.approx(0.81)


def test_every_listed_torch_scheduler_exists():
    assert all(hasattr(torch.optim.lr_scheduler, name) for name in schedules.TORCH_SCHEDULERS)


def adafactor(*args: str) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    groups = [{"params": [nn.Parameter(torch.randn(4, 4))]}, {"params": [nn.Parameter(torch.randn(4, 4))]}]
    options = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=args or None, learning_rate=1e-3)
    return optimizers.create(options, groups)


@pytest.mark.parametrize(("name", "first"), [("adafactor:0.002", 0.002), ("constant", 0.0)])
def test_adafactors_own_rates_are_shown(name, first):
    optimizer = adafactor()
    scheduler = schedules.create(Options(lr_scheduler=name), optimizer, 100)
    assert [group["lr"] for group in optimizer.param_groups] == [first, first]
    used = optimizer.param_groups[1]["params"][0]
    before = used.detach().clone()
    used.grad = torch.ones_like(used)  # the other group has no gradient, as a part that a step does not reach
    optimizer.step()
    optimizer.zero_grad()
    schedules.advance(scheduler, lambda: 0.0)
    shown = [group["lr"] for group in optimizer.param_groups]
    assert shown[0] == first
    assert shown[1] == pytest.approx((before - used).abs().mean().item(), rel=0.05)  # update of unit size times rate


def test_adafactors_rates_do_not_depend_on_what_is_shown():
    def weights(name: str) -> torch.Tensor:
        optimizer = adafactor()
        scheduler = schedules.create(Options(lr_scheduler=name), optimizer, 100)
        parameter = optimizer.param_groups[0]["params"][0]
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            schedules.advance(scheduler, lambda: 0.0)
        return parameter.detach()

    assert torch.equal(weights("adafactor:0.5"), weights("constant"))


def test_a_chosen_schedule_that_adafactor_does_not_follow_is_warned_about(caplog):
    schedules.create(Options(lr_scheduler="cosine"), adafactor(), 100)
    assert "--lr_scheduler cosine has no effect" in caplog.text


def test_adafactor_with_given_rates_follows_any_schedule():
    optimizer = adafactor("relative_step=False")
    scheduler = schedules.create(Options(lr_scheduler="linear"), optimizer, 10)
    optimizer.step()
    schedules.advance(scheduler, lambda: 0.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9e-3)


def test_a_schedule_free_optimizer_keeps_its_rate_and_says_so(caplog):
    options = OptimizerOptions(optimizer_type="SGDScheduleFree", learning_rate=0.5)
    optimizer = optimizers.create(options, [{"params": [nn.Parameter(torch.zeros(2))]}])
    scheduler = schedules.create(Options(lr_scheduler="cosine", lr_warmup_steps=10), optimizer, 20)
    optimizers.train_mode(optimizer)
    for _ in range(15):
        optimizer.step()
        schedules.advance(scheduler, lambda: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert "--lr_scheduler cosine, --lr_warmup_steps 10 has no effect" in caplog.text


def test_a_plain_constant_schedule_is_not_warned_about(caplog):
    schedules.create(Options(), sgd(), 100)
    assert caplog.text == ""


def test_a_warm_up_as_long_as_the_run_is_warned_about(caplog):
    schedules.create(Options(lr_scheduler="linear", lr_warmup_steps=100), sgd(), 100)
    assert "the warm-up takes 100 steps, the run 100" in caplog.text


def test_decay_steps_that_nothing_reads_are_warned_about(caplog):
    schedules.create(Options(lr_scheduler="linear", lr_decay_steps=10), sgd(), 100)
    assert "--lr_decay_steps 10 has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "cosin"}, r"--lr_scheduler cosin is unknown\. Did you mean cosine\?"),
        ({"lr_scheduler": "adafactor"}, r"write adafactor:<learning rate>"),
        ({"lr_scheduler": "adafactor:fast"}, r"--lr_scheduler adafactor:fast: write"),
        ({"lr_scheduler": "piecewise_constant", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "piecewise_constant"}, r"step_rules='1:10,0\.1:50,0\.01'"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "--lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("cycles=2",)}, r"cosine takes num_cycles"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("power=2",)}, r"linear takes no arguments"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles=two",)}, r"is not a number"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='sqrt'",)}, "1-sqrt"),
        ({"lr_scheduler_type": "StepRL"}, r"--lr_scheduler_type StepRL is unknown\. Did you mean StepLR\?"),
    ],
)
def test_wrong_schedules_are_refused_before_anything_is_built(options, message):
    with pytest.raises(OptionError, match=message):
        schedules.check(Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "adafactor:1e-3"}, "needs --optimizer_type Adafactor"),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_type StepLR refuses no arguments"),
        ({"lr_scheduler_type": "torch.optim.NoSuchLR"}, "cannot be imported"),
        (
            {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": ("patients=3",)},
            "reduce_lr_on_plateau refuses",
        ),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=2.0",)}, "must be above lr_end"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 0.6, "lr_decay_steps": 0.6}, "Make them shorter"),
    ],
)
def test_what_only_a_rehearsal_shows_is_refused(options, message):
    toy = optimizers.rehearse(OptimizerOptions(learning_rate=1.0))
    with pytest.raises(OptionError, match=message):
        schedules.rehearse(Options(**options), toy)


def test_warm_up_is_refused_for_an_adafactor_that_sets_its_own_rate():
    with pytest.raises(OptionError, match="warmup_init=True"):
        schedules.create(Options(lr_scheduler="linear", lr_warmup_steps=5), adafactor(), 100)


def test_a_warm_up_and_decay_longer_than_the_run_are_refused():
    options = Options(lr_scheduler="warmup_stable_decay", lr_warmup_steps=60, lr_decay_steps=60)
    schedules.rehearse(options, sgd())  # the run's length is not known yet
    with pytest.raises(OptionError, match="more than the 100 steps"):
        schedules.create(options, sgd(), 100)


def test_a_rehearsal_says_nothing(caplog):
    optimizer = adafactor()
    caplog.clear()
    schedules.rehearse(Options(lr_scheduler="cosine"), optimizer)
    assert caplog.text == ""
