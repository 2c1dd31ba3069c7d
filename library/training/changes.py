"""What differs between a run and the one that wrote the state it goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import CheckpointError
from library.options import GROUPS, Options
from library.options.declare import declared
from library.training import optimizers, schedules

if TYPE_CHECKING:
    from library.dataset.config import DatasetConfig, SubsetConfig
    from library.dataset.geometry import Transform
    from library.dataset.scan import Sample
    from library.training.state import Manifest

log = logging.getLogger(__name__)

# Their values are part of the optimizer's state, or of the network's, which is what counts after a resume.
KEPT_BY_STATE = ("learning_rate", "unet_lr", "text_encoder_lr", "optimizer_args", "network_weights", "network_alpha")
# The groups whose options decide what is computed, and the options among them that do not.
DECIDING = (
    "model", "sd3", "dataset", "captions", "caching", "masks", "noise", "flow", "loss", "network", "optimizer",
    "schedule", "training",
)  # fmt: skip
FREE_TO_CHANGE = {
    "max_train_steps", "max_train_epochs", "max_data_loader_n_workers", "initial_step", "initial_epoch", "seed",
    "ddp_timeout", "lowram",
    "cache_latents_to_disk", "cache_dir", "skip_cache_check", "vae_batch_size", "tokenizer_cache_dir",
    "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size",
    "blocks_to_swap", "save_clip", "save_t5xxl", "t5xxl_device",
    "dataset_config", "train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir",  # what is in them is told
}  # fmt: skip
# How the names of settings, and of parts of a transform, begin that came later: at their defaults they are not part of
# what a state is compared by.
ADDED = ("mask_", "unmasked_probability", "random_placement", "placement", "reach")
PARTS_OF_A_DATASET = ("images and masks", "captions", "settings")


def deciding_values(options: Options, num_processes: int) -> dict[str, Any]:
    """Return what decides what a run computes, by name; of files their names, as folders are moved."""
    values: dict[str, Any] = {"num_processes": num_processes}
    for group in DECIDING:
        for each in declared(GROUPS[group]):
            if each.is_secret or each.name in FREE_TO_CHANGE:
                continue
            value = getattr(getattr(options, group), each.name)
            values[each.name] = _file_names(value) if each.is_path else value
    return values


def _file_names(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value and Path(value).name
    return [Path(each).name for each in value]


def fingerprint(configs: Sequence[DatasetConfig], samples: Iterable[Sample]) -> str:
    """Return 16 hex digits each for the images with their masks, the captions, and the settings of the data set.

    Where the folders are does not count. Of a file's content its size does, which is known at once.
    """
    images, captions, settings = (hashlib.blake2b(digest_size=8) for _ in PARTS_OF_A_DATASET)
    for sample in samples:
        files = [sample.path, *([sample.mask.path] if sample.mask.path else [])]
        sizes = [_size(path) for path in files]
        where = f"{sample.path.parent.name}/{sample.path.name} {sample.num_repeats} {_record(sample.transform)}"
        images.update(f"{where} {sample.mask.kind} {sizes}\n".encode("utf-8", "surrogateescape"))
        captions.update(f"{sample.captions}\n".encode("utf-8", "backslashreplace"))
    for config in configs:
        without_places = replace(config, subsets=tuple(map(_without_places, config.subsets)))
        settings.update(f"{_in_words(without_places)}\n".encode("utf-8", "backslashreplace"))
    return "-".join(digest.hexdigest() for digest in (images, captions, settings))


def _in_words(config: DatasetConfig) -> str:
    """Return the settings as earlier versions wrote them, who had none of ADDED: their states are no news to us."""
    subsets = [_record(each) for each in config.subsets]
    inner = f"({subsets[0]},)" if len(subsets) == 1 else f"({', '.join(subsets)})"
    values = {each.name: repr(getattr(config, each.name)) for each in fields(config)} | {"subsets": inner}
    return f"{type(config).__name__}({', '.join(f'{name}={value}' for name, value in values.items())})"


def _record(record: SubsetConfig | Transform) -> str:
    """Return a record as earlier versions wrote it."""
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    defaults = {each.name: each.default for each in fields(record)}
    told = [f"{k}={v!r}" for k, v in values.items() if not (k.startswith(ADDED) and v == defaults[k])]
    return f"{type(record).__name__}({', '.join(told)})"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _without_places(subset: SubsetConfig) -> SubsetConfig:
    has_masks = None if subset.conditioning_data_dir is None else Path("masks")
    return replace(
        subset, image_dir=Path("images"), conditioning_data_dir=has_masks, metadata_file=None, cache_info=False
    )


def tell(manifest: Manifest, options: Mapping[str, Any], dataset: str, num_images: int) -> None:
    """Warn about what differs from the run that wrote the state."""
    if manifest.dataset != dataset:
        then, now = manifest.dataset.split("-"), dataset.split("-")
        differing = [name for name, old, new in zip(PARTS_OF_A_DATASET, then, now, strict=False) if old != new]
        log.warning(
            "--resume: the dataset has changed (%d images then, %d now): other %s, so the run does not repeat what it "
            "would have been",
            *(manifest.num_images, num_images, ", ".join(differing)),
        )
    current, before = (json.loads(json.dumps(dict(each))) for each in (options, manifest.options))  # no more tuples
    changed = {name for name in current if name in before and before[name] != current[name]}
    for name in sorted(changed):
        counts = " (the state's counts)" if name in KEPT_BY_STATE else ""
        log.warning("--resume: --%s was %s, is %s%s", name, *map(_shown, (before[name], current[name])), counts)


def _shown(value: Any) -> str:
    if value in (None, "", []):
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_other_kinds(manifest: Manifest, options: Options) -> None:
    """Refuse to give an optimizer or a schedule the state of one of another kind, which it would misread.

    Raises: CheckpointError.
    """
    then = {"optimizer_type": "", "lr_scheduler": "constant", "lr_scheduler_type": "", **manifest.options}
    optimizer_then = optimizers.resolve(then["optimizer_type"] or optimizers.DEFAULT)
    optimizer_now = optimizers.resolve(optimizers.name_of(options.optimizer))
    if optimizer_then.path != optimizer_now.path:
        raise CheckpointError(
            f"--resume: the state is of the optimizer {optimizer_then.name}, and this run has {optimizer_now.name}. "
            "Resume with the same --optimizer_type, or give the state's weights to --network_weights."
        )
    schedule = options.schedule
    schedule_then = schedules.kind_of(then["lr_scheduler"], then["lr_scheduler_type"])
    schedule_now = schedules.kind_of(schedule.lr_scheduler, schedule.lr_scheduler_type)
    if schedule_then != schedule_now:
        raise CheckpointError(
            f"--resume: the state is of a run with {schedule_then}, and this one has {schedule_now}. Resume with the "
            "same --lr_scheduler and --lr_scheduler_type."
        )
