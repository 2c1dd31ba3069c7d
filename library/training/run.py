"""From options to a finished run: everything is checked, then loaded, then trained."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from library.dataset import latents
from library.errors import OptionError
from library.options import public_values
from library.training import (
    assembly,
    changes,
    diagnosis,
    disk_space,
    distribution,
    fused,
    hub,
    loading,
    loop,
    optimizers,
    reporting,
    sampling,
    saved_texts,
    saving,
    schedules,
    state,
    text_cache,
    trackers,
)
from library.training import data as training_data
from library.training.assembly import Checked, Setting
from library.training.file_metadata import Hashes
from library.training.method import Method, NetworkMethod
from library.training.metrics import LossError
from library.training.precision import let_scaler_take_half_gradients
from library.training.state import Resumed

if TYPE_CHECKING:
    from library.models.family import ModelFamily
    from library.options import Options
    from library.options.training import TrainingOptions

log = logging.getLogger(__name__)


def train(options: Options, family: ModelFamily, kind: type[Method] = NetworkMethod) -> None:
    """Train as the options say.

    Args:
        options: what the run was asked to do.
        family: of the models.
        kind: what is trained.

    Raises: UserError for what is the user's to mend; KeyboardInterrupt after a run that was stopped and saved.
    """
    if options.dataset.debug_dataset:
        reporting.show_dataset(
            training_data.read(options, family.bucket_step_multiple, family.side_multiple), options.saving
        )
        return
    started_at = time.time()
    checked = check(options, family, kind)
    accelerator = make_accelerator(options, checked, family)
    resumed = checked.resumed
    seed = common_seed(seed_of(options.training.seed, resumed))
    set_seed(seed)
    log.info("seed %d, %d process(es), device %s", seed, accelerator.num_processes, accelerator.device)
    plan = training_data.make_plan(checked.data, options, seed, accelerator.num_processes)
    max_train_steps = total_steps(options.training, plan.steps_per_epoch)
    steps_done = first_step(options.training, resumed, plan.steps_per_epoch)
    if steps_done >= max_train_steps:
        raise OptionError(
            f"{steps_done} steps are done, and the run is to end at step {max_train_steps}. Raise --max_train_steps or "
            "--max_train_epochs."
        )
    if resumed is not None:
        samples, dataset = checked.data.samples, changes.fingerprint(checked.data.configs, checked.data.samples)
        values = changes.deciding_values(options, accelerator.num_processes)
        changes.tell(resumed.manifest, values, dataset, len(samples))
        log.info("resuming %s after step %d", resumed.folder, steps_done)
    told = trackers.Trackers(accelerator, checked.tracker_names)
    told.open(options.logging, public_values(options), accelerator.project_dir)
    uploads = hub.start(options.hub, options.saving) if accelerator.is_main_process else None
    setting = Setting(
        options, family, checked, accelerator, plan, max_train_steps, started_at, told, uploads, steps_done
    )
    with ended_in_order(setting):
        is_complete = carry_out(setting)
    if not is_complete:
        raise KeyboardInterrupt


@contextmanager
def ended_in_order(setting: Setting) -> Iterator[None]:
    """End what goes on beside the training: the trackers get all they were told, and uploads under way are waited for.

    A second Ctrl-C waits for nothing.
    """
    try:
        yield
        setting.accelerator.end_training()  # flushes the trackers and parts the processes
    except BaseException as error:
        setting.trackers.abandon()
        if setting.uploads is not None and isinstance(error, Exception):
            setting.uploads.finish()
        raise
    if setting.uploads is not None:
        setting.uploads.finish()


def carry_out(setting: Setting) -> bool:
    """Load the models, train and report; return whether the run was completed."""
    options, checked, accelerator, plan = setting.options, setting.checked, setting.accelerator, setting.plan
    hashes = None
    if accelerator.is_main_process and not checked.method.trains_models:  # the only one that saves; networks name them
        hashes = Hashes.start(options.model.pretrained_model_name_or_path or "", options.model.vae)
    loaded = loading.load(setting)
    reporter = reporting.start(setting, loaded.latents)
    run = assembly.assemble(setting, loaded, hashes, reporter.mean_mask_weight)
    log.info(
        "training: %d steps, %d epochs of %d batches, accumulated over %d",
        setting.max_train_steps,
        run.num_epochs,
        plan.batches_per_epoch,
        plan.gradient_accumulation_steps,
    )
    if accelerator.is_main_process:
        disk_space.warn_if_short(run, saving.save_dtype(options.saving.save_precision))
    try:
        is_complete = loop.train(run)
    except LossError as error:
        model = options.model.pretrained_model_name_or_path or ""
        raise LossError(diagnosis.explained(str(error), loaded.parts, model, checked.precision.mixed)) from None
    if is_complete and accelerator.is_main_process:
        dtype = saving.save_dtype(options.saving.save_precision) or checked.precision.frozen
        saved_texts.save(options, setting.family, loaded.parts.denoiser, run.saver.final_path(), dtype)
    reporter.write(run, is_complete=is_complete)
    accelerator.wait_for_everyone()  # the first process may still be writing
    return is_complete


def check(options: Options, family: ModelFamily, kind: type[Method] = NetworkMethod) -> Checked:
    """Return what can be known without loading a model; whatever is wrong by then is said now.

    Raises: UserError.
    """
    distribution.check(options)
    method = kind.checked(options, family)
    optimizers.check(options.optimizer)
    schedules.check(options.schedule)
    prompts = tuple(sampling.check(options.sampling, family.preview_side, family.side_multiple))
    saving.check_output(options.saving)
    formats = method.precision(options)
    tracker_names = trackers.wanted(options.logging)
    if tracker_names and options.logging.logging_dir:
        saving.check_folder("--logging_dir", options.logging.logging_dir)
    resumed = find_state(options)
    if resumed is not None:
        changes.refuse_other_kinds(resumed.manifest, options)
    data = training_data.read(options, family.bucket_step_multiple, family.side_multiple)
    distribution.check_validation(options.deepspeed, len(data.validation))
    if options.caching.cache_latents_to_disk:
        cache_dir = Path(options.caching.cache_dir) if options.caching.cache_dir else None
        latents.check_cache_folders(data.all_samples, family.name, cache_dir)
    if options.caching.cache_text_encoder_outputs:
        text_cache.check(data, prompts, options.caching, family.name)
    # over one weight: finds what only the optimizer's and the schedule's own code can tell
    schedules.rehearse(options.schedule, optimizers.rehearse(options.optimizer))
    fused.check(options.optimizer)
    return Checked(method, formats, tracker_names, data, prompts, resumed)


def find_state(options: Options) -> Resumed | None:
    """Return the state that --resume names, from the hub where that is asked for; None without it.

    Raises: UserError when it cannot be had.
    """
    place = options.saving.resume
    if place is None:
        return None
    if options.hub.resume_from_huggingface:
        place = str(hub.download_state(place, options.hub.huggingface_token))
    return state.open_state(place)


def make_accelerator(options: Options, checked: Checked, family: ModelFamily) -> Accelerator:
    """Return accelerate's view of the machine: device, processes, precision, trackers."""
    try:
        accelerator = distribution.accelerator(
            options.training,
            options.deepspeed,
            max_grad_norm=options.optimizer.max_grad_norm,
            batch_size=max(config.batch_size for config in checked.data.configs),
            may_leave_weights_out=checked.method.may_leave_weights_out(options, family),
            mixed_precision=checked.precision.mixed,
            log_with=list(checked.tracker_names) or None,
            project_dir=trackers.log_dir(options.logging),
        )
    except ValueError as error:  # a precision that the device accelerate was told to use cannot do
        raise OptionError(f"--mixed_precision {checked.precision.mixed}: {error}") from error
    if options.training.full_fp16 and accelerator.scaler is not None:
        let_scaler_take_half_gradients(accelerator.scaler)
    return accelerator


def common_seed(given: int | None) -> int:
    """Return the seed of the run, drawn by the first process where none is given."""
    seeds = [given if given is not None else random.SystemRandom().getrandbits(32)]
    broadcast_object_list(seeds)
    return seeds[0]


def seed_of(given: int | None, resumed: Resumed | None) -> int | None:
    """Return the seed of the run where it is known: as given, or else that of the resumed run."""
    if resumed is None:
        return given
    if given is not None and given != resumed.manifest.seed:
        log.warning("--resume: --seed was %d, is %d: the draws from here on are others", resumed.manifest.seed, given)
        return given
    return resumed.manifest.seed


def first_step(options: TrainingOptions, resumed: Resumed | None, steps_per_epoch: int) -> int:
    """Return how many optimizer steps count as done before this run."""
    if options.initial_step is not None:
        return options.initial_step
    if options.initial_epoch is not None:
        return (options.initial_epoch - 1) * steps_per_epoch
    return 0 if resumed is None else resumed.manifest.step


def total_steps(options: TrainingOptions, steps_per_epoch: int) -> int:
    """Return the optimizer steps of the run; --max_train_epochs decides where it is given."""
    if options.max_train_epochs is None:
        return options.max_train_steps
    return options.max_train_epochs * steps_per_epoch
