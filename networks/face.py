"""The functions of a network module whose layers are LoRAs; sd-scripts defined them and other tools call them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from library.errors import CheckpointError
from library.models.family import LoraTarget
from networks import files, settings, split_qkv
from networks.blocks import layout_of
from networks.layers import LayerMaker, LoraLayer
from networks.network import LoraNetwork
from networks.settings import Arguments, Settings, has_large_kernel

log = logging.getLogger(__name__)


def plain_layers(_arguments: Mapping[str, Any], _settings: Settings | None) -> LayerMaker:
    """Return what makes the layers of a LoRA as it is."""
    return LoraLayer


class SettingsReader(Protocol):
    """What makes settings of the options."""

    def __call__(
        self,
        dim: int | None,
        alpha: float | None,
        neuron_dropout: float | None,
        arguments: Mapping[str, Any],
        targets: Sequence[LoraTarget] | None,
        known: Arguments,
        /,
    ) -> Settings:
        """Return the settings; targets None: before there is a model. Raises: OptionError."""
        ...


def settings_by_blocks(
    dim: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    arguments: Mapping[str, Any],
    targets: Sequence[LoraTarget] | None,
    known: Arguments,
) -> Settings:
    """Return the settings of a LoRA that may differ between the blocks of a U-Net; see `networks.settings`."""
    if targets is None:
        return settings.check(dim, alpha, neuron_dropout, arguments, known)
    layout = layout_of(target.name for target in targets)
    return settings.read(dim, alpha, neuron_dropout, arguments, layout, known)


@dataclass(frozen=True)
class LoraFace:
    """A kind of LoRA; its methods are what a network module must offer."""

    arguments: Arguments
    # From --network_args and the settings (None: sizes are a file's) to what makes a layer. Raises: OptionError.
    layers_for: Callable[[Mapping[str, Any], Settings | None], LayerMaker] = plain_layers
    read_settings: SettingsReader = settings_by_blocks

    def create_network(
        self,
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
    ) -> LoraNetwork:
        """Return a new network, which changes nothing before it is trained; `apply_to` attaches it.

        Args:
            multiplier: strength, 1 in training.
            network_dim: rank; None: 4.
            network_alpha: strength in units of 1/rank; None: 1; 0: the rank.
            vae: part of the face; LoRA leaves it alone.
            text_encoder: one model, or a list of them.
            unet: the denoiser.
            neuron_dropout: probability, see `networks.layers.Dropout`.
            targets: the modules to choose from, under their names in files; None: those of text_encoder and unet.
            kwargs: --network_args by key, see `networks.settings`.
        """
        chosen = targets_of(text_encoder, unet) if targets is None else targets
        wanted = self.read_settings(network_dim, network_alpha, neuron_dropout, kwargs, chosen, self.arguments)
        if wanted.conv_size is not None and not any(wanted.size_of(t)[0] for t in chosen if has_large_kernel(t)):
            log.warning("--network_args: conv_dim has no effect: no convolution larger than 1x1 is adapted here")
        network = LoraNetwork(chosen, wanted, multiplier, make_layer=self.layers_for(kwargs, wanted))
        if wanted.is_listed:
            list_layers(network)
        return network

    def check_arguments(
        self,
        network_dim: int | None,
        network_alpha: float | None,
        neuron_dropout: float | None,
        arguments: Mapping[str, Any],
    ) -> None:
        """Find mistakes in what `create_network` would get, before there is a model. Raises: OptionError."""
        known = self.read_settings(network_dim, network_alpha, neuron_dropout, arguments, None, self.arguments)
        self.layers_for(arguments, known)

    def create_network_from_weights(
        self,
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
    ) -> tuple[LoraNetwork, dict[str, Tensor]]:
        """Return a network with the ranks and alphas of a file, and the file's tensors, which are not loaded into it.

        Args:
            multiplier: strength.
            file: read unless weights_sd is given.
            vae: part of the face.
            text_encoder: one model, or a list of them.
            unet: the denoiser.
            weights_sd: the tensors, if they are read already.
            for_inference: True: in evaluation mode, without gradients.
            targets: as for `create_network`.
            kwargs: --network_args; those that set ranks have no effect beside a file, which a warning says.

        Raises:
            CheckpointError: the file is no LoRA, or none of it belongs to the model.
        """
        origin, tensors = tensors_of(file, weights_sd)
        chosen = targets_of(text_encoder, unet) if targets is None else targets
        tensors = files.renamed(tensors, chosen)
        stored = files.modules_in(tensors, origin)
        warn_of_surplus(stored, chosen, origin)
        split_qkv.warn_of_weak(stored, origin)
        wanted = self._settings_beside_file(kwargs, chosen)
        network = LoraNetwork(chosen, wanted, multiplier, stored, self.layers_for(kwargs, None))
        if wanted.is_listed:
            list_layers(network)
        return (network.eval().requires_grad_(False) if for_inference else network), tensors

    def _settings_beside_file(self, arguments: Mapping[str, Any], targets: Sequence[LoraTarget]) -> Settings:
        ranks = [key for key in self.arguments.of_file if arguments.get(key) is not None]
        if ranks:
            log.warning("--network_args: %s not used, ranks and alphas are those of the file", ", ".join(ranks))
        others = {key: value for key, value in arguments.items() if key not in ranks}
        return self.read_settings(None, None, None, others, targets, self.arguments)


def list_layers(network: LoraNetwork) -> None:
    """Log every layer with its size."""
    for layer in network.layers:
        log.info("%s: rank %d, alpha %g", layer.target.name, layer.rank, float(layer.alpha))


def tensors_of(
    file: str | os.PathLike[str] | None, weights_sd: Mapping[str, Tensor] | None
) -> tuple[str, dict[str, Tensor]]:
    """Return the name for messages and the tensors of what a network is made from: a file, unless they are given."""
    if weights_sd is not None:
        return str(file or "weights_sd"), dict(weights_sd)
    assert file is not None, "create_network_from_weights needs a file or weights_sd"
    return str(file), files.read(file)


def warn_of_surplus(stored: Iterable[str], targets: Sequence[LoraTarget], origin: str) -> None:
    """Log a warning of a file's modules that the model does not have. Raises: CheckpointError if it has none."""
    names = set(stored)
    surplus = sorted(names - {target.name for target in targets})
    if len(surplus) == len(names):
        raise CheckpointError(f"{origin}: none of its modules belongs to this model (it has {surplus[0]}).")
    files.warn_of_names(origin, "modules that this model does not have, ignored", surplus)


def targets_of(text_encoder: Any, unet: Any) -> Sequence[LoraTarget]:
    """Return the modules that can be adapted, for a caller from outside; a trainee hands in its family's targets."""
    from library.models import lora_targets

    text_encoders = text_encoder if isinstance(text_encoder, (list, tuple)) else [text_encoder]
    return tuple(lora_targets.of(text_encoders, unet))
