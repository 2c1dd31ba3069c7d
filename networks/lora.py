"""LoRA for Linear and Conv2d: the face that `--network_module networks.lora` and other tools rely on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from library.errors import CheckpointError
from library.models.family import LoraTarget
from networks import files, settings
from networks.blocks import layout_of
from networks.network import LoraNetwork
from networks.settings import Settings

log = logging.getLogger(__name__)


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
    chosen = _targets_of(text_encoder, unet) if targets is None else targets
    wanted = settings.read(
        network_dim, network_alpha, neuron_dropout, kwargs, layout_of(target.name for target in chosen)
    )
    return LoraNetwork(chosen, wanted, multiplier)


def check_arguments(
    network_dim: int | None, network_alpha: float | None, neuron_dropout: float | None, arguments: Mapping[str, Any]
) -> None:
    """Find mistakes in what `create_network` would get, before there is a model. Raises: OptionError."""
    settings.check(network_dim, network_alpha, neuron_dropout, arguments)


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
    origin = str(file or "weights_sd")
    if weights_sd is None:
        assert file is not None, "create_network_from_weights needs a file or weights_sd"
        weights_sd = files.read(file)
    stored = files.modules_in(weights_sd, origin)
    chosen = _targets_of(text_encoder, unet) if targets is None else targets
    surplus = sorted(stored.keys() - {target.name for target in chosen})
    if len(surplus) == len(stored):
        raise CheckpointError(f"{origin}: none of its modules belongs to this model (it has {surplus[0]}).")
    files.warn_of_names(origin, "modules that this model does not have, ignored", surplus)
    network = LoraNetwork(chosen, _settings_beside_file(kwargs, chosen), multiplier, stored)
    return (network.eval().requires_grad_(False) if for_inference else network), dict(weights_sd)


def _settings_beside_file(arguments: Mapping[str, Any], targets: Sequence[LoraTarget]) -> Settings:
    ranks = [key for key in settings.RANK_KEYS if arguments.get(key) is not None]
    if ranks:
        log.warning("--network_args: %s not used, ranks and alphas are those of the file", ", ".join(ranks))
    others = {key: value for key, value in arguments.items() if key not in ranks}
    return settings.read(None, None, None, others, layout_of(target.name for target in targets))


def _targets_of(text_encoder: Any, unet: Any) -> Sequence[LoraTarget]:
    # Only a caller from outside comes here; a trainee hands in its family's targets.
    from library.models.sd import lora_targets_of

    text_encoders = text_encoder if isinstance(text_encoder, (list, tuple)) else [text_encoder]
    return tuple(lora_targets_of(text_encoders, unet))
