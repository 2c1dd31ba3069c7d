"""Optimizers by name: which class, from which package, with which arguments. Imports torch only to build one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.errors import OptionError, did_you_mean
from library.training.literals import parse_literals, refuse_unknown

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.options.optimizer import OptimizerOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factory:
    """How an optimizer is made."""

    name: str  # as it is listed for the user
    path: str  # module and class
    package: str = "torch"  # what pip installs
    fixed: Mapping[str, Any] = field(default_factory=dict)  # part of what the name means; not in the metadata
    defaults: Mapping[str, Any] = field(default_factory=dict)  # --optimizer_args win
    adapts_rate: bool = False  # estimates the learning rate; the given one is a factor of it


MOMENTUM = {"momentum": 0.9}

_FACTORIES = (
    # torch's defaults, fused and foreach included: results stay those of torch.optim.AdamW(params, lr). On a GPU
    # --optimizer_args fused=True saves a little time a step and changes the last bits.
    Factory("AdamW", "torch.optim.AdamW"),
    Factory("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    Factory("PagedAdamW", "bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
    Factory("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    Factory("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes"),
    Factory("Lion", "lion_pytorch.Lion", "lion-pytorch"),
    Factory("Lion8bit", "bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    Factory("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit", "bitsandbytes"),
    Factory("SGDNesterov", "torch.optim.SGD", fixed={"nesterov": True}, defaults=MOMENTUM),
    Factory(
        "SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", "bitsandbytes", fixed={"nesterov": True}, defaults=MOMENTUM
    ),
    Factory("DAdaptation", "dadaptation.experimental.DAdaptAdamPreprint", "dadaptation", adapts_rate=True),
    Factory("DAdaptAdamPreprint", "dadaptation.experimental.DAdaptAdamPreprint", "dadaptation", adapts_rate=True),
    Factory("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad", "dadaptation", adapts_rate=True),
    Factory("DAdaptAdam", "dadaptation.DAdaptAdam", "dadaptation", adapts_rate=True),
    Factory("DAdaptAdan", "dadaptation.DAdaptAdan", "dadaptation", adapts_rate=True),
    Factory("DAdaptAdanIP", "dadaptation.experimental.DAdaptAdanIP", "dadaptation", adapts_rate=True),
    Factory("DAdaptLion", "dadaptation.DAdaptLion", "dadaptation", adapts_rate=True),
    Factory("DAdaptSGD", "dadaptation.DAdaptSGD", "dadaptation", adapts_rate=True),
    Factory("Prodigy", "prodigyopt.Prodigy", "prodigyopt", adapts_rate=True),
    Factory("Adafactor", "transformers.optimization.Adafactor", "transformers"),
    Factory("RAdamScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree"),
    Factory("AdamWScheduleFree", "schedulefree.AdamWScheduleFree", "schedulefree"),
    Factory("SGDScheduleFree", "schedulefree.SGDScheduleFree", "schedulefree"),
)

# torch's own under their bare names. LBFGS needs a closure and SparseAdam sparse gradients; torch.optim.Adafactor
# has to be given by its full path, as sd-scripts' Adafactor is that of transformers.
_TORCH = ("Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")

OPTIMIZERS: Mapping[str, Factory] = {
    factory.name.lower(): factory
    for factory in (*_FACTORIES, *(Factory(name, f"torch.optim.{name}") for name in _TORCH))
}

# packages whose name on PyPI is not that of their module
_PACKAGES = {"prodigyplus": "prodigy-plus-schedule-free"}


DEFAULT = "AdamW"


def name_of(options: OptimizerOptions) -> str:
    """Return the optimizer's name, AdamW unless chosen."""
    return options.optimizer_type or DEFAULT


def resolve(name: str) -> Factory:
    """Return how the optimizer of that name is made: a listed one in any spelling of case, or a dotted path.

    Raises: OptionError with the choices and the nearest.
    """
    if name.lower() in OPTIMIZERS:
        return OPTIMIZERS[name.lower()]
    for factory in OPTIMIZERS.values():
        if factory.path == name and not factory.fixed:
            return factory
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        top = name.partition(".")[0]
        return Factory(name, name, _PACKAGES.get(top, top.replace("_", "-")))
    names = {factory.name.lower(): factory.name for factory in OPTIMIZERS.values()}
    near = did_you_mean(name.lower(), names)
    for lower, listed in names.items():
        near = near.replace(f" {lower}?", f" {listed}?")
    raise OptionError(
        f"--optimizer_type {name} is unknown.{near} Choose {', '.join(names.values())}, "
        "or the full path of a class, such as torch.optim.Adam."
    )


def check(options: OptimizerOptions) -> None:
    """Refuse an unknown optimizer, a package that is not installed, and arguments that cannot be read.

    Imports no optimizer and no torch; what only the class itself can tell, `rehearse` finds.

    Raises: OptionError.
    """
    factory = resolve(name_of(options))
    top = factory.path.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise OptionError(
            f"--optimizer_type {factory.name} needs the package {factory.package}: pip install {factory.package}"
        )
    given = parse_literals(options.optimizer_args, "--optimizer_args")
    for key in given:
        if key in ("lr", "params"):
            raise OptionError(f"--optimizer_args {key}: the learning rate is set by --learning_rate and its relatives.")
        if key in factory.fixed:
            raise OptionError(f"--optimizer_args {key}: {factory.name} always has {key}={factory.fixed[key]}.")


def arguments(options: OptimizerOptions) -> dict[str, Any]:
    """Return the arguments that the user gave and those that the name brings, as the metadata shows them.

    Raises: OptionError.
    """
    check(options)
    factory = resolve(name_of(options))
    given = {**factory.defaults, **parse_literals(options.optimizer_args, "--optimizer_args")}
    if factory.name == "Adafactor":
        given.setdefault("relative_step", True)
        given["relative_step"] = bool(given["relative_step"] or given.get("warmup_init"))  # the second needs the first
    return given


