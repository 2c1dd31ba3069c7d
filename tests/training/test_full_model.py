"""The copy of a model from before its training."""

from dataclasses import replace

import pytest
import torch
from end_to_end.training_runs import SD15, SDXL, Family, uncropped_batch
from torch import Tensor

from library.models.family import ModelFamily, Parts
from library.training.full_model import FullTrainee, Rates

RATES = Rates(1e-4, (None, None), is_text_trained=True)


def prediction(family: ModelFamily, parts: Parts) -> Tensor:
    """Return what the models say of one noisy picture and its caption, in bf16 where autocast does that."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        text = family.encode_text(parts, family.tokenize(["a cat"]), None)
        return family.predict(parts, latents, torch.tensor([500]), text, uncropped_batch())


@pytest.mark.parametrize("row", [SD15, pytest.param(SDXL, marks=pytest.mark.slow)], ids=lambda row: row.script)
def test_the_copy_predicts_to_the_bit_what_the_model_did_before_it_learnt(row: Family) -> None:
    """Its layers are in bf16 already, at half the memory; embeddings and normalisations are not."""
    family, parts = row.load()
    trained = FullTrainee(parts, RATES, None, None, steps_per_epoch=1)
    before = prediction(family, parts)
    trained.keep_untrained(torch.bfloat16)
    with torch.no_grad():
        for weight in trained.trained_parameters():
            weight.add_(0.01)
    assert not torch.equal(prediction(family, parts), before)
    with trained.untrained() as untrained:
        assert torch.equal(prediction(family, untrained), before)
    memory = [sum(weight.nbytes for weight in each.denoiser.parameters()) for each in (untrained, parts)]
    assert memory[0] < 0.51 * memory[1]
    models = (untrained.denoiser, *untrained.text_encoders)
    assert not any(weight.requires_grad for model in models for weight in model.parameters())


def test_text_encoders_that_do_not_learn_are_not_copied() -> None:
    _, parts = SD15.load()
    trained = FullTrainee(parts, replace(RATES, is_text_trained=False), 0, None, steps_per_epoch=1)
    trained.keep_untrained(None)
    with trained.untrained() as untrained:
        assert untrained.text_encoders == parts.text_encoders
        assert untrained.denoiser is not parts.denoiser
