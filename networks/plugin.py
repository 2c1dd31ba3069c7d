"""Network modules by name, ours or third-party (LyCORIS): all asking what one of them can do is in this file.

The face is sd-scripts': a module with `create_network` and `create_network_from_weights`, and the network it returns.
Our own modules have the same face, so that training deals with one kind of network.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError, did_you_mean
from library.models.family import LoraTarget

KNOWN_MODULES = (
    "networks.lora",
    "networks.lora_fa",
    "networks.dylora",
    "networks.oft",
    "networks.lora_sd3",
    "lycoris.kohya",
)
REQUIRED_METHODS = ("apply_to", "load_weights", "save_weights", "prepare_grad_etc", "get_trainable_params")
# Methods of networks that watch their norms, and what the logs call their means.
NORM_METHODS: Mapping[str, str] = {
    "weight_norms": "norm/avg_key_norm",
    "grad_norms": "norm/avg_grad_norm",
    "combined_weight_norms": "norm/avg_combined_norm",
}


@dataclass(frozen=True)
class Models:
    """What a network is made for."""

    text_encoders: tuple[nn.Module, ...]
    unet: nn.Module
    vae: nn.Module | None
    targets: tuple[LoraTarget, ...]  # given to modules that ask for them, as ours do

    @property
    def text_encoder(self) -> Any:
        """The text encoders as the face wants them: one model or a list, under the paths that files are named by."""
        named = [_named_as_in_files(encoder) for encoder in self.text_encoders]
        return named[0] if len(named) == 1 else named


@dataclass(frozen=True)
class OptimizerGroups:
    """What the optimizer gets, with a name for each learning rate."""

    groups: list[dict[str, Any]]
    descriptions: list[str]


def load(name: str) -> ModuleType:
    """Return the network module of that name.

    Raises:
        OptionError: it does not exist, needs a package that is not installed, or is no network module.
    """
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            hint = did_you_mean(name, KNOWN_MODULES) or f" Known: {', '.join(KNOWN_MODULES)}."
            install = " Install it with: pip install lycoris-lora." if missing == "lycoris" else hint
            raise OptionError(f"--network_module {name}: there is no such module.{install}") from None
        raise OptionError(f"--network_module {name}: it needs {missing}, which is not installed.") from None
    except (ValueError, TypeError):
        raise OptionError(f'--network_module: "{name}" is not a module name such as networks.lora.') from None
    if not hasattr(module, "create_network"):
        raise OptionError(f"--network_module {name}: has no create_network, so it is not a network module.")
    _name_layers_once(module)
    return module


def _name_layers_once(module: ModuleType) -> None:
    """Let LyCORIS' presets "full" and "full-lin" be used on a U-Net, which fail at layers that they name twice.

    Since 4.1 they list the class TimestepEmbedding, beside its two layers by name.
    """
    for preset in getattr(module, "PRESET", {}).values():
        if "TimestepEmbedding" in preset.get("unet_target_module", ()):
            preset["unet_target_name"] = [
                name for name in preset.get("unet_target_name", ()) if not name.startswith("time_embedding.")
            ]


def check_arguments(
    module: ModuleType, dim: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, str]
) -> None:
    """Let a module that can do so find mistakes in the options before there is a model. Raises: OptionError."""
    if hasattr(module, "check_arguments"):
        module.check_arguments(dim, alpha, dropout, arguments)


def check_norm_limit(module: ModuleType) -> None:
    """Raise OptionError if the module says that its networks have no norms to limit; others are asked at a step."""
    if not getattr(module, "CAN_LIMIT_NORMS", True):
        raise OptionError(f"--scale_weight_norms: {module.__name__} cannot do that. Leave it out.")


def create(
    module: ModuleType,
    models: Models,
    dim: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, str],
    multiplier: float = 1.0,
) -> nn.Module:
    """Return a new network for the models, not attached yet.

    Args:
        module: as loaded.
        models: to be adapted.
        dim: --network_dim.
        alpha: --network_alpha.
        dropout: --network_dropout; under both names that modules know it by, unless arguments has its own.
        arguments: --network_args by key.
        multiplier: strength.

    Raises: OptionError, also for whatever a module of others raises, which checks its arguments here at the earliest.
    """
    try:
        network = module.create_network(
            multiplier,
            dim,
            alpha,
            models.vae,
            models.text_encoder,
            models.unet,
            neuron_dropout=dropout,
            **{"dropout": dropout, **arguments},
            **_targets(module.create_network, models),
        )
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        if hasattr(module, "check_arguments"):
            raise
        raise OptionError(
            f"--network_module {module.__name__} makes no network of this: {type(error).__name__}: {error}. "
            f"Check --network_args {' '.join(f'{key}={value}' for key, value in arguments.items())}."
        ) from error
    return _checked(module, network)


def create_from_weights(
    module: ModuleType,
    models: Models,
    file: str,
    arguments: Mapping[str, str],
    multiplier: float = 1.0,
    for_inference: bool = False,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network shaped as in a file, and the file's tensors, which are not loaded into it."""
    if not hasattr(module, "create_network_from_weights"):
        raise OptionError(f"--network_module {module.__name__}: cannot take its ranks from a file.")
    network, tensors = module.create_network_from_weights(
        multiplier,
        file,
        models.vae,
        models.text_encoder,
        models.unet,
        for_inference=for_inference,
        **arguments,
        **_targets(module.create_network_from_weights, models),
    )
    return _checked(module, network), tensors


