"""Learning-rate schedules by name: the factor of each group's rate at every optimizer step.

A schedule is stepped once per optimizer step, on every process alike; its length T is max_train_steps whatever the
number of processes or accumulated batches. Imports torch only to build a scheduler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import OptionError, did_you_mean
from library.training import optimizers
from library.training.curves import CURVES, Factor, Length
from library.training.literals import parse_literals, refuse_unknown

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.schedule import ScheduleOptions

log = logging.getLogger(__name__)

ADAFACTOR = "adafactor"  # "adafactor:<rate>": the rate is shown until the optimizer has found its own
PLATEAU = "reduce_lr_on_plateau"
NAMES = (*CURVES, PLATEAU)

# torch's own that can be built from literals alone
TORCH_SCHEDULERS = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
    "MultiStepLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "StepLR",
)  # fmt: skip

# what each curve is given from its own options; --lr_scheduler_args win
_FROM_OPTIONS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "cosine_with_restarts": lambda options: {"num_cycles": options.lr_scheduler_num_cycles},
    "polynomial": lambda options: {"power": options.lr_scheduler_power},
    "inverse_sqrt": lambda options: {"timescale": options.lr_scheduler_timescale},
    # as sd-scripts: half of the cycles, so that the default of 1 is one fall from top to bottom
    "cosine_with_min_lr": lambda options: {
        "num_cycles": options.lr_scheduler_num_cycles / 2, "min_lr_rate": options.lr_scheduler_min_lr_ratio,
    },
    "cosine_warmup_with_min_lr": lambda options: {
        "num_cycles": options.lr_scheduler_num_cycles / 2, "min_lr_rate": options.lr_scheduler_min_lr_ratio,
    },
    "warmup_stable_decay": lambda options: {
        "num_cycles": options.lr_scheduler_num_cycles / 2, "min_lr_ratio": options.lr_scheduler_min_lr_ratio or 0.0,
    },
}  # fmt: skip


def check(options: ScheduleOptions) -> None:
    """Refuse an unknown schedule, its wrong arguments, and a warm-up where there is none.

    What depends on the optimizer, `create` finds; over a rehearsed optimizer it does so before any model is loaded.

    Raises: OptionError.
    """
    given = parse_literals(options.lr_scheduler_args, "--lr_scheduler_args")
    name = options.lr_scheduler
    if options.lr_scheduler_type:
        torch_path(options.lr_scheduler_type)
        refuse_warmup(options, f"--lr_scheduler_type {options.lr_scheduler_type}", "its own arguments")
    elif name == ADAFACTOR or name.startswith(f"{ADAFACTOR}:"):
        initial_rate(name)
        refuse_warmup(options, f"--lr_scheduler {name}", "--optimizer_args warmup_init=True")
        refuse_unknown(given, (), "--lr_scheduler_args", name)
    elif name not in NAMES:
        listed = f"{', '.join(NAMES)} or {ADAFACTOR}:<learning rate>"
        raise OptionError(
            f"--lr_scheduler {name} is unknown.{did_you_mean(name, (*NAMES, ADAFACTOR))} Choose {listed}."
        )
    elif name in ("constant", "piecewise_constant", PLATEAU):
        refuse_warmup(options, f"--lr_scheduler {name}", "--lr_scheduler constant_with_warmup")
    if not options.lr_scheduler_type and name in CURVES:
        curve_of(options, Length(1000, 0, 0), 1.0)  # a rehearsal: reads all arguments


def kind_of(name: str, class_path: str | None) -> str:
    """Return the kind of scheduler that --lr_scheduler or --lr_scheduler_type name; all curves are of one kind."""
    if class_path:
        return torch_path(class_path)
    if name == PLATEAU:
        return PLATEAU
    return ADAFACTOR if name.startswith(ADAFACTOR) else "a curve"


def refuse_warmup(options: ScheduleOptions, owner: str, instead: str) -> None:
    """Refuse warm-up steps for a schedule that has none.

    Raises: OptionError.
    """
    if options.lr_warmup_steps:
        raise OptionError(f"{owner} has no warm-up, got --lr_warmup_steps {options.lr_warmup_steps}. Use {instead}.")


def create(options: ScheduleOptions, optimizer: Optimizer, max_train_steps: int) -> Any:
    """Return a torch scheduler, to be stepped by `advance` once per optimizer step.

    Build it before the state of a resumed run is loaded: building sets the rates of step 0.

    Args:
        options: which schedule, its warm-up and its arguments.
        optimizer: plain, not wrapped by accelerate; its groups' rates are the tops of the curve.
        max_train_steps: T, in optimizer steps.

    Raises: OptionError.
    """
    warn_unused(options, optimizer, max_train_steps)
    return build(options, optimizer, max_train_steps)


def rehearse(options: ScheduleOptions, optimizer: Optimizer) -> None:
    """Build the scheduler once over a toy, from `optimizers.rehearse`: finds mistakes before any model is loaded.

    The run's length is often not known by then, so that a warm-up of any number of steps passes.

    Raises: OptionError.
    """
    build(options, optimizer, max_train_steps=10**12)


def build(options: ScheduleOptions, optimizer: Optimizer, max_train_steps: int) -> Any:
    """Return the scheduler that options, which `check` let pass, and optimizer lead to.

    Raises: OptionError for what depends on the optimizer.
    """
    is_for_adafactor = options.lr_scheduler.startswith(ADAFACTOR) and not options.lr_scheduler_type
    if optimizers.is_schedule_free(optimizer):
        return lambda_schedule(optimizer, lambda rate: lambda step: 1.0)
    if optimizers.sets_own_rate(optimizer):
        refuse_warmup(options, "Adafactor with relative_step=True", "--optimizer_args warmup_init=True")
        return adafactor_schedule(optimizer, initial_rate(options.lr_scheduler))
    if is_for_adafactor:
        raise OptionError(
            f"--lr_scheduler {options.lr_scheduler} needs --optimizer_type Adafactor with relative_step=True."
        )
    if options.lr_scheduler_type or options.lr_scheduler == PLATEAU:
        return torch_schedule(options, optimizer)
    length = length_of(options, max_train_steps)
    return lambda_schedule(optimizer, lambda rate: curve_of(options, length, rate))


def advance(scheduler: Any, loss: Callable[[], float]) -> None:
    """Step the scheduler once.

    Args:
        scheduler: from `create`, or accelerate's wrapper of it.
        loss: gives that of this step, equal on all processes; asked by reduce_lr_on_plateau alone, since it waits for
            the device.
    """
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    if isinstance(getattr(scheduler, "scheduler", scheduler), ReduceLROnPlateau):
        scheduler.step(loss())
    else:
        scheduler.step()


def length_of(options: ScheduleOptions, max_train_steps: int) -> Length:
    """Return T, warm-up and decay in optimizer steps; a warm-up or decay below 1 is a ratio of T, rounded down.

    Raises: OptionError where warm-up and decay are longer than the run.
    """
    warmup, decay = (
        int(steps * max_train_steps) if isinstance(steps, float) else steps
        for steps in (options.lr_warmup_steps or 0, options.lr_decay_steps or 0)
    )
    if options.lr_scheduler == "warmup_stable_decay" and warmup + decay > max_train_steps:
        raise OptionError(
            f"--lr_warmup_steps ({warmup}) and --lr_decay_steps ({decay}) are more than the {max_train_steps} steps "
            "of the run. Make them shorter."
        )
    return Length(max_train_steps, warmup, decay)


def curve_of(options: ScheduleOptions, length: Length, rate: float) -> Factor:
    """Return the factor of a group's rate by step.

    Args:
        options: name and arguments.
        length: in steps.
        rate: of the group.

    Raises: OptionError for wrong arguments.
    """
    curve = CURVES[options.lr_scheduler]
    given = parse_literals(options.lr_scheduler_args, "--lr_scheduler_args")
    known = [
        name for name, parameter in inspect.signature(curve).parameters.items() if parameter.kind.name == "KEYWORD_ONLY"
    ]
    refuse_unknown(given, known, "--lr_scheduler_args", options.lr_scheduler)
    from_options = _FROM_OPTIONS.get(options.lr_scheduler, lambda _: {})(options)
    if "min_lr" in given:
        from_options.pop("min_lr_rate", None)
    try:
        return curve(length, rate, **{**from_options, **given})
    except (TypeError, ValueError) as error:
        raise OptionError(f"--lr_scheduler {options.lr_scheduler}: {error}") from error


def lambda_schedule(optimizer: Optimizer, factor_of: Callable[[float], Factor]) -> Any:
    """Return a scheduler that multiplies each group's rate by factor_of(rate)(step)."""
    from torch.optim.lr_scheduler import LambdaLR

    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [factor_of(rate) for rate in rates])


