"""What the files of a run say about it: collected once, completed at each save."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library import metadata
from library.dataset.summary import describe, mask_facts
from library.metadata import DatasetFacts, RunFacts
from library.training.model_hashes import BackgroundHash, default_cache_file
from library.training.trainee import network_arguments

if TYPE_CHECKING:
    from library.dataset.plan import RunPlan
    from library.options import Options
    from library.training.assembly import Setting
    from library.training.data import Data


@dataclass(frozen=True)
class Hashes:
    """Those of the base model and of a separate VAE, computed beside training."""

    model: BackgroundHash
    vae: BackgroundHash

    @staticmethod
    def start(model: str, vae: str | None) -> Hashes:
        """Begin to read the files; only the process that saves needs to."""
        cache_file = default_cache_file()
        return Hashes(BackgroundHash.of_model(model, cache_file), BackgroundHash.of_vae(vae, cache_file))


@dataclass(frozen=True)
class FileMetadata:
    """The metadata of the run's files."""

    fixed: Mapping[str, str]  # ss_* keys that do not change during the run
    modelspec: Mapping[str, str]
    hashes: Hashes | None  # None on processes that write nothing
    is_minimal: bool  # --no_metadata; whole models never say how they were trained

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Return the metadata of a file saved at an optimizer step of an epoch."""
        computed = {**self.hashes.model.metadata(), **self.hashes.vae.metadata()} if self.hashes else {}
        values = metadata.at_save({**self.fixed, **computed}, step, epoch) | dict(self.modelspec)
        return metadata.minimum(values) if self.is_minimal else values


def collect(
    setting: Setting, optimizer: str, hashes: Hashes | None, mean_mask_weight: float | None = None
) -> FileMetadata:
    """Return what is known of a run when it begins.

    Args:
        setting: of the run.
        optimizer: as `optimizers.describe` names it.
        hashes: of the model files; None on processes that write nothing.
        mean_mask_weight: of the masked images; None where it is not known.
    """
    options, data, plan, family = setting.options, setting.checked.data, setting.plan, setting.family
    network, is_whole = options.network, setting.checked.method.trains_models
    run = RunFacts(
        session_id=random.SystemRandom().getrandbits(32),
        started_at=setting.started_at,
        seed=plan.seed,
        num_epochs=-(-setting.max_train_steps // plan.steps_per_epoch),
        max_train_steps=setting.max_train_steps,
        optimizer=optimizer,
        base_model_version=family.base_model_version,
        network_dim=network.network_dim,
        network_alpha=network.network_alpha,
        network_args=network_arguments(network.network_args),
        model_name=options.model.pretrained_model_name_or_path or "",
        vae_name=options.model.vae,
        extra=metadata.of_flow(options) if family.prediction_type == "flow" else {},
    )
    spec = metadata.modelspec(
        options.metadata,
        family.base_model_version,
        options.saving.output_name,
        data.configs[0].resolution,
        prediction_type=family.prediction_type,
        clip_skip=options.model.clip_skip,
        timestep_range=_timestep_range(options),
        is_lora=not is_whole,
    )
    if is_whole:
        return FileMetadata({}, spec, None, is_minimal=True)
    facts = facts_of(options, data, plan, setting.accelerator.num_processes)
    facts = replace(facts, masks=replace(facts.masks, mean_weight=mean_mask_weight))
    fixed = metadata.training_metadata(options, facts, run)
    return FileMetadata(fixed, spec, hashes, options.saving.no_metadata)


def facts_of(options: Options, data: Data, plan: RunPlan, num_processes: int) -> DatasetFacts:
    """Return the training data in numbers."""
    repeats = {is_reg: sum(s.num_repeats for s in data.samples if s.is_reg == is_reg) for is_reg in (False, True)}
    return DatasetFacts(
        num_train_images=repeats[False],
        num_reg_images=repeats[True],
        num_validation_images=len(data.validation),
        num_batches_per_epoch=plan.batches_per_epoch,
        total_batch_size=options.dataset.train_batch_size * num_processes,
        is_from_config=options.dataset.dataset_config is not None,
        datasets=tuple(describe(data.configs, data.samples)),
        masks=mask_facts(data.samples),
    )


def _timestep_range(options: Options) -> tuple[int, int] | None:
    low, high = options.noise.min_timestep, options.noise.max_timestep
    if low is None and high is None:
        return None
    return low or 0, 1000 if high is None else high
