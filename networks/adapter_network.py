"""A set of layers on a model, whatever their kind: the face that sd-scripts defined and training calls."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from library.errors import CheckpointError, OptionError, did_you_mean
from networks import files
from networks.adapter import Adapter
from networks.parameter_groups import ParameterGroup

log = logging.getLogger(__name__)

TO_MERGE = "the file to merge"
Self = TypeVar("Self", bound="AdapterNetwork")


class Mergeable(Protocol):
    """What a file holds for one module."""

    @property
    def shape_text(self) -> str:
        """The shapes of its tensors, for messages."""
        ...

    def merged(self, weight: Tensor, multiplier: float) -> Tensor:
        """Return the module's weight with this in it, float32, on the weight's device.

        Raises: RuntimeError where the shapes do not fit.
        """
        ...


class AdapterNetwork(nn.Module, ABC):
    """Layers on the modules of a model; the base model is not among the network's modules."""

    def __init__(self, layers: Iterable[Adapter], multiplier: float) -> None:
        """Take the layers; the model does not compute with them until `attach` or `apply_to`.

        Args:
            layers: in the order of the file.
            multiplier: strength of every layer.
        """
        super().__init__()
        self.multiplier = multiplier
        for layer in layers:
            self.add_module(layer.target.name, layer)
        if not self.layers:
            raise OptionError("the network has no module to train: every rank or every block weight is 0.")

    @property
    def layers(self) -> tuple[Adapter, ...]:
        """Every layer, in the order of the file."""
        return tuple(layer for layer in self.children() if isinstance(layer, Adapter))

    def attach(self) -> None:
        """Make the model compute with the layers."""
        for layer in self.layers:
            layer.attach()

    def detach(self) -> None:
        """Give the model its own forward back, bit for bit."""
        for layer in reversed(self.layers):
            if layer.is_attached:
                layer.detach()

    @contextmanager
    def attached(self: Self) -> Iterator[Self]:
        """Return a context in which the model computes with the layers."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of every layer; at 0 the model computes as if there were none."""
        self.multiplier = multiplier
        for layer in self.layers:
            layer.multiplier = multiplier

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach to the models the network was created for, and drop the layers of the part that is not wanted.

        Args:
            text_encoder: as given at creation; the layers know their modules, so it is not looked at again.
            unet: likewise.
            apply_text_encoder: False: no layers on the text encoders, and none in the file.
            apply_unet: False: none on the U-Net.
        """
        wanted = {"text_encoder": apply_text_encoder, "unet": apply_unet}
        for layer in self.layers:
            if not wanted[layer.target.group]:
                delattr(self, layer.target.name)
        counts = {group: sum(layer.target.group == group for layer in self.layers) for group in wanted}
        if not any(counts.values()):
            raise OptionError("the network has no module to train: neither the text encoder nor the U-Net gets any.")
        log.info("network: %d modules on text encoders, %d on the U-Net", counts["text_encoder"], counts["unet"])
        self.attach()

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the optimizer's parameter groups and, as long, their descriptions.

        Weights whose rate is 0 or None are in no group, and stop requiring gradients, so that gradient clipping
        does not count them.

        Args:
            text_encoder_lr: one rate, or one for each text encoder, the last for all further ones; None: default_lr.
            unet_lr: None: default_lr.
            default_lr: --learning_rate.
        """
        rates = tuple(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else (text_encoder_lr,)
        groups = self._parameter_groups(
            [default_lr if rate is None else rate for rate in rates or (None,)],
            default_lr if unet_lr is None else unet_lr,
        )
        for group in groups:
            for parameter in group.parameters:
                parameter.requires_grad_(group.is_trained)
        trained = [group for group in groups if group.is_trained]
        if not trained:
            raise OptionError("nothing is trained: every learning rate is 0. Set --learning_rate or --unet_lr.")
        return [{"params": list(g.parameters), "lr": g.lr} for g in trained], [g.description for g in trained]

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return the weights that learn, for gradient clipping."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Return at once: the layers run inside the base model's checkpointed blocks and need no own checkpoints."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Return at once: weights require gradients from creation on, except those without a learning rate."""

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Put the layers, dropout included, in training mode."""
        self.train()

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the layers to a file, all or nothing.

        Args:
            file: .safetensors; any other suffix gets torch's format, without metadata.
            dtype: to write in; None: as trained.
            metadata: for the header, beside the hashes of the tensors.
        """
        files.write(file, self.state_dict(), dtype, metadata)

    def load_weights(self, file: str | os.PathLike[str]) -> str:
        """Read the layers from a file; return a line that says what was read.

        Alphas of the file replace those of the options. Layers that the file lacks stay as they are.

        Raises:
            CheckpointError: a shape does not fit, or no name does.
        """
        tensors = self._to_load(files.renamed(files.read(file), (layer.target for layer in self.layers)), file)
        own = self.state_dict()
        known = {name: files.fitted(tensor, own[name].shape) for name, tensor in tensors.items() if name in own}
        if not known:
            example = next(iter(tensors), "nothing")
            raise CheckpointError(
                f"{file}: none of its names belongs to this network (it has {example}).{did_you_mean(example, own)}"
            )
        for name, tensor in known.items():
            if tensor is None:
                raise CheckpointError(
                    f"{file}: {name} is {tuple(tensors[name].shape)}, this network's is {tuple(own[name].shape)}. "
                    "Set --network_dim and --network_args as in the file, or use --dim_from_weights."
                )
        files.warn_of_names(
            file, "names that this network does not have, ignored", [name for name in tensors if name not in own]
        )
        files.warn_of_names(
            file, "names missing, these stay as they are", [name for name in own if name not in tensors]
        )
        try:
            self.load_state_dict({**own, **known})
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        return f"{file}: {len(known)} of {len(own)} tensors loaded"

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: Any,
        unet: Any,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Change the base model's weights as a file's layers, times this network's multiplier, change their outputs.

        Args:
            text_encoder: as given at creation; not looked at again.
            unet: likewise.
            weights_sd: the file's tensors.
            dtype: the results are rounded to it before they go into the model; None: only to the model's own type.
            device: to compute on; None: where each weight is.
        """
        named = files.renamed(weights_sd, (layer.target for layer in self.layers))
        stored = self._stored_in(named, TO_MERGE)
        by_name = {layer.target.name: layer.target for layer in self.layers}
        files.warn_of_names(TO_MERGE, "modules that this model does not have, ignored", sorted(stored.keys() - by_name))
        for name in stored.keys() & by_name.keys():
            weight, source = by_name[name].module.weight, stored[name]
            assert isinstance(weight, Tensor)
            try:
                total = source.merged(weight if device is None else weight.to(device), self.multiplier)
            except RuntimeError:
                raise CheckpointError(
                    f"{name} in {TO_MERGE} is {source.shape_text}, "
                    f"the model's weight is {tuple(weight.shape)}. Is it for another model?"
                ) from None
            weight.copy_(total if dtype is None else total.to(dtype))

    def _to_load(self, tensors: Mapping[str, Tensor], origin: object) -> Mapping[str, Tensor]:
        """Return a file's tensors, by the names known here, as they are to be loaded."""
        return tensors

    @abstractmethod
    def _parameter_groups(
        self, text_encoder_lrs: Sequence[float | None], unet_lr: float | None
    ) -> list[ParameterGroup]:
        """Return the group of every weight that could learn."""

    @abstractmethod
    def _stored_in(self, tensors: Mapping[str, Tensor], origin: str) -> Mapping[str, Mergeable]:
        """Return what a file holds by module name. Raises: CheckpointError naming origin, if it is of another kind."""
