"""What is trained: a network on top of frozen models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.errors import CheckpointError, OptionError
from networks import plugin

if TYPE_CHECKING:
    from library.models.family import ModelFamily, Parts
    from library.options.network import NetworkOptions

log = logging.getLogger(__name__)


class Trainee(Protocol):
    """The trained weights of a run, whatever they are."""

    is_text_trained: bool

    @property
    def is_text_frozen(self) -> bool:
        """Whether text encoders have learnt all they are to learn."""
        ...

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What accelerate prepares."""
        ...

    def parameter_groups(self) -> plugin.OptimizerGroups:
        """Return what the optimizer gets, and the names of the learning rates."""
        ...

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the weights that gradient clipping looks at."""
        ...

    def train(self) -> None:
        """Switch dropout on."""
        ...

    def eval(self) -> None:
        """Switch dropout off."""
        ...

    def before_batch(self) -> None:
        """Do what is due before a batch's forward pass."""
        ...

    def untrained(self) -> AbstractContextManager[Parts | None]:
        """Return a context in which the models predict as before the training, or whose value are others that do."""
        ...

    def before_update(self) -> dict[str, Tensor]:
        """Return what is measured of the gradients, as scalars on the device."""
        ...

    def after_update(self) -> dict[str, Tensor]:
        """Do what is due after an optimizer step; return what it measured, as scalars on the device."""
        ...

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the trained weights."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Return the trained weights exactly, for the state of a run."""
        ...

    def load_weights(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Take back what `weights` gave. Raises: CheckpointError if it does not fit."""
        ...


@dataclass
class NetworkTrainee:
    """A LoRA or another network: attached to the models, which stay as they are."""

    network: nn.Module
    models: plugin.Models
    options: NetworkOptions
    learning_rate: float
    is_text_trained: bool
    save_dtype: torch.dtype | None
    device: torch.device
    _trained: list[nn.Parameter] | None = field(default=None, init=False, repr=False)  # found at the first step

    @property
    def is_text_frozen(self) -> bool:
        """False: text encoders' networks learn until the end, or not at all."""
        return False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The network, for accelerate to prepare."""
        return (self.network,)

    def parameter_groups(self) -> plugin.OptimizerGroups:
        """Return the network's groups with their learning rates; weights without a rate stop requiring gradients."""
        return plugin.optimizer_groups(
            self.network, self.options.text_encoder_lr, self.options.unet_lr, self.learning_rate
        )

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the weights that gradient clipping looks at."""
        if self._trained is None:
            self._trained = plugin.trainable_parameters(self.network)
        return self._trained

    def train(self) -> None:
        """Switch the network's dropouts on."""
        plugin.start_epoch(self.network, self.models)

    def eval(self) -> None:
        """Switch the network's dropouts off."""
        self.network.eval()

    def before_batch(self) -> None:
        """Tell networks that want to know that a batch begins."""
        plugin.start_step(self.network, self.models)

    def untrained(self) -> AbstractContextManager[None]:
        """Return a context in which the models predict without the network. Raises: OptionError if it cannot be so."""
        return plugin.switched_off(self.network)

    def before_update(self) -> dict[str, Tensor]:
        """Return the norms of networks that watch theirs."""
        return plugin.measure_norms(self.network)

    def after_update(self) -> dict[str, Tensor]:
        """Cap the norms where --scale_weight_norms asks for it."""
        if not self.options.scale_weight_norms:
            return {}
        measured = plugin.limit_norms(self.network, self.options.scale_weight_norms, self.device)
        return {name: torch.as_tensor(value) for name, value in measured.items()}

    def enable_gradient_checkpointing(self) -> None:
        """Tell the network that the models recompute their activations."""
        plugin.enable_gradient_checkpointing(self.network)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the network's file."""
        plugin.save(self.network, path, self.save_dtype, metadata)

    def weights(self) -> Mapping[str, Tensor]:
        """Return the network's weights exactly, for the state of a run."""
        return self.network.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Take back what `weights` gave. Raises: CheckpointError if the network has another shape now."""
        try:
            self.network.load_state_dict(dict(weights))
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise CheckpointError(
                f"{origin}: the network has another shape than when the state was saved ({first}). "
                "Resume with the same network options."
            ) from error


def check(options: NetworkOptions) -> ModuleType:
    """Return the network module; to be called before any model is loaded.

    Raises: OptionError for a module that cannot be loaded, arguments that it refuses or files that are not there.
    """
    if not options.network_module:
        raise OptionError("--network_module is missing. For a LoRA: --network_module networks.lora")
    arguments = network_arguments(options.network_args)
    module = plugin.load(options.network_module)
    if options.scale_weight_norms:
        plugin.check_norm_limit(module)
    if not options.dim_from_weights:  # where a file gives the ranks, those of the options are not used
        plugin.check_arguments(module, options.network_dim, options.network_alpha, options.network_dropout, arguments)
    return module


def network_arguments(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return --network_args by key: each is key=value, split at the first '='.

    Raises: OptionError for one without '='.
    """
    arguments = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise OptionError(f'--network_args: "{pair}" is not of the form key=value.')
        arguments[key.strip()] = value
    return arguments


def create(
    module: ModuleType,
    options: NetworkOptions,
    learning_rate: float,
    family: ModelFamily,
    parts: Parts,
    *,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    device: torch.device,
) -> NetworkTrainee:
    """Return a network attached to the models.

    Args:
        module: from `check`.
        options: the network group.
        learning_rate: where unet_lr or text_encoder_lr say nothing.
        family: names the modules that can be adapted.
        parts: on the device.
        dtypes: of the trained weights, and of those in files (None: as trained).
        device: where to train.
    """
    # Without those that are not to be adapted, as they may have been let go: a network that made layers for them, to
    # drop these at once, would have drawn other weights for the denoiser.
    is_text_adapted = not options.network_train_unet_only
    models = _models(family, parts if is_text_adapted else replace(parts, text_encoders=()))
    arguments = network_arguments(options.network_args)
    if options.dim_from_weights and options.network_weights:
        network, _ = plugin.create_from_weights(module, models, options.network_weights, arguments)
    else:
        network = plugin.create(
            module, models, options.network_dim, options.network_alpha, options.network_dropout, arguments
        )
    is_unet_trained = not options.network_train_text_encoder_only
    plugin.apply(network, models, is_text_adapted, is_unet_trained)
    if options.network_weights:
        outcome: Any = network.load_weights(options.network_weights)  # type: ignore[operator]
        log.info("network weights: %s (%s)", options.network_weights, outcome)
    network.to(device=device, dtype=dtypes[0])
    plugin.prepare_gradients(network, models)
    rates = options.text_encoder_lr if options.text_encoder_lr else (learning_rate,)
    return NetworkTrainee(network, models, options, learning_rate, is_text_adapted and any(rates), dtypes[1], device)


def merge_base_weights(module: ModuleType, options: NetworkOptions, family: ModelFamily, parts: Parts) -> None:
    """Merge the files of --base_weights into the models, in their order; weights in float8 are too coarse for that.

    Args:
        module: from `check`.
        options: the network group.
        family: names the modules that can be adapted.
        parts: on any device; it is fastest where they train.
    """
    models = _models(family, parts)
    multipliers = list(options.base_weights_multiplier or ())
    for index, file in enumerate(options.base_weights or ()):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        # What it draws to begin with is not used, and must not shift the draws of the network that is trained: so
        # training on --base_weights and on a model that they were merged into is the same.
        with torch.random.fork_rng(devices=[]):
            network, tensors = plugin.create_from_weights(module, models, file, {}, multiplier, for_inference=True)
        plugin.merge(network, models, tensors, None)
        log.info("merged %s into the base model, times %g", file, multiplier)


def _models(family: ModelFamily, parts: Parts) -> plugin.Models:
    return plugin.Models(parts.text_encoders, parts.denoiser, parts.vae, tuple(family.lora_targets(parts)))
