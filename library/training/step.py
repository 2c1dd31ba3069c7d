"""START READING HERE: one training step, from latents and text to a loss per image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library import losses, masks

if TYPE_CHECKING:
    from library.batch import Batch
    from library.models.family import ModelFamily, Parts
    from library.objectives.objective import HuberOptions, Objective


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
    ) -> None:
        super().__init__()
        self.trained = nn.ModuleList(trained)
        self.family = family
        self._frozen = (parts,)  # in a tuple: nn.Module would register what it finds in a plain attribute
        self.objective = objective
        self.element_loss = element_loss
        self.is_text_trained = is_text_trained

    @property
    def parts(self) -> Parts:
        """The models that predict."""
        return self._frozen[0]

    def forward(self, batch: Batch, latents: Tensor) -> Tensor:
        """Return the loss of each image.

        Args:
            batch: on the device; its images or latents are not looked at.
            latents: (B, C, h, w) VAE samples, not yet scaled.
        Returns: (B,) float32, weighted by mask, prior loss weight and signal-to-noise ratio.
        """
        noised = self.objective.noise(self.family.latent_space.normalise(latents))
        assert batch.tokens is not None, "the loader of a run tokenizes"
        with nullcontext() if self.is_text_trained else torch.no_grad():
            text = self.family.encode_text(self.parts, batch.tokens)
        output = self.family.predict(self.parts, noised.noisy, noised.timesteps, text, batch)
        compared = self.objective.compare(output, noised)  # prediction, target, weight
        with torch.autocast(latents.device.type, enabled=False):
            loss = losses.elementwise(
                compared.prediction,
                compared.target,
                self.element_loss.loss_type,
                self.objective.huber_c(self.element_loss, noised),
            )  # (B, C, h, w)
            if compared.weight is not None:  # (B, 1, 1, 1)
                loss = loss * compared.weight
            loss = masks.weigh(loss, batch.masks)  # the only place where a mask meets a loss
            per_image = loss.mean(dim=(1, 2, 3)) * batch.weights  # as sd-scripts: the mean counts masked cells too
            return self.objective.reweigh(per_image, noised)
