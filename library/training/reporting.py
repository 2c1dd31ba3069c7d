"""What a run tells the user: the line about masks, the contact sheet, and at its end the report."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from library.dataset import contact_sheet, mask_shares, summary
from library.training import report
from library.training.file_metadata import facts_of
from library.training.saving import FINAL_NAME

if TYPE_CHECKING:
    from library.cache.store import LatentStore
    from library.dataset.mask_shares import MaskShare
    from library.metadata import DatasetFacts
    from library.options import Options
    from library.options.saving import SavingOptions
    from library.training.assembly import Setting
    from library.training.data import Data
    from library.training.loop import Run

log = logging.getLogger(__name__)

MOST_DECODED = 64  # masks looked at for the mean weight where they are not in a cache


@dataclass(frozen=True)
class MaskFacts:
    """What the masks of a run let through."""

    line: str
    shares: Sequence[MaskShare]  # of each masked image, or of some


@dataclass(frozen=True)
class Reporter:
    """Collects what the report shows; writes nothing without --report."""

    options: Options
    data: Data
    facts: DatasetFacts
    masks: MaskFacts
    model_facts: Mapping[str, str]

    @property
    def mean_mask_weight(self) -> float | None:
        """The mean weight of the masked images, or of those that were looked at; None without masks."""
        return mean_share(self.masks.shares)

    def write(self, run: Run, *, is_complete: bool) -> Path | None:
        """Write the report of a run that has ended; return its path, None where none is wanted."""
        if not self.options.saving.report:
            return None
        samples = gather_object(run.sampler.made) if run.sampler is not None else []
        if not run.accelerator.is_main_process:
            return None
        records = run.history.records
        seconds = run.history.seconds
        num_images = run.history.num_timed * self.facts.num_train_images / max(1, run.plan.steps_per_epoch)
        # not before the first step, which would wait for up to 120 pictures to be decoded
        sheet = contact_sheet.draw(self.data.samples, sheet_path(self.options.saving))
        content = report.ReportData(
            title=self.options.saving.output_name or FINAL_NAME,
            losses=[(r.step, r.loss, next(iter(r.learning_rates.values()), 0.0)) for r in records],
            validations=[(r.step, r.loss) for r in run.history.validations],
            samples=sorted(samples, key=lambda sample: (sample.step, sample.index)),
            mask_line=self.masks.line,
            mask_sheet=sheet,
            mask_shares=[(each.sample.path.name, each.share) for each in self.masks.shares],
            mask_figures=[(r.step, r.figures) for r in records if r.figures is not None],
            validation_figures=[(r.step, r.figures) for r in run.history.validations if r.figures is not None],
            dataset=report.dataset_rows(self.facts),
            options=report.changed_options(self.options),
            files=run.saver.saved,
            seconds=seconds,
            step_s=seconds / run.history.num_timed if run.history.num_timed else None,
            images_per_s=num_images / seconds if records and seconds else None,
            facts={**self.model_facts, "Finished": time.strftime("%Y-%m-%d %H:%M:%S")},
            is_complete=is_complete,
        )
        return report.write_report(report.report_path(self.options.saving), content)


def sheet_path(options: SavingOptions) -> Path:
    """Return where the contact sheet of a run goes: beside the model, name-masks.png."""
    return Path(options.output_dir or ".") / f"{options.output_name or FINAL_NAME}-masks.png"


def start(setting: Setting, store: LatentStore | None) -> Reporter:
    """Tell what the masks do, and return what will write the report."""
    data, options = setting.checked.data, setting.options
    masks = tell_masks(data, store) if setting.accelerator.is_main_process else MaskFacts("", ())
    facts = machine_facts(setting.accelerator.device, setting.plan.seed)
    numbers = facts_of(options, data, setting.plan, setting.accelerator.num_processes)
    return Reporter(options, data, numbers, masks, facts)


def machine_facts(device: torch.device, seed: int) -> dict[str, str]:
    """Return device, versions, seed and the time, at which the run starts, for the report."""
    import accelerate
    import diffusers

    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "Device": f"{device.type} ({name})",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Seed": str(seed),
        "Started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def tell_masks(data: Data, store: LatentStore | None) -> MaskFacts:
    """Log and return how many masks of which source are in use, and what they let through."""
    shares = shares_of(data, store)
    mean = mean_share(shares)
    line = summary.mask_line(data.all_samples, mean_weight=mean)
    log.info("%s", line)
    if mean == 0 and all(each.is_empty for each in shares):
        log.warning("the masks are black everywhere: nothing of their images is learnt. Are they inverted?")
    else:
        empty = [share for share in shares if share.is_empty and not share.sample.subset.mask_weight_min]
        mask_shares.warn_of_empty(empty, mask_shares.KEPT)
    return MaskFacts(line, shares)


def shares_of(data: Data, store: LatentStore | None) -> list[MaskShare]:
    """Return what the masks let through.

    Cached masks are all read; otherwise some are decoded, spread over the data, because decoding all would delay the
    first step.
    """
    if store is not None:
        return mask_shares.stored(data.all_samples, store)
    masked = [sample for sample in data.all_samples if sample.mask.is_given]
    return mask_shares.decoded(masked[:: max(1, len(masked) // MOST_DECODED)])


def mean_share(shares: Sequence[MaskShare]) -> float | None:
    """Return the mean weight of the masked images, each counting once; None without masks."""
    return sum(each.share for each in shares) / len(shares) if shares else None


def show_dataset(data: Data, options: SavingOptions) -> None:
    """Say what training would see, and draw it where an --output_dir is given: --debug_dataset."""
    for line in summary.lines(data.configs, data.samples, data.validation):
        log.info("%s", line)
    tell_masks(data, None)
    if options.output_dir:
        path = contact_sheet.draw(data.samples, sheet_path(options))
        log.info("contact sheet: %s", path)
