"""Full fine-tuning: the denoiser and the text encoders themselves are trained, and saved as a whole model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.models import unet
from library.models.family import Parts
from library.models.whole_model import FOLDERS
from library.models.writing import WholeFamily
from library.training.precision import Precision
from library.training.saving import save_dtype
from networks.plugin import OptimizerGroups

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from library.models.whole_model import Kept
    from library.options import Options
    from library.training.assembly import Setting

log = logging.getLogger(__name__)

DENOISER, TEXT_ENCODER = "unet", "text_encoder"  # of learning rates, and of weights in a state


@dataclass(frozen=True)
class FullModel:
    """The models themselves are trained."""

    trains_models = True

    @classmethod
    def checked(cls, options: Options, family: ModelFamily) -> FullModel:
        """Return the method; its options are checked with all others."""
        return cls()

    def precision(self, options: Options) -> Precision:
        """Return the formats of the run: weights that learn are float32, or half with --full_fp16 / --full_bf16."""
        formats = Precision.from_options(options)
        return replace(formats, frozen=formats.trained)

    def merge_base_weights(self, options: Options, family: ModelFamily, parts: Parts) -> None:
        """Return at once: there is no option to merge files."""

    def trainee(self, setting: Setting, parts: Parts) -> FullTrainee:
        """Return the models, ready to learn; activations are recomputed where that is wanted."""
        options, family = setting.options, setting.family
        stop = stop_of(options)
        made = FullTrainee(
            parts,
            Rates.of(options, is_text_trained=stop is None or stop > 0),
            stop,
            Output.of(setting, parts) if setting.accelerator.is_main_process else None,
            setting.plan.steps_per_epoch,
            setting.steps_done,
        )
        if setting.checked.data.users_of_untrained:
            made.keep_untrained(setting.checked.precision.autocast)
        if options.training.gradient_checkpointing:
            family.enable_gradient_checkpointing(
                parts, made.is_text_trained, is_offloaded=options.training.cpu_offload_checkpointing
            )
        return made

    def saved_suffix(self, options: Options) -> str:
        """Return how the names of saved models end; diffusers folders' with nothing."""
        form = options.saving.model_form(options.model.pretrained_model_name_or_path or "")
        return "" if form in FOLDERS else f".{form}"

    def may_leave_weights_out(self, options: Options, family: ModelFamily) -> bool:
        """Return whether text encoders have layers that are not read, or are to stop learning."""
        stop = stop_of(options)
        return (stop is None and family.leaves_text_layers_out) or (stop is not None and stop > 0)


def stop_of(options: Options) -> int | None:
    """Return the optimizer step after which text encoders stay as they are; 0: from the start; None: never."""
    stop, rates = options.training.stop_text_encoder_training, options.optimizer.text_encoder_rates
    return 0 if not any(rate != 0 for rate in rates) else None if stop is None else max(0, stop)


@dataclass(frozen=True)
class Rates:
    """The learning rates."""

    denoiser: float
    text_encoders: tuple[float | None, ...]  # of each; None: as the denoiser's; 0: it stays as it is
    is_text_trained: bool
    blocks: tuple[float, ...] | None = None  # of the denoiser's blocks in place of its own

    @staticmethod
    def of(options: Options, *, is_text_trained: bool) -> Rates:
        """Return the rates that the options ask for."""
        chosen = options.optimizer
        return Rates(chosen.learning_rate, chosen.text_encoder_rates, is_text_trained, chosen.block_rates)


