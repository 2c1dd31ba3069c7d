"""What a run trains: a network on top of frozen models, or the models themselves. The rest of a run is the same."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from library.models import block_swap, float8
from library.training import saved_texts, trainee
from library.training.precision import Precision
from library.training.saving import save_dtype
from networks import soundness

if TYPE_CHECKING:
    from library.models.family import ModelFamily, Parts
    from library.options import Options
    from library.training.assembly import Setting
    from library.training.trainee import Trainee


class Method(Protocol):
    """A way to train, which goes with any family. A frozen value, made before any model is loaded."""

    @property
    def trains_models(self) -> bool:
        """Whether the models' own weights learn."""

    @classmethod
    def checked(cls, options: Options, family: ModelFamily) -> Method:
        """Return the method as the options want it; whatever is wrong with them or with files of theirs is said now.

        Raises: OptionError, CheckpointError.
        """

    def precision(self, options: Options) -> Precision:
        """Return the formats of the run. Raises: OptionError."""

    def merge_base_weights(self, options: Options, family: ModelFamily, parts: Parts) -> None:
        """Merge the files of --base_weights into the models, wherever they are."""

    def trainee(self, setting: Setting, parts: Parts) -> Trainee:
        """Return what is trained, ready on the device."""

    def saved_suffix(self, options: Options) -> str | None:
        """Return how the names of saved models end, "" for folders; None: as --save_model_as says."""

    def may_leave_weights_out(self, options: Options, family: ModelFamily) -> bool:
        """Return whether a step may use only some of the trained weights, which several processes must then look for.

        Looking takes time at each step.
        """


@dataclass(frozen=True)
class NetworkMethod:
    """A LoRA or another network is trained; the models stay as they are."""

    module: ModuleType  # that makes networks

    trains_models = False

    @classmethod
    def checked(cls, options: Options, family: ModelFamily) -> NetworkMethod:
        """Return the method as the options want it; whatever is wrong with them or with files of theirs is said now.

        Raises: OptionError, CheckpointError.
        """
        module = trainee.check(options.network)
        saved_texts.check(options, family)
        given = [("--network_weights", options.network.network_weights)]
        given += [("--base_weights", file) for file in options.network.base_weights or ()]
        for option, file in given:
            if file is not None:
                soundness.check(file, option, family.other_networks)
        return cls(module)

    def precision(self, options: Options) -> Precision:
        """Return the formats of the run: frozen weights in that of --mixed_precision. Raises: OptionError."""
        return Precision.from_options(options)

    def merge_base_weights(self, options: Options, family: ModelFamily, parts: Parts) -> None:
        """Merge the files of --base_weights into the models, wherever they are."""
        trainee.merge_base_weights(self.module, options.network, family, parts)

    def trainee(self, setting: Setting, parts: Parts) -> Trainee:
        """Return the network, attached to the models; activations are recomputed where that is wanted."""
        options, formats = setting.options, setting.checked.precision
        with float8.refusing(options.network.network_module):
            trained = trainee.create(
                self.module,
                options.network,
                options.optimizer.learning_rate,
                setting.family,
                parts,
                dtypes=(formats.trained, save_dtype(options.saving.save_precision)),
                device=setting.accelerator.device,
            )
            # not sooner: a network may want to read the weights that it is made for
            if options.training.blocks_to_swap:
                block_swap.install(parts.denoiser, options.training.blocks_to_swap, setting.accelerator.device)
            for model in formats.float8_parts(parts):
                float8.try_adapted(model, formats.frozen)
        if options.training.gradient_checkpointing:
            setting.family.enable_gradient_checkpointing(
                parts, trained.is_text_trained, is_offloaded=options.training.cpu_offload_checkpointing
            )
            trained.enable_gradient_checkpointing()
        return trained

    def saved_suffix(self, options: Options) -> None:
        """Return None: networks are files of the kind that --save_model_as says."""
        return

    def may_leave_weights_out(self, options: Options, family: ModelFamily) -> bool:
        """Return whether a family leaves out text encoders' last layers, or module dropout any module."""
        is_layer_skipped = family.leaves_text_layers_out and not options.network.network_train_unet_only
        return is_layer_skipped or "module_dropout" in trainee.network_arguments(options.network.network_args)
