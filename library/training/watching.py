"""What looks at a run between its steps: previews, and the loss on images that are held back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from library.dataset.plan import validation_batches
from library.training import data as training_data
from library.training.painting import Drawing
from library.training.sampling import Sampler
from library.training.validation import Validator, timesteps_of

if TYPE_CHECKING:
    from library.batch import Batch
    from library.training.assembly import Setting
    from library.training.data import Stores
    from library.training.loading import Loaded
    from library.training.step import Step
    from library.training.trainee import Trainee


def make_sampler(setting: Setting, loaded: Loaded, trained: Trainee) -> Sampler | None:
    """Return what draws previews, None where none are wanted."""
    options, formats = setting.options, setting.checked.precision
    return Sampler.from_options(
        setting.checked.prompts,
        options.sampling,
        options.saving,
        setting.family,
        loaded.parts,
        setting.accelerator.device,
        (setting.accelerator.process_index, setting.accelerator.num_processes),
        Drawing(
            autocast_dtype=formats.autocast,
            prediction_type=setting.family.prediction_type,
            zero_terminal_snr=options.noise.zero_terminal_snr,
            modules=trained.modules,
            texts=None if loaded.texts is None else loaded.texts.prompts,
        ),
    )


def make_validator(
    setting: Setting, stores: Stores, step: Step, latents_of: Callable[[Batch], Tensor]
) -> Validator | None:
    """Return what measures the loss on the images that are held back, None where there are none."""
    options, data, accelerator = setting.options, setting.checked.data, setting.accelerator
    if not data.validation:
        return None
    wanted = options.validation
    batches = validation_batches(
        data.configs,
        data.validation,
        first_index=len(data.samples),
        limit=wanted.max_validation_steps,
        step=setting.max_train_steps,
    )
    numbers = range(accelerator.process_index, len(batches), accelerator.num_processes)
    own = [batches[number] for number in numbers]
    seed = setting.plan.seed if wanted.validation_seed is None else wanted.validation_seed
    loader = training_data.load_validation(data, options, own, seed, stores, setting.family, setting.max_train_steps)
    return Validator(
        accelerator=accelerator,
        step=step,
        latents_of=latents_of,
        batches=loader,
        numbers=numbers,
        timesteps=timesteps_of(options.noise),
        seed=seed,
        every_n_epochs=wanted.validate_every_n_epochs or 1,
        every_n_steps=wanted.validate_every_n_steps,
    )
