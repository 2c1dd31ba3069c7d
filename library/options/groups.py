"""All options of a run, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.options.caching import CachingOptions
from library.options.captions import CaptionOptions
from library.options.dataset import DatasetOptions
from library.options.declare import build, declared
from library.options.deepspeed import DeepSpeedOptions
from library.options.flow import FlowOptions
from library.options.hub import HubOptions
from library.options.logging import LoggingOptions
from library.options.loss import LossOptions
from library.options.masks import MaskOptions
from library.options.metadata import MetadataOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions
from library.options.sampling import SamplingOptions
from library.options.saving import SavingOptions
from library.options.schedule import ScheduleOptions
from library.options.sd3 import Sd3Options
from library.options.training import TrainingOptions
from library.options.validation import ValidationOptions
from library.options.values import Declared


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run was asked to do. A part of the project takes the group or the values it uses, not all of it."""

    model: ModelOptions = field(default_factory=ModelOptions)
    sd3: Sd3Options = field(default_factory=Sd3Options)
    dataset: DatasetOptions = field(default_factory=DatasetOptions)
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    caching: CachingOptions = field(default_factory=CachingOptions)
    masks: MaskOptions = field(default_factory=MaskOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    deepspeed: DeepSpeedOptions = field(default_factory=DeepSpeedOptions)
    saving: SavingOptions = field(default_factory=SavingOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    metadata: MetadataOptions = field(default_factory=MetadataOptions)


GROUPS: Mapping[str, type] = {
    "model": ModelOptions,
    "sd3": Sd3Options,
    "dataset": DatasetOptions,
    "captions": CaptionOptions,
    "caching": CachingOptions,
    "masks": MaskOptions,
    "noise": NoiseOptions,
    "flow": FlowOptions,
    "loss": LossOptions,
    "network": NetworkOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "training": TrainingOptions,
    "deepspeed": DeepSpeedOptions,
    "saving": SavingOptions,
    "hub": HubOptions,
    "sampling": SamplingOptions,
    "validation": ValidationOptions,
    "logging": LoggingOptions,
    "metadata": MetadataOptions,
}


def all_declared() -> dict[str, Declared]:
    """Return every option that has a reader, by name, in the order of the groups."""
    return {each.name: each for group in GROUPS.values() for each in declared(group)}


def build_all(values: Mapping[str, Any]) -> Options:
    """Return the options from converted values by name; what is not there has its default.

    Raises: OptionError for values of one group that contradict each other.
    """
    values = _with_text_encoder_rates(values)
    return Options(**{name: build(group, values) for name, group in GROUPS.items()})


def _with_text_encoder_rates(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values with --text_encoder_lr1 and 2 as the list that --text_encoder_lr is."""
    own = [values.get(name) for name in ("text_encoder_lr1", "text_encoder_lr2")]
    if own == [None, None]:
        return values
    default = values.get("learning_rate", OptimizerOptions.learning_rate)
    common = [*(values.get("text_encoder_lr") or (default,))]
    first_two = (common * 2)[:2] if len(common) == 1 else common[:2]
    rates = (rate if given is None else given for rate, given in zip(first_two, own, strict=True))
    return {**values, "text_encoder_lr": (*rates, *common[2:])}


def public_values(options: Options) -> dict[str, Any]:
    """Return what may be shown to others, by option name: everything but secrets and paths."""
    return {
        each.name: getattr(getattr(options, name), each.name)
        for name, group in GROUPS.items()
        for each in declared(group)
        if not each.is_secret and not each.is_path
    }