@dataclass(frozen=True)
class Output:
    """What is needed to write whole models, beside what is trained."""

    family: WholeFamily
    kept: Kept  # of the model that the run starts from
    vae: nn.Module  # on the CPU
    text_encoders: tuple[nn.Module, ...]  # those of the run, or on the CPU where all captions are encoded already
    form: str
    dtype: torch.dtype | None  # of what is written; None: as trained

    @staticmethod
    def of(setting: Setting, parts: Parts) -> Output:
        """Return it, read once: the model that the run starts from may be moved or removed meanwhile.

        Raises: CheckpointError.
        """
        options, family = setting.options, setting.family
        assert isinstance(family, WholeFamily), "the script of a family that cannot be written whole trains networks"
        checkpoint = options.model.pretrained_model_name_or_path or ""
        dtype = save_dtype(options.saving.save_precision)
        return Output(
            family,
            family.kept(checkpoint),
            family.load_vae(checkpoint, options.model.vae, dtype or torch.float32),
            parts.text_encoders or family.load_text_encoders(checkpoint, dtype or torch.float32),
            options.saving.model_form(options.model.pretrained_model_name_or_path or ""),
            dtype,
        )


@dataclass
class FullTrainee:
    """The denoiser and the text encoders of a family."""

    parts: Parts
    rates: Rates
    stop: int | None  # the optimizer step after which text encoders stay as they are; None: never
    output: Output | None  # None: on processes that write nothing
    steps_per_epoch: int
    steps_done: int = 0
    _trained: list[nn.Parameter] | None = field(default=None, init=False, repr=False)
    _untrained: Parts | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Let the weights learn."""
        for model in self.modules:
            model.requires_grad_(True)
        if self.is_text_frozen:
            self._freeze_text()

    @property
    def is_text_trained(self) -> bool:
        """Whether text encoders learn at all."""
        return self.rates.is_text_trained

    @property
    def is_text_frozen(self) -> bool:
        """Whether text encoders have learnt all they are to learn."""
        return self.stop is not None and self.steps_done >= self.stop

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The models that learn, for accelerate to prepare."""
        return (self.parts.denoiser, *self._text_encoders().values())

    def _text_encoders(self) -> dict[int, nn.Module]:
        """Return the text encoders that learn, by their places among all."""
        if not self.is_text_trained:
            return {}
        both = zip(self.parts.text_encoders, self.rates.text_encoders, strict=False)
        return {index: encoder for index, (encoder, rate) in enumerate(both) if rate != 0}

    def parameter_groups(self) -> OptimizerGroups:
        """Return one group for what learns at the common rate, and one for each model or block with its own.

        Weights whose rate is 0 are in no group, and stop requiring gradients, so that clipping does not count them.
        """
        common = [] if self.rates.blocks else list(self.parts.denoiser.parameters())
        apart = self._blocks()
        for index, encoder in self._text_encoders().items():
            rate = self.rates.text_encoders[index]
            name = f"{TEXT_ENCODER}{index + 1}" if len(self.parts.text_encoders) > 1 else TEXT_ENCODER
            if rate is None and self.rates.blocks is None:
                common += encoder.parameters()
            else:
                apart[name] = {
                    "params": list(encoder.parameters()),
                    "lr": self.rates.denoiser if rate is None else rate,
                }
        groups = {**({DENOISER: {"params": common, "lr": self.rates.denoiser}} if common else {}), **apart}
        for name in [name for name, group in groups.items() if group["lr"] == 0]:
            for weight in groups.pop(name)["params"]:
                weight.requires_grad_(False)
        return OptimizerGroups(list(groups.values()), list(groups))

    def _blocks(self) -> dict[str, dict[str, Any]]:
        """Return a group for each block of the denoiser, by name, where blocks have rates."""
        if self.rates.blocks is None:
            return {}
        groups: dict[str, dict[str, Any]] = {
            f"{DENOISER}_block{index}": {"params": [], "lr": rate} for index, rate in enumerate(self.rates.blocks)
        }
        places = unet.block_indices(self.parts.denoiser)
        for name, weight in self.parts.denoiser.named_parameters():
            groups[f"{DENOISER}_block{places[name]}"]["params"].append(weight)
        return groups

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the weights that gradient clipping looks at: those that learn now."""
        if self._trained is None:
            self._trained = [weight for model in self.modules for weight in model.parameters() if weight.requires_grad]
        return self._trained

    def train(self) -> None:
        """Put the models in train mode, which gradient checkpointing asks for; none has dropout."""
        for model in self.modules:
            model.train()

    def eval(self) -> None:
        """Put the models in evaluation mode."""
        for model in self.modules:
            model.eval()

    def before_batch(self) -> None:
        """Return at once: nothing is due."""

    def keep_untrained(self, autocast: torch.dtype | None) -> None:
        """Keep the models as they are now, beside those that learn; to be called before they do.

        Args:
            autocast: what most of the arithmetic is done in; None: float32 throughout.
        """
        before = {id(model): frozen_copy(model, autocast) for model in self.modules}
        encoders = tuple(before.get(id(encoder), encoder) for encoder in self.parts.text_encoders)
        self._untrained = replace(self.parts, denoiser=before[id(self.parts.denoiser)], text_encoders=encoders)
        num_bytes = sum(weight.nbytes for model in before.values() for weight in model.parameters())
        log.info("the models as they are before the training are kept beside them: %.2f GB", num_bytes / 1e9)

    def untrained(self) -> AbstractContextManager[Parts | None]:
        """Return a context whose value are the models as `keep_untrained` found them."""
        assert self._untrained is not None, "kept where the data asks for it"
        return nullcontext(self._untrained)

    def before_update(self) -> dict[str, Tensor]:
        """Return nothing: no norms are watched."""
        return {}

    def after_update(self) -> dict[str, Tensor]:
        """Count the step; with the last one of the text encoders, leave them as they are from here on."""
        self.steps_done += 1
        if self.stop is not None and self.steps_done == self.stop:
            self._freeze_text()
            log.info("text encoders stay as they are from step %d on (--stop_text_encoder_training)", self.stop + 1)
        return {}

    def _freeze_text(self) -> None:
        for model in self.parts.text_encoders:
            model.requires_grad_(False)
            for weight in model.parameters():
                weight.grad = None  # without a gradient, an optimizer leaves a weight alone
        self._trained = None

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the whole model: a file, or a folder."""
        output = self.output
        assert output is not None, "only the main process writes"
        place = (self.steps_done, -(-self.steps_done // self.steps_per_epoch))
        whole = replace(self.parts, vae=output.vae, text_encoders=output.text_encoders)
        output.family.save_whole(
            whole, output.kept, path, form=output.form, dtype=output.dtype, metadata=metadata, place=place
        )

    def weights(self) -> Mapping[str, Tensor]:
        """Return the trained weights exactly, for the state of a run."""
        return {
            f"{prefix}.{name}": tensor for prefix, model in self._named() for name, tensor in model.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor], origin: str) -> None:
        """Take back what `weights` gave. Raises: CheckpointError if it is of another model."""
        for prefix, model in self._named():
            own = {name.removeprefix(f"{prefix}."): t for name, t in weights.items() if name.startswith(f"{prefix}.")}
            try:
                model.load_state_dict(own)
            except RuntimeError as error:
                first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
                raise CheckpointError(
                    f"{origin}: the state is of another model ({first}). Resume with the model that it was saved with."
                ) from error

    def _named(self) -> Iterator[tuple[str, nn.Module]]:
        yield DENOISER, self.parts.denoiser
        for index, model in self._text_encoders().items():
            yield f"{TEXT_ENCODER}{index + 1}", model


def frozen_copy(model: nn.Module, autocast: torch.dtype | None) -> nn.Module:
    """Return a copy of a model, in evaluation mode, that does not learn; its weights stay as they are now.

    Layers whose weights are cast at each use anyway are kept as cast: half the memory, and no bit of what comes out
    changes.

    Args:
        model: to be copied.
        autocast: what their weights are cast to; None: they are not.
    """
    cast: dict[int, nn.Parameter] = {}  # what takes the place of weights in the copy: they are never there whole
    for layer in model.modules():
        if autocast is not None and isinstance(layer, nn.Linear | nn.Conv2d):
            for weight in layer.parameters(recurse=False):
                cast[id(weight)] = nn.Parameter(weight.detach().to(autocast, copy=True), requires_grad=False)
    return copy.deepcopy(model, dict(cast)).requires_grad_(False).eval()