def apply(network: nn.Module, models: Models, to_text_encoders: bool, to_unet: bool) -> None:
    """Make the models compute with the network."""
    network.apply_to(models.text_encoder, models.unet, to_text_encoders, to_unet)  # type: ignore[operator]


def merge(network: nn.Module, models: Models, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Add a file's updates to the models' weights, for --base_weights."""
    if not hasattr(network, "merge_to"):
        raise OptionError(f"--base_weights: {type(network).__name__} cannot be merged into a model.")
    device = next(models.unet.parameters()).device
    network.merge_to(models.text_encoder, models.unet, tensors, dtype, device)  # type: ignore[operator]


def optimizer_groups(
    network: nn.Module, text_encoder_lrs: Sequence[float] | None, unet_lr: float | None, default_lr: float | None
) -> OptimizerGroups:
    """Return the network's parameter groups, whichever signature it has; what is in none requires no gradients.

    Args:
        network: applied to its models.
        text_encoder_lrs: --text_encoder_lr; networks that know one rate only get the first.
        unet_lr: --unet_lr.
        default_lr: --learning_rate; left out for networks that do not take it.
    """
    several = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    if several is not None:
        result = _call(several, list(text_encoder_lrs or ()) or None, unet_lr, default_lr)
    else:
        single = getattr(network, "prepare_optimizer_params", None)
        if single is None:
            raise OptionError(
                f"{type(network).__name__} names no parameters to train, so it is not a trainable network."
            )
        result = _call(single, text_encoder_lrs[0] if text_encoder_lrs else None, unet_lr, default_lr)
    groups, descriptions = result if isinstance(result, tuple) else (result, None)
    groups = [{**group, "params": list(group["params"])} for group in groups]  # LyCORIS hands out dictionary views
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    return OptimizerGroups(groups, list(descriptions or [f"group{index}" for index in range(len(groups))]))


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that gradient clipping looks at."""
    return [p for p in network.get_trainable_params() if p.requires_grad]  # type: ignore[operator]


def save(network: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
    """Write the network's file; the caller sees to it that it is whole.

    Args:
        network: to be saved.
        path: its suffix chooses the format.
        dtype: to write in; None: as trained.
        metadata: for the header. The network gets a copy, since LyCORIS adds to it.
    """
    network.save_weights(str(path), dtype, dict(metadata or {}))  # type: ignore[operator]


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Tell the network that the models recompute their activations."""
    if hasattr(network, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()  # type: ignore[operator]


def prepare_gradients(network: nn.Module, models: Models) -> None:
    """Let the network decide which of its weights require gradients; those without a rate stay as they were."""
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    network.prepare_grad_etc(models.text_encoder, models.unet)  # type: ignore[operator]
    for parameter in frozen:
        parameter.requires_grad_(False)


def start_epoch(network: nn.Module, models: Models) -> None:
    """Tell the network that an epoch begins, and put it in training mode."""
    if hasattr(network, "on_epoch_start"):
        network.on_epoch_start(models.text_encoder, models.unet)  # type: ignore[operator]
    network.train()


def start_step(network: nn.Module, models: Models) -> None:
    """Tell the network that a step begins, if it wants to know."""
    if hasattr(network, "on_step_start"):
        network.on_step_start(models.text_encoder, models.unet)  # type: ignore[operator]


def set_multiplier(network: nn.Module, multiplier: float) -> None:
    """Set the network's strength."""
    if not hasattr(network, "set_multiplier"):
        raise OptionError(f"{type(network).__name__} cannot change its strength.")
    network.set_multiplier(multiplier)  # type: ignore[operator]


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """Return a context in which the models compute as if there were no network.

    Raises: OptionError for a network that cannot change its strength.
    """
    if not hasattr(network, "set_multiplier"):
        raise OptionError(
            f"diff_output_preservation, mask_prior_weight: {type(network).__name__} cannot be switched off for it, as "
            "it has no set_multiplier. Leave it out, or train another network."
        )
    strength = getattr(network, "multiplier", 1.0)
    set_multiplier(network, 0.0)
    try:
        yield
    finally:
        set_multiplier(network, strength)


def limit_norms(network: nn.Module, max_norm: float, device: torch.device) -> dict[str, Any]:
    """Apply --scale_weight_norms; return what it did, under the names of the logs. No value is read off the device."""
    if not hasattr(network, "apply_max_norm_regularization"):
        raise OptionError(f"--scale_weight_norms: {type(network).__name__} cannot do that. Leave it out.")
    scaled, mean, largest = network.apply_max_norm_regularization(max_norm, device)  # type: ignore[operator]
    return {"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": largest}


def measure_norms(network: nn.Module) -> dict[str, Any]:
    """Return the norms that the network keeps of itself; none for most networks.

    To be called between backward and the optimizer's step, when gradients are there.
    """
    for method in ("update_grad_norms", "update_norms"):
        if hasattr(network, method):
            getattr(network, method)()
    measured = {label: getattr(network, name)() for name, label in NORM_METHODS.items() if hasattr(network, name)}
    return {label: torch.as_tensor(norms).float().mean() for label, norms in measured.items() if norms is not None}


def _call(method: Any, text_encoder_lr: Any, unet_lr: float | None, default_lr: float | None) -> Any:
    try:
        # Asked beforehand: a retry after a TypeError would also hide the network's own mistakes.
        inspect.signature(method).bind(text_encoder_lr, unet_lr, default_lr)
    except TypeError:
        return method(text_encoder_lr, unet_lr)
    return method(text_encoder_lr, unet_lr, default_lr)


def _targets(function: Any, models: Models) -> dict[str, Any]:
    return {"targets": models.targets} if "targets" in inspect.signature(function).parameters else {}


def _checked(module: ModuleType, network: Any) -> nn.Module:
    if network is None:
        raise OptionError(f"--network_module {module.__name__}: made no network from these options.")
    missing = [name for name in REQUIRED_METHODS if not hasattr(network, name)]
    if missing:
        raise OptionError(f"--network_module {module.__name__}: its network has no {', '.join(missing)}.")
    return network


class _TextModelHolder(nn.Module):
    """A text encoder one level down, where module paths and with them names in files begin with text_model."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def _named_as_in_files(encoder: nn.Module) -> nn.Module:
    # transformers 5 took the level away from CLIPTextModel, but not from CLIPTextModelWithProjection.
    flat_clip = hasattr(encoder, "embeddings") and hasattr(encoder, "final_layer_norm")
    return _TextModelHolder(encoder) if flat_clip and not hasattr(encoder, "text_model") else encoder
