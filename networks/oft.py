"""Orthogonal fine-tuning of a U-Net (Qiu et al. 2023, arXiv:2306.07280): `--network_module networks.oft`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from library.errors import CheckpointError, OptionError
from library.models.family import LoraTarget
from library.models.layout import lora_names
from networks.adapter_network import AdapterNetwork
from networks.face import targets_of, tensors_of, warn_of_surplus
from networks.parameter_groups import ParameterGroup
from networks.rotation import RotationLayer, StoredRotation, rotations_in
from networks.settings import OF_SD3, Arguments, probability

log = logging.getLogger(__name__)

PREFIX = "oft_unet"  # in files, where a LoRA has lora_unet
CAN_LIMIT_NORMS = False  # a rotation changes no norm; read before there is a network
DEFAULT_BLOCKS = 4
DEFAULT_ALPHA = 1e-3
LARGE_ALPHA = 1.0  # what --network_alpha is where nobody sets it, which suits a LoRA

NO_DROPOUT = "there are no ranks or activations in between that it could drop. module_dropout is there."
KNOWN = Arguments(
    "networks.oft",
    ("enable_all_linear", "enable_conv", "module_dropout"),
    {"dropout": NO_DROPOUT, "rank_dropout": NO_DROPOUT, **OF_SD3},
)
SWITCHES: Mapping[str, bool] = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Settings:
    """Which modules are rotated, and how far."""

    num_blocks: int = DEFAULT_BLOCKS
    alpha: float = DEFAULT_ALPHA
    is_all_linear: bool = False  # all of the transformers, not just their attention
    has_resnets: bool = False
    module_dropout: float | None = None

    def is_wanted(self, target: LoraTarget) -> bool:
        """Return whether a target of the U-Net is rotated."""
        if target.kind == "resnet":
            return self.has_resnets
        return self.is_all_linear or re.search(r"_attn\d*_", target.name) is not None


class OftNetwork(AdapterNetwork):
    """A rotation of the outputs of many modules of a U-Net."""

    def _parameter_groups(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None
    ) -> list[ParameterGroup]:
        return [ParameterGroup("unet", tuple(self.parameters()), unet_lr)]

    def _stored_in(self, tensors: Mapping[str, Tensor], origin: str) -> Mapping[str, StoredRotation]:
        return rotations_in(tensors, origin)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    *,
    targets: Sequence[LoraTarget] | None = None,
    **kwargs: Any,
) -> OftNetwork:
    """Return a new network, which changes nothing before it is trained; `apply_to` attaches it.

    Args:
        multiplier: strength, 1 in training.
        network_dim: number of blocks that a module's outputs are parted into; None: 4.
        network_alpha: limit of the rotation, small; None: 0.001.
        vae: part of the face; not adapted.
        text_encoder: part of the face; not adapted.
        unet: the denoiser.
        neuron_dropout: refused; None or 0: none.
        targets: the modules to choose from, under the names a LoRA has for them; None: those of unet.
        kwargs: --network_args by key.
    """
    wanted = _settings(network_dim, network_alpha, neuron_dropout, kwargs)
    if wanted.alpha >= LARGE_ALPHA:
        log.warning("--network_alpha %g hardly limits a rotation; for networks.oft take about 0.001", wanted.alpha)
    offered = _offered(text_encoder, unet, targets)
    layers = (
        RotationLayer(target, wanted.num_blocks, wanted.alpha, wanted.module_dropout, multiplier)
        for target in offered
        if wanted.is_wanted(target)
    )
    return OftNetwork(layers, multiplier)


def check_arguments(
    network_dim: int | None, network_alpha: float | None, neuron_dropout: float | None, arguments: Mapping[str, Any]
) -> None:
    """Find mistakes in what `create_network` would get, before there is a model. Raises: OptionError."""
    _settings(network_dim, network_alpha, neuron_dropout, arguments)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    *,
    targets: Sequence[LoraTarget] | None = None,
    **kwargs: Any,
) -> tuple[OftNetwork, dict[str, Tensor]]:
    """Return a network with the modules, blocks and alphas of a file, and its tensors, which are not loaded into it.

    Args:
        multiplier: strength.
        file: read unless weights_sd is given.
        vae: part of the face.
        text_encoder: part of the face.
        unet: the denoiser.
        weights_sd: the tensors, if they are read already.
        for_inference: True: in evaluation mode, without gradients.
        targets: as for `create_network`.
        kwargs: --network_args; those that choose modules have no effect beside a file, which a warning says.

    Raises:
        CheckpointError: the file is of another kind, or none of it belongs to the model.
    """
    origin, tensors = tensors_of(file, weights_sd)
    stored = rotations_in(tensors, origin)
    offered = _offered(text_encoder, unet, targets)
    warn_of_surplus(stored, offered, origin)
    unused = [key for key in KNOWN.keys[:2] if kwargs.get(key) is not None]
    if unused:
        log.warning("--network_args: %s not used, the modules are those of the file", ", ".join(unused))
    dropout = _settings(None, None, None, kwargs).module_dropout
    layers = (
        _like_stored(target, stored[target.name], origin, dropout, multiplier)
        for target in offered
        if target.name in stored
    )
    network = OftNetwork(layers, multiplier)
    return (network.eval().requires_grad_(False) if for_inference else network), tensors


def _like_stored(
    target: LoraTarget, stored: StoredRotation, origin: str, module_dropout: float | None, multiplier: float
) -> RotationLayer:
    num_outputs, (num_blocks, size, _) = target.module.weight.shape[0], stored.blocks.shape  # type: ignore[index]
    if num_blocks * size != num_outputs:
        raise CheckpointError(
            f"{origin}: {target.name} is {stored.shape_text}, for {num_blocks * size} outputs; the model's has "
            f"{num_outputs}. Is it for another model?"
        )
    return RotationLayer(target, num_blocks, stored.alpha, module_dropout, multiplier)


def _settings(
    dim: int | None, alpha: float | None, neuron_dropout: float | None, arguments: Mapping[str, Any]
) -> Settings:
    if neuron_dropout:
        raise OptionError(f"--network_dropout: networks.oft cannot have it: {NO_DROPOUT} Leave it out.")
    # --network_dropout comes under this name too.
    given = KNOWN.given({key: value for key, value in arguments.items() if (key, value) != ("dropout", 0)})
    if dim is not None and dim < 1:
        raise OptionError(f"--network_dim must be at least 1, got {dim}.")
    if alpha is not None and alpha <= 0:
        raise OptionError(f"--network_alpha {alpha:g} lets nothing rotate; for networks.oft take about 0.001.")
    return Settings(
        num_blocks=DEFAULT_BLOCKS if dim is None else dim,
        alpha=DEFAULT_ALPHA if alpha is None else alpha,
        is_all_linear=_switch(given, "enable_all_linear"),
        has_resnets=_switch(given, "enable_conv"),
        module_dropout=probability(given, "module_dropout"),
    )


def _switch(given: Mapping[str, Any], key: str) -> bool:
    value = str(given.get(key, False)).strip().lower()
    if value not in SWITCHES:
        raise OptionError(f'--network_args: {key} must be true or false, got "{given[key]}".')
    return SWITCHES[value]


def _offered(text_encoder: Any, unet: Any, targets: Sequence[LoraTarget] | None) -> tuple[LoraTarget, ...]:
    """Return the modules to choose from under their names in files. Raises: OptionError for SD3."""
    return _renamed(targets_of(text_encoder, unet) if targets is None else targets)


def _renamed(targets: Sequence[LoraTarget]) -> tuple[LoraTarget, ...]:
    if lora_names.family_of(target.name for target in targets) == lora_names.SD3:
        # Its query, key and value are the outputs of one layer, and would be turned into each other.
        raise OptionError(
            "--network_module networks.oft is for U-Nets, and the model is Stable Diffusion 3. Use networks.lora_sd3."
        )
    unet = [target for target in targets if target.group == "unet"]
    return tuple(replace(target, name=PREFIX + target.name.removeprefix("lora_unet")) for target in unet)
