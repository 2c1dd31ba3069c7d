"""Training steps that can be worked out by hand: a denoiser that multiplies by its one weight, and no noise."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.batch import Batch
from library.models.family import LatentSpace, Parts, Plain
from library.objectives.objective import Compared, Noised
from library.options.loss import LossOptions
from library.training.step import Step

LATENTS = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])  # predicted as they are: x · ½ · 2


def batch_of(
    masks: Tensor | None = None, weights: tuple[float, ...] = (1.0, 1.0), tokens: Tensor | None = None
) -> Batch:
    count, sizes = len(weights), torch.zeros(len(weights), 2, dtype=torch.int64)
    tokens = torch.zeros(count, 1, 77, dtype=torch.int64) if tokens is None else tokens
    names = tuple(f"{i}.png" for i in range(count))
    return Batch(names, ("",) * count, tokens, None, None, masks, torch.tensor(weights), sizes, sizes, sizes)


class Doubler(Plain):
    """A family whose denoiser gives its input times a weight; latents are halved on their way to it."""

    latent_space = LatentSpace(channels=1, scale=0.5)

    def __init__(self) -> None:
        """Begin to note the predictions."""
        self.predictions: list[Parts] = []  # whose they were

    def encode_text(self, parts: Parts, tokens: Tensor, known: object = None) -> None:
        """Return nothing: the denoiser reads no text."""

    def predict(self, parts: Parts, noisy: Tensor, timesteps: Tensor, text: None, batch: Batch) -> Tensor:
        """Return the input times the weight."""
        self.predictions.append(parts)
        return noisy * parts.denoiser.weight


@dataclass(frozen=True)
class NoNoise:
    """An objective that adds no noise, compares with zero, and weighs as it is told."""

    element_weight: Tensor | None = None  # (B, 1, 1, 1)
    image_weight: float = 1.0

    def noise(self, latents: Tensor) -> Noised:
        """Return the latents as they are."""
        return Noised(latents, torch.zeros_like(latents), latents, torch.zeros(len(latents), dtype=torch.int64))

    def compare(self, output: Tensor, noised: Noised) -> Compared:
        """Compare with zero."""
        return Compared(output, noised.noise, self.element_weight)

    def huber_c(self, options: LossOptions, noised: Noised) -> Tensor | None:
        """Return a threshold of 1 for the losses that have one."""
        return None if options.loss_type in ("l2", "l1") else torch.ones(len(noised.latents), 1, 1, 1)

    def reweigh(self, per_image: Tensor, noised: Noised) -> Tensor:
        """Weigh all images alike."""
        return per_image * self.image_weight


def doubler(objective: NoNoise | None = None, loss: LossOptions | None = None, *, before: float | None = None) -> Step:
    """Return a step whose denoiser gives 2x; before: what it gave times x before the training, None: not kept."""
    untrained = None if before is None else parts_of(before)
    parts = parts_of(2.0)
    return Step(
        Doubler(),
        parts,
        objective or NoNoise(),
        loss or LossOptions(),
        (parts.denoiser,),
        is_text_trained=False,
        untrained=lambda: nullcontext(untrained),
    )


def parts_of(weight: float) -> Parts:
    """Return models of which the denoiser has this weight."""
    denoiser = nn.Module()
    denoiser.weight = nn.Parameter(torch.tensor(weight))
    return Parts(denoiser, (), nn.Identity())


def losses_by(step: Step, batch: Batch, latents: Tensor) -> Tensor:
    """Return the loss of each image."""
    return step(batch, latents).per_image