def torch_path(name: str) -> str:
    """Return the full path of a torch scheduler that is given by name, or of a class that is given by path.

    Raises: OptionError for a bare name that torch has not.
    """
    if "." in name:
        return name
    if name not in TORCH_SCHEDULERS:
        near = did_you_mean(name, TORCH_SCHEDULERS)
        listed = ", ".join(TORCH_SCHEDULERS)
        raise OptionError(f"--lr_scheduler_type {name} is unknown.{near} Choose {listed}, or the full path of a class.")
    return f"torch.optim.lr_scheduler.{name}"


def torch_schedule(options: ScheduleOptions, optimizer: Optimizer) -> Any:
    """Return the scheduler of a class, made with --lr_scheduler_args.

    Raises: OptionError where the class cannot be imported or refuses its arguments.
    """
    name = options.lr_scheduler_type or "ReduceLROnPlateau"
    option = f"--lr_scheduler_type {name}" if options.lr_scheduler_type else f"--lr_scheduler {PLATEAU}"
    module_name, _, class_name = torch_path(name).rpartition(".")
    try:
        made = getattr(__import__(module_name, fromlist=[class_name]), class_name)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{option} cannot be imported: {error}.") from error
    given = parse_literals(options.lr_scheduler_args, "--lr_scheduler_args")
    try:
        return made(optimizer, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{option} refuses {given or 'no arguments'} of --lr_scheduler_args: {error}") from error


def initial_rate(name: str) -> float:
    """Return the rate in "adafactor:<rate>", 0 for any other name.

    Raises: OptionError where it is missing or no number.
    """
    if not name.startswith(ADAFACTOR):
        return 0.0
    text = name.partition(":")[2]
    try:
        return float(text)
    except ValueError:
        raise OptionError(
            f"--lr_scheduler {name}: write {ADAFACTOR}:<learning rate>, such as {ADAFACTOR}:1e-4."
        ) from None


def adafactor_schedule(optimizer: Any, initial: float) -> Any:
    """Return a scheduler that shows, and does not set, the rates which Adafactor finds for itself.

    Args:
        optimizer: transformers' Adafactor with relative_step.
        initial: shown until a group has made a step.
    """
    from torch.optim.lr_scheduler import LambdaLR

    def shown(index: int) -> Factor:
        def rate(step: int) -> float:
            group = optimizer.param_groups[index]  # looked up each time: loading a state replaces the groups
            state = optimizer.state.get(group["params"][0])
            return float(optimizer._get_lr(group, state)) if state else initial

        return rate

    for group in optimizer.param_groups:
        group["lr"] = 1.0  # not read with relative_step; the factor then is the rate
    return LambdaLR(optimizer, [shown(index) for index in range(len(optimizer.param_groups))])


def warn_unused(options: ScheduleOptions, optimizer: Any, max_train_steps: int) -> None:
    """Name the schedule options that have no effect, or not the whole of it, in this run."""
    name = options.lr_scheduler
    is_rate_shown = optimizers.sets_own_rate(optimizer) and name.startswith(ADAFACTOR)
    chosen = {
        "--lr_scheduler_type": options.lr_scheduler_type,
        "--lr_scheduler": None if name == "constant" or is_rate_shown else name,
        "--lr_warmup_steps": options.lr_warmup_steps,
    }
    unused = [f"{option} {value}" for option, value in chosen.items() if value]
    if optimizers.is_schedule_free(optimizer) or optimizers.sets_own_rate(optimizer):
        if unused:
            log.warning("%s sets its own pace: %s has no effect", type(optimizer).__name__, ", ".join(unused))
        return
    if options.lr_decay_steps and (name != "warmup_stable_decay" or options.lr_scheduler_type):
        log.warning("--lr_decay_steps %s has no effect: only warmup_stable_decay has a decay", options.lr_decay_steps)
    warmup = length_of(options, max_train_steps).warmup
    if warmup >= max_train_steps > 0:
        log.warning("the warm-up takes %d steps, the run %d: it ends below the full rate", warmup, max_train_steps)
