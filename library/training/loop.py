"""The one training loop: explicit calls, in the order in which things happen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import DataError
from library.progress import progress
from library.training import distribution, draws, interrupts, optimizers, schedules, shards
from library.training.metrics import LossHistory, LossReader, LossRecord, MaskFigures, StepLosses, ValidationRecord
from library.training.step import Losses

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.batch import Batch
    from library.dataset.plan import RunPlan
    from library.training.ema import Average
    from library.training.sampling import Sampler
    from library.training.saving import Saver
    from library.training.states import StateSaver
    from library.training.trackers import Trackers
    from library.training.trainee import Trainee
    from library.training.validation import Validator

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop touches, built by run.py."""

    accelerator: Accelerator
    step: nn.Module  # Step, wrapped by accelerate
    trainee: Trainee
    optimizer: Any
    scheduler: Any
    batches: Iterable[Batch]  # endless, from the first batch of the first epoch
    plan: RunPlan
    max_train_steps: int
    max_grad_norm: float  # 0: no clipping
    latents_of: Callable[[Batch], Tensor]  # cached latents, or the VAE's
    learning_rates: Callable[[], dict[str, float]]
    saver: Saver
    states: StateSaver
    sampler: Sampler | None
    validator: Validator | None
    trackers: Trackers
    history: LossHistory
    reader: LossReader
    average: Average | None = None  # of the weights, on the process that saves
    steps_done: int = 0  # before the first batch: of the run that is resumed
    is_stop_wanted: bool = False  # by any process

    @property
    def num_epochs(self) -> int:
        """Epochs begun until max_train_steps."""
        return -(-self.max_train_steps // self.plan.steps_per_epoch)


@dataclass(frozen=True)
class Place:
    """Where in the run a micro-batch stands."""

    position: int  # micro-batches before it
    epoch: int  # 1-based
    step: int  # 1-based: the optimizer step it belongs to
    is_update: bool
    is_epoch_end: bool


def places(plan: RunPlan, max_train_steps: int, steps_done: int = 0) -> Iterator[Place]:
    """Yield the place of every micro-batch after steps_done until max_train_steps."""
    position, step = plan.first_batch_of(steps_done), steps_done + 1
    while step <= max_train_steps:
        epoch, index = divmod(position, plan.batches_per_epoch)
        is_update = plan.ends_step(position)
        yield Place(position, epoch + 1, step, is_update, index + 1 == plan.batches_per_epoch)
        position += 1
        step += is_update


def train(run: Run) -> bool:
    """Train until max_train_steps or Ctrl-C, then save; return whether the run was completed.

    Raises: LossError when a loss is not finite; nothing is saved after it.
    """
    if run.sampler is not None and run.sampler.is_due_at_start() and run.steps_done == 0:
        sample(run, epoch=0, step=0)
    run.trainee.train()
    run.history.begin()
    with interrupts.deferred() as stop:
        try:
            last = train_steps(run, stop)
        except DataError:  # a picture was deleted meanwhile, a drive is gone: what was learnt is kept
            save_what_is_done(run)
            raise
        report(run, run.reader.drain())
        is_complete = not run.is_stop_wanted or last.step == run.max_train_steps
        with evaluating(run):
            if is_complete:
                run.saver.save_final(run.max_train_steps, run.num_epochs)
            else:
                run.saver.save_interrupted(last.step, last.epoch)
        if is_complete:
            run.states.save_final(run.max_train_steps, last.epoch)
        else:
            run.states.save_interrupted(last.step, last.epoch)
    return is_complete


def save_what_is_done(run: Run) -> None:
    """Save a run that cannot go on as Ctrl-C would, if it has done a step."""
    report(run, run.reader.drain())
    if run.history.num_timed:
        last = run.history.records[-1]
        with evaluating(run):
            run.saver.save_interrupted(last.step, last.epoch)
        run.states.save_interrupted(last.step, last.epoch)


def train_steps(run: Run, stop: interrupts.StopRequest) -> Place:
    """Train until max_train_steps, or the step after a request to stop; return the place of the last batch."""
    losses: list[Tensor] = []
    figures: list[Tensor] = []
    names: list[str] = []
    place = None
    with progress(label="steps", total=run.max_train_steps, unit="step", initial=run.steps_done) as bar:
        for place, batch in zip(places(run.plan, run.max_train_steps, run.steps_done), run.batches, strict=False):
            per_image, measured = backward(run, batch, place)
            is_idle = batch.share is not None and batch.share.is_idle
            losses.append(per_image[:0] if is_idle else per_image)
            figures += [] if is_idle or measured is None else [measured]
            names.extend(() if is_idle else batch.names)
            if not place.is_update:
                continue
            extras = update(run, losses)
            ended = StepLosses(
                place.step, place.epoch, losses, tuple(names), run.learning_rates(), extras, stop.is_set, figures
            )
            report(run, run.reader.push(ended))
            losses, figures, names = [], [], []
            bar.update()
            bar.set_postfix(avr_loss=run.history.average, **masked_averages(run.history), refresh=False)
            if run.is_stop_wanted:  # read with the losses, so that all processes stop after the same step
                break
            after_step(run, place)
    assert place is not None, "a run has at least one step"
    return place


def masked_averages(history: LossHistory) -> dict[str, float]:
    """Return the mean losses inside and outside of the masks over the last epoch's worth of steps, where measured."""
    found = {"inside": history.inside, "outside": history.outside}
    return {name: value for name, value in found.items() if value is not None}


def backward(run: Run, batch: Batch, place: Place) -> Losses:
    """Add the gradient of one micro-batch; return what it measured, still on the device."""
    batch = batch.to(run.accelerator.device)
    draws.seed_batch(run.plan.seed, place.position)
    run.trainee.before_batch()
    with distribution.gradients_of(run.accelerator, run.step, is_update=place.is_update):
        per_image, figures = run.step(batch, run.latents_of(batch))
        # as sd-scripts: a short last group of an epoch is divided by the full accumulation too
        mean = per_image.mean() if batch.share is None else batch.share.mean(per_image)
        distribution.backward(run.accelerator, mean / run.plan.gradient_accumulation_steps)
    return Losses(per_image.detach(), figures)  # a loss that is kept must not keep its graph


def update(run: Run, losses: list[Tensor]) -> dict[str, Tensor]:
    """Clip, step, schedule, zero, average; return what the trainee measured, as scalars on the device."""
    extras = run.trainee.before_update()
    if run.max_grad_norm > 0:
        run.accelerator.clip_grad_norm_(run.trainee.trained_parameters(), run.max_grad_norm)
    run.optimizer.step()
    is_stepped = not run.accelerator.optimizer_step_was_skipped  # by the fp16 scaler, as it overflowed
    if is_stepped:
        schedules.advance(run.scheduler, lambda: mean_loss(run, losses))
    run.optimizer.zero_grad(set_to_none=True)
    extras |= run.trainee.after_update()
    if is_stepped and run.average is not None:
        run.average.update()
    return extras


def mean_loss(run: Run, losses: list[Tensor]) -> float:
    """Return the mean of a step's losses over all processes; waits for the device."""
    own = torch.cat(losses)
    total, number = run.accelerator.reduce(torch.stack([own.sum(), own.new_full((), len(own))]), "sum")
    return float(total / number)


def after_step(run: Run, place: Place) -> None:
    """Validate, save and sample where due; epochs after the steps that end them."""
    is_last = place.step == run.max_train_steps
    is_epoch_end = place.is_epoch_end or is_last
    is_save_due = run.saver.is_step_due(place.step) and not is_last
    is_epoch_save_due = place.is_epoch_end and run.saver.is_epoch_due(place.epoch)
    epoch = place.epoch if is_epoch_end else None
    is_sample_due = run.sampler is not None and run.sampler.is_due(epoch, place.step)
    is_validation_due = run.validator is not None and run.validator.is_due(epoch, place.step)
    if is_save_due or is_epoch_save_due or is_sample_due or is_validation_due:
        report(run, run.reader.drain())  # a broken loss must stop the run before it is saved
    if is_validation_due:  # before the state is saved, which keeps what is measured
        validate(run, place, epoch)
    if is_save_due or is_epoch_save_due:
        with run.history.paused():
            save(run, place, is_save_due=is_save_due, is_epoch_save_due=is_epoch_save_due)
    if is_sample_due:
        sample(run, epoch, place.step)
    if place.is_epoch_end:
        report(run, run.reader.drain())
        run.trackers.log_epoch(place.epoch, place.step, run.history.epoch_average(place.epoch))


def save(run: Run, place: Place, *, is_save_due: bool, is_epoch_save_due: bool) -> None:
    """Write the files of a step, of the epoch it ends, or both, and their states."""
    with evaluating(run):
        if is_save_due:
            run.saver.save_step(place.step, place.epoch)
        if is_epoch_save_due:
            run.saver.save_epoch(place.epoch, place.step)
    # not in evaluation mode: a schedule-free optimizer goes on from its own weights, not from their average
    if is_save_due:
        run.states.save_step(place.step, place.epoch)
    if is_epoch_save_due:
        run.states.save_epoch(place.step, place.epoch)


def sample(run: Run, epoch: int | None, step: int) -> None:
    """Draw the preview pictures; the trainee is in evaluation mode meanwhile."""
    assert run.sampler is not None
    with run.history.paused(), evaluating(run):
        paths = run.sampler.sample(epoch, step)
    run.trackers.log_images(paths, step)


def validate(run: Run, place: Place, epoch: int | None) -> None:
    """Measure the loss on the images held back, in evaluation mode; epoch is the one that ends, if one does."""
    assert run.validator is not None
    with run.history.paused(), evaluating(run):
        loss, figures = run.validator.run()
    record = ValidationRecord(place.step, place.epoch, loss, run.history.average, figures)
    run.history.validations.append(record)
    log.info(
        "validation after step %d: loss %.4f, training %.4f (%+.4f)%s",
        *(record.step, record.loss, record.training_loss, record.divergence, in_words(figures)),
    )
    run.trackers.log_validation(
        record, is_step_due=run.validator.is_step_due(place.step), is_epoch_due=run.validator.is_epoch_due(epoch)
    )


def in_words(figures: MaskFigures | None) -> str:
    """Return what was measured inside and outside of masks as the end of a line."""
    found = {} if figures is None else {"inside the masks": figures.inside, "outside": figures.outside}
    return "".join(f", {name} {value:.4f}" for name, value in found.items() if value is not None)


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Switch dropout off, and give a schedule-free optimizer's averaged weights to the trainee, meanwhile."""
    run.trainee.eval()
    optimizers.eval_mode(run.optimizer)
    try:
        with shards.whole_weights(run.step):
            yield
    finally:
        optimizers.train_mode(run.optimizer)
        run.trainee.train()


def report(run: Run, records: Iterable[LossRecord]) -> None:
    """Take losses that have reached the host into the curve and the trackers."""
    for record in records:
        run.history.add(record)
        run.trackers.log_step(record, run.history.average, masked_averages(run.history))
        run.is_stop_wanted = run.is_stop_wanted or record.is_stop_wanted
