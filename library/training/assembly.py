"""The parts of a run, loaded, put in place and joined."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from library.dataset.plan import RunPlan
from library.errors import CheckpointError
from library.training import (
    changes,
    distribution,
    ema,
    file_metadata,
    fused,
    optimizers,
    rounding,
    schedules,
    shards,
    state,
    watching,
)
from library.training import data as training_data
from library.training.data import Data, Stores
from library.training.ema import Average
from library.training.file_metadata import FileMetadata, Hashes
from library.training.loop import Run
from library.training.metrics import LossHistory, LossReader
from library.training.precision import Precision
from library.training.prompts import SamplePrompt
from library.training.saving import Saver, save_dtype
from library.training.state import Contents, Manifest, Resumed
from library.training.states import StateSaver
from library.training.step import Step
from library.training.trackers import Trackers

if TYPE_CHECKING:
    from library.models.family import ModelFamily, Parts
    from library.options import Options
    from library.options.hub import HubOptions
    from library.options.optimizer import OptimizerOptions
    from library.training.hub import Uploads
    from library.training.loading import Loaded
    from library.training.method import Method
    from library.training.trainee import Trainee
    from networks.plugin import OptimizerGroups

log = logging.getLogger(__name__)

Publish = Callable[[Path], None] | None


@dataclass(frozen=True)
class Checked:
    """What is known of a run before any model is loaded."""

    method: Method
    precision: Precision
    tracker_names: tuple[str, ...]
    data: Data
    prompts: tuple[SamplePrompt, ...]  # of the previews; none where none are wanted
    resumed: Resumed | None = None  # None: a run from its start


@dataclass(frozen=True)
class Live:
    """What changes from step to step, and so makes up the state of a run."""

    trainee: Trainee
    step: nn.Module  # as prepared
    optimizer: Any
    scheduler: Any
    scaler: Any  # None without fp16
    history: LossHistory
    average: Average | None = None

    def contents(self, *, is_wanted: bool = True) -> Contents:
        """Return it for writing, where weights are whole; is_wanted: by this process, not by others alone."""
        return Contents(
            weights=self.trainee.weights(),
            optimizer=shards.whole_state(self.optimizer.state_dict(), is_wanted=is_wanted),
            scheduler=self.scheduler.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            history=self.history.as_plain(),
            validations=self.history.validations_as_plain(),
            average=None if self.average is None else self.average.snapshot(),
        )

    def restore(self, resumed: Resumed) -> None:
        """Take the state of an earlier run. Raises: CheckpointError if it does not fit this one."""
        contents = state.read(resumed)
        with shards.whole_weights(self.step, is_kept=True):
            self.trainee.load_weights(contents.weights, f"--resume {resumed.folder}")
        if self.average is not None:
            self.average.restore(contents.average, f"--resume {resumed.folder}")
        try:
            optimizers.load_state(self.optimizer, shards.shared_state(self.optimizer, contents.optimizer))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"--resume {resumed.folder}: the optimizer's state does not fit ({error}). "
                "Resume with the same optimizer and network options."
            ) from error
        self.scheduler.load_state_dict(contents.scheduler)
        if self.scaler is not None and contents.scaler is not None:
            self.scaler.load_state_dict(contents.scaler)
        self.history.replay(contents.history)
        self.history.replay_validations(contents.validations)


@dataclass(frozen=True)
class Setting:
    """What a run is, before its models are loaded."""

    options: Options
    family: ModelFamily
    checked: Checked
    accelerator: Accelerator
    plan: RunPlan
    max_train_steps: int
    started_at: float  # s since 1970
    trackers: Trackers
    uploads: Uploads | None  # None: nothing is uploaded, or by another process
    steps_done: int = 0  # before this run: of a resumed one, or --initial_step


def assemble(setting: Setting, loaded: Loaded, hashes: Hashes | None, mean_mask_weight: float | None = None) -> Run:
    """Return the run: the network made and attached, the optimizer and everything else around it.

    Args:
        setting: of the run.
        loaded: its models and caches.
        hashes: of the model files; None on processes that write nothing.
        mean_mask_weight: of the masked images, for the files' metadata; None where it is not known.
    """
    options, accelerator, plan = setting.options, setting.accelerator, setting.plan
    parts = loaded.parts
    stores = Stores(loaded.latents, None if loaded.texts is None else loaded.texts.captions)
    trained = make_trainee(setting, parts)
    if options.training.torch_compile:
        compile_blocks(parts, options.training.dynamo_backend)
    optimizer, descriptions = make_optimizer(
        options.optimizer, trained.parameter_groups(), accelerator.num_processes, rounding_seed(setting)
    )
    objective = setting.family.objective(options.noise, options.loss).to(accelerator.device)
    step, prepared = distribution.prepare(
        accelerator,
        Step(
            setting.family,
            parts,
            objective,
            options.loss,
            trained.modules,
            is_text_trained=trained.is_text_trained,
            untrained=trained.untrained,
            is_text_frozen=lambda: trained.is_text_frozen,
        ),
        optimizer,
        setting.checked.precision.autocast,
    )
    optimizer = distribution.innermost(prepared)
    scheduler = schedules.create(options.schedule, optimizer, setting.max_train_steps)
    history = LossHistory(plan.steps_per_epoch)
    average = make_average(setting, trained)
    live = Live(trained, step, prepared, scheduler, accelerator.scaler, history, average)
    if setting.checked.resumed is not None:
        live.restore(setting.checked.resumed)
    told = optimizers.describe(optimizer, options.optimizer)
    metadata = file_metadata.collect(setting, told, hashes, mean_mask_weight)
    latents_of = training_data.latents_of(setting.family, parts, options.caching.vae_batch_size)
    saver, states = make_savers(setting, live, metadata)
    return Run(
        accelerator=accelerator,
        step=step,
        trainee=trained,
        optimizer=prepared,
        scheduler=scheduler,
        batches=training_data.load(
            setting.checked.data,
            options,
            plan,
            stores,
            setting.family,
            setting.max_train_steps,
            setting.steps_done,
            (accelerator.process_index, accelerator.num_processes),
        ),
        plan=plan,
        max_train_steps=setting.max_train_steps,
        max_grad_norm=0 if fused.flag_of(options.optimizer) else options.optimizer.max_grad_norm,
        latents_of=latents_of,
        learning_rates=lambda: learning_rates(optimizer, descriptions),
        saver=saver,
        states=states,
        sampler=watching.make_sampler(setting, loaded, trained),
        validator=watching.make_validator(setting, stores, accelerator.unwrap_model(step), latents_of),
        trackers=setting.trackers,
        history=history,
        average=average,
        steps_done=setting.steps_done,
        reader=LossReader(
            accelerator.reduce if accelerator.num_processes > 1 else None, has_masks=setting.checked.data.has_masks
        ),
    )


def make_optimizer(
    options: OptimizerOptions, wanted: OptimizerGroups, num_processes: int, rounding_seed: int | None = None
) -> tuple[Optimizer, list[str]]:
    """Return the optimizer, which steps within the backward pass where that is asked for, and its groups' names.

    Args:
        options: the optimizer group.
        wanted: the trained weights.
        num_processes: that train together.
        rounding_seed: where steps of bf16 weights are to be rounded by chance; None: rounded to the nearest.

    Raises: OptionError.
    """
    flag = fused.flag_of(options)
    if flag is not None:
        fused.check_processes(flag, num_processes)
    if flag != fused.GROUPS:
        optimizer = optimizers.create(options, wanted.groups)
        optimizers.train_mode(optimizer)
        if rounding_seed is not None:
            rounding.attach_if_possible(optimizer, options, rounding_seed)
        if flag is not None:
            fused.step_in_backward(optimizer, options.max_grad_norm)
        return optimizer, wanted.descriptions
    parting = fused.part(wanted.groups, options.fused_optimizer_groups or 0)
    optimizer = optimizers.create(options, parting.groups)
    optimizers.train_mode(optimizer)
    if rounding_seed is not None:
        rounding.attach_if_possible(optimizer, options, rounding_seed)
    fused.step_by_group(optimizer, parting.members, options.max_grad_norm)
    log.info("%d groups of weights step within the backward pass", len(parting.members))
    return optimizer, [wanted.descriptions[origin] for origin in parting.origins]


def make_savers(setting: Setting, live: Live, metadata: FileMetadata) -> tuple[Saver, StateSaver]:
    """Return what saves what is trained, with its average, and what saves the state of the run."""
    options, is_main_process = setting.options, setting.accelerator.is_main_process
    publish, publish_state = publishers(setting.uploads, options.hub)
    saver = Saver(
        options.saving,
        live.trainee.save,
        metadata.at,
        -(-setting.max_train_steps // setting.plan.steps_per_epoch),
        is_main_process,
        publish,
        ema.companion(live.average, live.trainee.save, save_dtype(options.saving.save_precision)),
        suffix=setting.checked.method.saved_suffix(options),
    )
    is_shared_out = distribution.is_shared_out(setting.accelerator)
    write = state_writer(setting, live)
    return saver, StateSaver(options.saving, saver, write, is_main_process, publish_state, is_shared_out=is_shared_out)


def rounding_seed(setting: Setting) -> int | None:
    """Return the seed for rounding the steps of bf16 weights by chance, None where they are rounded to the nearest."""
    is_wanted = setting.checked.method.trains_models and setting.checked.precision.trained is torch.bfloat16
    return setting.plan.seed if is_wanted and not distribution.is_shared_out(setting.accelerator) else None


def publishers(uploads: Uploads | None, options: HubOptions) -> tuple[Publish, Publish]:
    """Return what is told of each saved file, and of each saved state."""
    if uploads is None:
        return None, None
    return uploads.add, uploads.add if options.save_state_to_huggingface else None


def make_trainee(setting: Setting, parts: Parts) -> Trainee:
    """Return what is trained, ready on the device."""
    trained = setting.checked.method.trainee(setting, parts)
    users = setting.checked.data.users_of_untrained
    if users:
        with trained.untrained():  # what cannot be switched off is refused here, not in the middle
            log.info("%s: batches with such images predict twice", " and ".join(users))
    return trained


def make_average(setting: Setting, trained: Trainee) -> Average | None:
    """Return the average of the trained weights, None without --save_ema and on processes that save nothing."""
    decay = setting.options.training.ema_decay
    is_wanted = setting.options.saving.save_ema and setting.accelerator.is_main_process
    if decay is None or not is_wanted:
        return None
    return Average(trained.modules, trained.trained_parameters(), decay)


def state_writer(setting: Setting, live: Live) -> Callable[[Path, int, int], None]:
    """Return what writes the state of the run to a folder, after a step (1-based) in an epoch (1-based).

    Where processes share the state out, all of them put it together, and the first one writes.
    """
    data = setting.checked.data
    is_wanted = setting.options.saving.save_state or setting.options.saving.save_state_on_train_end
    dataset = changes.fingerprint(data.configs, data.samples) if is_wanted else ""  # asks for the size of every file
    options = changes.deciding_values(setting.options, setting.accelerator.num_processes)
    is_main_process = setting.accelerator.is_main_process

    def write(folder: Path, step: int, epoch: int) -> None:
        manifest = Manifest(step, epoch, setting.plan.seed, options, dataset, len(data.samples))
        with shards.whole_weights(live.step):
            contents = live.contents(is_wanted=is_main_process)
            if is_main_process:
                state.write(folder, manifest, contents)

    return write


def compile_blocks(parts: Parts, backend: str) -> None:
    """Compile the denoiser's repeated blocks: once for each kind and shape, where whole models take minutes."""
    denoiser = parts.denoiser
    denoiser.compile_repeated_blocks(backend=backend)  # type: ignore[operator]


def learning_rates(optimizer: Optimizer, descriptions: list[str]) -> dict[str, float]:
    """Return the rate of each group by name; of optimizers that adapt their rate also what it comes to.

    Groups may share a name, and then have one rate; what each adapts it to is numbered.
    """
    rates = {}
    for name, group in zip(descriptions, optimizer.param_groups, strict=True):
        rate = group.get("lr")
        if rate is None:  # Adafactor with relative steps has none
            continue
        rates[name] = float(rate)
        if isinstance(group.get("d"), float):
            shown = f"d*lr/{name}"
            same = sum(each == shown or each.startswith(f"{shown}/") for each in rates)  # its weights are parted
            rates[f"{shown}/{same + 1}" if same else shown] = group["d"] * float(rate)
    return rates
