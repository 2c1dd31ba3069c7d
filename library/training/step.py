"""START READING HERE: one training step, from latents and text to a loss per image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from library import losses, masks
from library.training import draws

if TYPE_CHECKING:
    from library.batch import Batch
    from library.models.family import ModelFamily, Parts
    from library.objectives.objective import Compared, HuberOptions, Noised, Objective


class Losses(NamedTuple):
    """What a step computes. A tuple: DDP, FSDP, DeepSpeed and accelerate look into tuples for tensors."""

    per_image: Tensor  # (B,) float32, weighted by mask, prior loss weight and signal-to-noise ratio
    figures: Tensor | None  # (4, 2) float32 without gradient, see masks.figures; None: no image has a mask


class Step(nn.Module):
    """The loss of a batch. A module, so that accelerate can wrap it for precision and for several processes.

    Only what is trained is registered as a submodule; the frozen parts are not copied, broadcast or saved with it.
    """

    def __init__(
        self,
        family: ModelFamily,
        parts: Parts,
        objective: Objective,
        element_loss: HuberOptions,
        trained: tuple[nn.Module, ...],
        *,
        is_text_trained: bool,
        untrained: Callable[[], AbstractContextManager[Parts | None]] | None = None,
        is_text_frozen: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleList(trained)
        self.family = family
        self._frozen = (parts,)  # in a tuple: nn.Module would register what it finds in a plain attribute
        self.objective = objective
        self.element_loss = element_loss
        self.is_text_trained = is_text_trained
        self.is_text_frozen = is_text_frozen  # whether text encoders have learnt all they are to learn
        # a context in which the models predict as before the training; or whose value are other models that do
        self.untrained = untrained

    @property
    def parts(self) -> Parts:
        """The models that predict."""
        return self._frozen[0]

    def forward(self, batch: Batch, latents: Tensor) -> Losses:
        """Return the loss of each image, and what is measured inside and outside of the masks.

        Args:
            batch: on the device; its images or latents are not looked at.
            latents: (B, C, h, w) VAE samples, not yet scaled.
        """
        noised, batch = self._drawn(self.family.latent_space.normalise(latents), batch)
        is_frozen = not self.is_text_trained or (self.is_text_frozen is not None and self.is_text_frozen())
        with torch.no_grad() if is_frozen else nullcontext():  # FSDP asks for gradients of whatever once had them
            text = self.encode_text(batch)
        return self.losses_of(batch, noised, text)

    def _drawn(self, latents: Tensor, batch: Batch) -> tuple[Noised, Batch]:
        """Return latents with noise, and the batch with what the family draws.

        Several processes that share a batch draw what one process would draw for all of it.
        """
        share = batch.share
        noised = self.objective.noise(latents if share is None else share.whole(latents))
        batch = self.family.augmented(batch)
        if share is None:
            return noised, batch
        draws.seed_process(share.process_index)
        own = {field.name: getattr(noised, field.name)[share.rows] for field in fields(noised)}
        return replace(noised, **own), batch

    def encode_text(self, batch: Batch, parts: Parts | None = None) -> Any:
        """Return what the denoiser is told of a batch's captions: as cached, or as the text encoders say now.

        Args:
            batch: its captions.
            parts: whose text encoders say it; None: those of the run.
        """
        if batch.text is not None and self.family.caches_all_text:
            return self.family.text_of(batch.text)
        assert batch.tokens is not None, "the loader of a run tokenizes"
        return self.family.encode_text(parts or self.parts, batch.tokens, batch.text)

    def losses_of(self, batch: Batch, noised: Noised, text: Any) -> Losses:
        """Return the loss of each image for a batch with noise in place, as `forward`."""
        output = self.family.predict(self.parts, noised.noisy, noised.timesteps, text, batch)
        compared = self.objective.compare(output, noised)  # prediction, target, weight
        is_wanted = batch.preserved is not None or batch.prior is not None
        untrained = self.untrained_prediction(batch, noised) if is_wanted else None
        if batch.preserved is not None and untrained is not None:
            is_preserved = batch.preserved[:, None, None, None]
            compared = replace(compared, target=torch.where(is_preserved, untrained, compared.target))
        with torch.autocast(output.device.type, enabled=False):
            loss = self._elementwise(compared, noised)
            # the only place where a mask meets a loss; as sd-scripts: the mean counts masked cells too
            per_image = masks.weigh(loss, batch.masks).mean(dim=(1, 2, 3)) * batch.weights
            drift = None
            if batch.prior is not None and untrained is not None:
                drift = self._elementwise(replace(compared, target=untrained), noised)
                per_image = per_image + masks.weigh(drift, batch.prior).mean(dim=(1, 2, 3))
            figures = None
            if batch.masks is not None and batch.regions is not None:
                figures = masks.figures(loss, batch.masks, batch.regions, drift, batch.prior)
            return Losses(self.objective.reweigh(per_image, noised), figures)

    def _elementwise(self, compared: Compared, noised: Noised) -> Tensor:
        """Return the loss (B, C, h, w) float32 of each element, with its weight of the timestep."""
        loss = losses.elementwise(
            compared.prediction,
            compared.target,
            self.element_loss.loss_type,
            self.objective.huber_c(self.element_loss, noised),
        )
        return loss if compared.weight is None else loss * compared.weight

    def untrained_prediction(self, batch: Batch, noised: Noised) -> Tensor:
        """Return (B, C, h, w) what the models predicted of the same noise, time and captions before the training.

        Of the whole batch, where only a part may ask for it: to pick that part, the device would have to be waited for.
        """
        assert self.untrained is not None, "only a trainee that can be switched off has images to preserve or to hold"
        with torch.no_grad(), self.untrained() as others:
            text = self.encode_text(batch, others)
            output = self.family.predict(others or self.parts, noised.noisy, noised.timesteps, text, batch)
        return self.objective.compare(output, noised).prediction
