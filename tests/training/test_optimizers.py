"""Every optimizer by its name, and the mistakes one can make with it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from library.errors import OptionError
from library.options.optimizer import OptimizerOptions
from library.training import optimizers

# rates at which 100 steps of the toy regression lower its loss; 1 for those that adapt it
RATES = {"sgd": 0.1, "sgdnesterov": 0.03, "sgdnesterov8bit": 0.03, "asgd": 0.1, "adadelta": 1.0, "sgdschedulefree": 0.3}


def options(name: str = "", *args: str, learning_rate: float = 1e-2, **more: object) -> OptimizerOptions:
    return OptimizerOptions(optimizer_type=name, optimizer_args=args or None, learning_rate=learning_rate, **more)


def toy() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a model, inputs and targets of a solvable regression; 64x64 weights, so that 8-bit states are 8-bit."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    inputs = torch.randn(32, 64)
    return model, inputs, inputs @ (torch.randn(64, 64) / 8).T


def losses_of(optimizer, model, inputs, targets, steps: int = 100) -> tuple[float, float]:
    def loss() -> torch.Tensor:
        return (model(inputs) - targets).square().mean()

    before = loss().item()
    optimizers.train_mode(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizers.eval_mode(optimizer)
    return before, loss().item()


@pytest.mark.filterwarnings("ignore:.*not supported on CPU.*:UserWarning")  # paged states need CUDA; they step without
@pytest.mark.filterwarnings("ignore::FutureWarning")  # dadaptation and bitsandbytes call what torch will rename
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_learns(name):
    factory = optimizers.OPTIMIZERS[name]
    pytest.importorskip(factory.path.partition(".")[0])
    rate = 1.0 if factory.adapts_rate else RATES.get(name, 1e-2)
    model, inputs, targets = toy()
    optimizer = optimizers.create(options(factory.name, learning_rate=rate), [{"params": list(model.parameters())}])
    before, after = losses_of(optimizer, model, inputs, targets)
    assert after < before


def test_adamw_is_torchs_own_by_default():
    model, inputs, targets = toy()
    ours = optimizers.create(options(), [{"params": list(model.parameters())}])
    losses_of(ours, model, inputs, targets)
    twin, inputs, targets = toy()
    losses_of(torch.optim.AdamW(twin.parameters(), lr=1e-2), twin, inputs, targets)
    assert type(ours) is torch.optim.AdamW
    assert torch.equal(model.weight, twin.weight)


def test_each_group_keeps_its_own_rate():
    model, _, _ = toy()
    groups = [{"params": [model.weight], "lr": 3e-4}, {"params": [nn.Parameter(torch.zeros(2))]}]
    optimizer = optimizers.create(options(learning_rate=1e-5), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 1e-5]


def test_a_base_rate_of_0_leaves_the_groups_their_own():
    chosen = options("Prodigy", learning_rate=0.0)  # Prodigy itself refuses 0
    optimizers.rehearse(chosen)
    optimizer = optimizers.create(chosen, [{"params": [weight()], "lr": 1.0}])
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_names_are_found_in_any_case():
    assert optimizers.resolve("ADAMW8BIT").path == "bitsandbytes.optim.AdamW8bit"
    assert optimizers.resolve("adam").path == "torch.optim.Adam"


def test_a_dotted_path_is_any_class():
    optimizer = optimizers.create(options("prodigyopt.prodigy.Prodigy", learning_rate=1.0), [{"params": [weight()]}])
    assert type(optimizer).__name__ == "Prodigy"


def test_a_dotted_path_of_a_listed_class_follows_its_rules():
    assert optimizers.resolve("prodigyopt.Prodigy").adapts_rate
    assert optimizers.resolve("torch.optim.SGD").fixed == {}


def test_every_torch_optimizer_that_can_step_alone_has_a_name():
    unfit = {"Optimizer", "LBFGS", "SparseAdam", "Adafactor"}  # needs a closure, sparse gradients; transformers' name
    have = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - unfit
    assert have <= {factory.path.removeprefix("torch.optim.") for factory in optimizers.OPTIMIZERS.values()}


def weight() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 4))


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(OptionError, match=r"--optimizer_type AdmaW is unknown\. Did you mean AdamW\? .*Prodigy"):
        optimizers.check(options("AdmaW"))


def test_a_missing_package_is_named_with_its_installation():
    with pytest.raises(OptionError, match="pip install no-such-package"):
        optimizers.check(options("no_such_package.Adam"))


def test_a_module_without_the_class_names_the_nearest():
    with pytest.raises(OptionError, match=r"torch\.optim has no optimizer Adamm\. Did you mean Adam\?"):
        optimizers.rehearse(options("torch.optim.Adamm"))


def test_a_class_that_is_no_optimizer_is_refused():
    with pytest.raises(OptionError, match="has no optimizer Linear"):
        optimizers.rehearse(options("torch.nn.Linear"))


def test_a_module_that_cannot_be_imported_is_refused():
    with pytest.raises(OptionError, match=r"torch\.no_such_module cannot be imported"):
        optimizers.rehearse(options("torch.no_such_module.Adam"))


def test_an_unknown_argument_names_the_nearest():
    with pytest.raises(OptionError, match=r"--optimizer_args weigth_decay: AdamW takes .*Did you mean weight_decay\?"):
        optimizers.rehearse(options("AdamW", "weigth_decay=0.1"))


def test_a_value_that_the_optimizer_refuses_is_shown_with_its_reason():
    with pytest.raises(OptionError, match=r"AdamW refuses betas=\(2, 3\).*Invalid beta"):
        optimizers.rehearse(options("AdamW", "betas=(2,3)"))


@pytest.mark.parametrize("key", ["lr", "params"])
def test_the_learning_rate_is_no_optimizer_argument(key):
    with pytest.raises(OptionError, match="--learning_rate"):
        optimizers.check(options("AdamW", f"{key}=1"))


def test_what_a_name_means_cannot_be_changed():
    with pytest.raises(OptionError, match="SGDNesterov always has nesterov=True"):
        optimizers.check(options("SGDNesterov", "nesterov=False"))


def test_nesterov_has_momentum_unless_it_is_given():
    default = optimizers.create(options("SGDNesterov"), [{"params": [weight()]}])
    given = optimizers.create(options("SGDNesterov", "momentum=0.5"), [{"params": [weight()]}])
    assert (default.defaults["momentum"], default.defaults["nesterov"]) == (0.9, True)
    assert given.defaults["momentum"] == 0.5


def test_adafactor_sets_its_own_rate_by_default():
    optimizer = optimizers.create(options("Adafactor"), [{"params": [weight()], "lr": 1e-3}])
    assert optimizers.sets_own_rate(optimizer)
    assert optimizer.param_groups[0]["lr"] is None


def test_adafactor_without_relative_steps_takes_the_given_rates(caplog):
    with caplog.at_level(logging.INFO):
        optimizer = optimizers.create(options("adafactor", "relative_step=False"), [{"params": [weight()], "lr": 1e-3}])
    assert not optimizers.sets_own_rate(optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert "--max_grad_norm 0" in caplog.text


def test_adafactors_warm_up_turns_relative_steps_on():
    optimizer = optimizers.create(
        options("Adafactor", "warmup_init=True", "relative_step=False"), [{"params": [weight()]}]
    )
    assert optimizers.sets_own_rate(optimizer)


@pytest.mark.parametrize("name", ["DAdaptation", "DAdaptAdan", "Prodigy"])
def test_several_rates_for_an_adaptive_optimizer_are_refused(name):
    groups = [{"params": [weight()], "lr": 1.0}, {"params": [weight()], "lr": 0.5}]
    with pytest.raises(OptionError, match=r"got 0\.5, 1\. Give --learning_rate alone"):
        optimizers.create(options(name), groups)


def test_a_low_rate_for_an_adaptive_optimizer_is_warned_about(caplog):
    optimizers.create(options("Prodigy", learning_rate=1e-4), [{"params": [weight()]}])
    assert "0.0001, where 1 is usual" in caplog.text


def test_the_usual_rate_for_an_adaptive_optimizer_is_not_warned_about(caplog):
    optimizers.create(options("Prodigy", learning_rate=1.0), [{"params": [weight()]}])
    assert caplog.text == ""


def test_a_schedule_free_optimizer_shows_its_average_in_eval_mode():
    model, inputs, targets = toy()
    optimizer = optimizers.create(options("AdamWScheduleFree"), [{"params": list(model.parameters())}])
    losses_of(optimizer, model, inputs, targets)
    averaged = model.weight.detach().clone()
    optimizers.train_mode(optimizer)
    trained = model.weight.detach().clone()
    optimizers.eval_mode(optimizer)
    assert optimizers.is_schedule_free(optimizer)
    assert not torch.allclose(averaged, trained)
    torch.testing.assert_close(model.weight.detach(), averaged)


def test_modes_leave_other_optimizers_alone():
    optimizer = optimizers.create(options("AdamW"), [{"params": [weight()]}])
    optimizers.train_mode(optimizer)
    optimizers.eval_mode(optimizer)
    assert not optimizers.is_schedule_free(optimizer)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("", (), "torch.optim.adamw.AdamW"),
        (
            "AdamW",
            ("weight_decay=0.1", "betas=(0.9,0.99)"),
            "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        ),
        ("SGDNesterov", (), "torch.optim.sgd.SGD(momentum=0.9)"),
        ("Adafactor", (), "transformers.optimization.Adafactor(relative_step=True)"),
        ("Prodigy", ("decouple=True",), "prodigyopt.prodigy.Prodigy(decouple=True)"),
    ],
)
def test_the_metadata_names_class_and_arguments(name, args, expected):
    chosen = options(name, *args, learning_rate=1.0)
    assert optimizers.describe(optimizers.create(chosen, [{"params": [weight()]}]), chosen) == expected


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is global, and the next test may want another


def test_accelerates_wrappers_are_seen_through(accelerator):
    chosen = options("AdamWScheduleFree")
    wrapped = accelerator.prepare(optimizers.create(chosen, [{"params": [weight()]}]))
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    assert optimizers.is_schedule_free(wrapped)
    assert optimizers.describe(wrapped, chosen) == "schedulefree.adamw_schedulefree.AdamWScheduleFree"
    optimizers.train_mode(wrapped)
    assert wrapped.param_groups[0]["train_mode"]


def test_checking_names_and_arguments_imports_no_torch():
    code = (
        "import sys\n"
        "from library.options.optimizer import OptimizerOptions\n"
        "from library.options.schedule import ScheduleOptions\n"
        "from library.training import optimizers, schedules\n"
        "optimizers.check(OptimizerOptions(optimizer_type='AdamW8bit', optimizer_args=('eps=1e-7',)))\n"
        "schedules.check(ScheduleOptions(lr_scheduler='polynomial', lr_scheduler_args=('lr_end=1e-6',)))\n"
        "print({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "AdamW8bit"])
def test_a_state_of_bf16_weights_comes_back_in_its_own_formats(name: str) -> None:
    """Adafactor keeps float32 of them, which torch would cast to bf16: the resumed run would be another."""
    first, second = (nn.Linear(64, 96).to(torch.bfloat16) for _ in range(2))
    groups = [[{"params": list(model.parameters()), "lr": 1e-3}] for model in (first, second)]
    given = ("relative_step=False",) if name == "Adafactor" else ()
    one, other = (optimizers.create(options(name, *given), group) for group in groups)
    first(torch.ones(1, 64).to(torch.bfloat16)).square().sum().backward()
    one.step()
    optimizers.load_state(other, one.state_dict())
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert one.state[left].keys() == other.state[right].keys()
        for key, value in one.state[left].items():
            if isinstance(value, torch.Tensor):
                assert other.state[right][key].dtype == value.dtype
                assert torch.equal(other.state[right][key], value)