def create(options: OptimizerOptions, parameter_groups: Iterable[Mapping[str, Any]]) -> Optimizer:
    """Return the optimizer that the options choose.

    Args:
        options: names it; learning_rate is that of groups without an "lr".
        parameter_groups: {"params": [...], "lr": 1e-4}, as torch takes them.

    Raises: OptionError for arguments or learning rates that the optimizer refuses.
    """
    groups = [{"lr": options.learning_rate, **group} for group in parameter_groups]
    factory, given = resolve(name_of(options)), arguments(options)
    if factory.adapts_rate:
        check_adapted_rates(factory.name, {group["lr"] for group in groups})
    if factory.name == "Adafactor":
        advise_on_adafactor(given, options.max_grad_norm)
    # every group has its rate; the default only has to be one that the class accepts, and many refuse 0
    default = options.learning_rate or 1.0
    return build(factory, given, groups, default)


def rehearse(options: OptimizerOptions) -> Optimizer:
    """Return the chosen optimizer over a toy parameter: finds wrong arguments before any model is loaded.

    Raises: OptionError.
    """
    import torch

    toy = torch.nn.Parameter(torch.zeros(2, 2))
    return build(resolve(name_of(options)), arguments(options), [{"params": [toy]}], options.learning_rate or 1.0)


def build(factory: Factory, given: dict[str, Any], groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
    """Return the factory's optimizer.

    Raises: OptionError with the class's own words where it refuses an argument.
    """
    made: Any = load(factory)
    parameters = inspect.signature(made).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = {parameter.name for parameter in parameters} - {"params", "lr", *factory.fixed}
        refuse_unknown(given, known, "--optimizer_args", factory.name)
    rate: float | None = learning_rate
    if given.get("relative_step") and factory.name == "Adafactor":
        rate = None
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    try:
        return made(groups, lr=rate, **factory.fixed, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        written = ", ".join(f"{key}={value}" for key, value in given.items()) or "no arguments"
        raise OptionError(f"--optimizer_type {factory.name} refuses {written}, lr={rate}: {error}") from error


def load(factory: Factory) -> type[Optimizer]:
    """Return the optimizer's class.

    Raises: OptionError where it cannot be imported, or is no optimizer.
    """
    from torch.optim import Optimizer

    module_name, _, class_name = factory.path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(f"--optimizer_type {factory.name}: {module_name} cannot be imported ({error}).") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        classes = [name for name, value in vars(module).items() if isinstance(value, type)]
        near = did_you_mean(class_name, classes)
        raise OptionError(f"--optimizer_type {factory.name}: {module_name} has no optimizer {class_name}.{near}")
    return found


def check_adapted_rates(name: str, rates: set[float]) -> None:
    """Check the learning rates of an optimizer that finds its own; there, 1 is the neutral one.

    Raises: OptionError for several rates: these optimizers stop at their first step, or use one of them alone.
    """
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise OptionError(
            f"{name} adapts one learning rate for everything that is trained, got {listed}. "
            "Give --learning_rate alone, or the same value to every rate."
        )
    if min(rates, default=1.0) <= 0.1:
        log.warning(
            "%s finds its own learning rate; the given one is a factor of it: %g, where 1 is usual", name, *rates
        )


def advise_on_adafactor(given: Mapping[str, Any], max_grad_norm: float) -> None:
    """Say what Adafactor makes of the learning rate, or what suits it."""
    if given["relative_step"]:
        log.info("Adafactor (relative_step) sets its own learning rate; the given rates are not used")
    elif max_grad_norm:
        log.info(
            "Adafactor without relative_step clips by itself: --max_grad_norm 0 suits it better than %g", max_grad_norm
        )


def load_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Take back what `state_dict` gave, in its formats: torch gives all of it the weights' own, whatever it had.

    Args:
        optimizer: as accelerate wraps it.
        saved: on any device.

    Raises: ValueError, KeyError if it is of other groups.
    """
    from torch import Tensor

    optimizer.load_state_dict(saved)
    inner = unwrapped(optimizer)
    weights = [weight for group in inner.param_groups for weight in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, weight in zip(numbers, weights, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            held = inner.state[weight].get(key)
            if isinstance(value, Tensor) and isinstance(held, Tensor) and held.dtype != value.dtype:
                inner.state[weight][key] = value.to(held.device)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def is_schedule_free(optimizer: Any) -> bool:
    """Return whether the optimizer averages instead of following a schedule, and so has two modes."""
    return "schedulefree" in type(unwrapped(optimizer)).__name__.lower()


def sets_own_rate(optimizer: Any) -> bool:
    """Return whether the optimizer ignores its learning rate: Adafactor with relative steps."""
    return all(group.get("relative_step", False) for group in unwrapped(optimizer).param_groups)


def eval_mode(optimizer: Any) -> None:
    """Put a schedule-free optimizer's averaged weights into the model, for previews and saving; others stay."""
    if is_schedule_free(optimizer):
        unwrapped(optimizer).eval()


def train_mode(optimizer: Any) -> None:
    """Put a schedule-free optimizer's training weights into the model; needed before its first step."""
    if is_schedule_free(optimizer):
        unwrapped(optimizer).train()


def describe(optimizer: Any, options: OptimizerOptions) -> str:
    """Return "torch.optim.adamw.AdamW(weight_decay=0.1)", as metadata names the optimizer."""
    made = type(unwrapped(optimizer))
    written = ",".join(f"{key}={value}" for key, value in arguments(options).items())
    return f"{made.__module__}.{made.__name__}" + (f"({written})" if written else "")
