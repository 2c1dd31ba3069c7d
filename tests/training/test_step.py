"""One training step: what masks, regularisation weights and timestep weights do to the loss and to the gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from training.simple_steps import LATENTS, NoNoise, batch_of, doubler, losses_by

from library.batch import Share
from library.models.sd import Sd
from library.objectives.ddpm import Ddpm
from library.objectives.objective import Compared, Noised
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.training.step import Step
from networks import lora, plugin

# ---- by hand: a denoiser that multiplies by its one weight -----------------------------------------------------


def test_the_loss_without_masks_is_the_mean_square() -> None:
    loss = losses_by(doubler(), batch_of(), LATENTS)
    assert loss.tolist() == [(1 + 4 + 9 + 16) / 4, (25 + 36 + 49 + 64) / 4]


def test_the_mean_counts_masked_cells() -> None:
    """As sd-scripts: three black cells of four leave a quarter of the fourth one's loss."""
    mask = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]).expand(2, 1, 2, 2)
    assert losses_by(doubler(), batch_of(mask), LATENTS).tolist() == [16 / 4, 64 / 4]


def test_a_half_covered_cell_counts_half() -> None:
    mask = torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]]).expand(2, 1, 2, 2)
    assert losses_by(doubler(), batch_of(mask), LATENTS).tolist() == [(1 + 2 + 9 / 4) / 4, (25 + 18 + 49 / 4) / 4]


def test_each_image_has_its_own_mask() -> None:
    masks = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert losses_by(doubler(), batch_of(masks), LATENTS).tolist() == [0, 43.5]


def test_a_regularisation_image_counts_by_its_weight() -> None:
    assert losses_by(doubler(), batch_of(weights=(1.0, 0.25)), LATENTS).tolist() == [7.5, 43.5 / 4]


def test_processes_that_share_a_batch_draw_the_noise_that_one_would():
    step = doubler(Ddpm.from_options(NoiseOptions(noise_offset=0.1, multires_noise_iterations=2), LossOptions(), False))
    latents = torch.linspace(-1, 1, 3 * 16).view(3, 1, 4, 4)
    torch.manual_seed(5)
    whole = losses_by(step, batch_of(weights=(1.0, 0.5, 1.0)), latents)
    after = []
    for index, weights in ((0, (1.0, 1.0)), (1, (0.5,))):
        share = Share(3, index, 2)
        torch.manual_seed(5)
        own = losses_by(step, replace(batch_of(weights=weights), share=share), latents[share.rows])
        torch.testing.assert_close(own, whole[share.rows])
        after.append(torch.rand(()).item())
    assert after[0] != after[1]  # dropout is each one's own


def test_the_gradient_is_that_of_the_masked_loss() -> None:
    """d/dw of mean(m (w x / 2)²) is mean(m w x² / 2): with one white cell, x = 4 and w = 2, it is 16 / 4."""
    step = doubler()
    mask = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]).expand(2, 1, 2, 2)
    losses_by(step, batch_of(mask), LATENTS)[0].backward()
    assert step.parts.denoiser.weight.grad == 4


def test_all_weights_multiply() -> None:
    objective = NoNoise(element_weight=torch.tensor([2.0, 3.0])[:, None, None, None], image_weight=5.0)
    loss = losses_by(doubler(objective), batch_of(torch.full((2, 1, 2, 2), 0.5), (1.0, 0.1)), LATENTS)
    assert loss.tolist() == pytest.approx([7.5 * 2 * 0.5 * 5, 43.5 * 3 * 0.5 * 0.1 * 5])


HUBER = 2 * (sum((x * x + 1) ** 0.5 for x in (1, 2, 3, 4)) - 4) / 4  # mean of 2c(√(d²+c²) - c), c = 1


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 2.5), ("huber", HUBER)])
def test_the_loss_type_is_what_the_mask_weighs(loss_type: str, expected: float) -> None:
    step = doubler(loss=LossOptions(loss_type=loss_type))
    assert losses_by(step, batch_of(torch.full((2, 1, 2, 2), 0.5)), LATENTS)[0].item() == pytest.approx(expected / 2)


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses_by(doubler(), batch_of(), LATENTS + 1 / 1024)  # a part that bfloat16 has no digits for
    assert loss.dtype == torch.float32
    assert loss[0] != 7.5


def test_an_image_that_breaks_does_not_break_its_neighbour() -> None:
    latents = LATENTS.clone()
    latents[1, 0, 0, 0] = torch.nan
    assert losses_by(doubler(), batch_of(), latents).isfinite().tolist() == [True, False]


# ---- on a whole model with a LoRA ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shifted:
    """A real objective whose target is moved: the loss changes there and only there."""

    inner: Ddpm
    shift: Tensor  # added to the target
    noise: Callable[[Tensor], Noised] = field(init=False)
    reweigh: Callable[[Tensor, Noised], Tensor] = field(init=False)
    huber_c: Callable[[LossOptions, Noised], Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        """Take the rest from the real one."""
        for name in ("noise", "reweigh", "huber_c"):
            object.__setattr__(self, name, getattr(self.inner, name))

    def compare(self, output: Tensor, noised: Noised) -> Compared:
        """Return the real comparison with the target moved."""
        compared = self.inner.compare(output, noised)
        return replace(compared, target=compared.target + self.shift)


@pytest.fixture(scope="module")
def sd():
    """A tiny SD 1.5 with a LoRA on all of it, its up matrices not zero, so that every weight gets gradients."""
    from tiny_models import tiny_sd15

    parts = Sd().load(str(tiny_sd15()), None, torch.float32)
    torch.manual_seed(0)
    targets = tuple(Sd().lora_targets(parts))
    network = lora.create_network(1.0, 4, 1.0, None, None, None, targets=targets)
    with torch.no_grad():
        for layer in network.layers:
            layer.lora_up.weight.normal_(std=0.1)
    with network.attached():
        yield SimpleNamespace(parts=parts, network=network)


OBJECTIVE = Ddpm.from_options(NoiseOptions(), LossOptions(), v_parameterization=False)
SIDE = 8


def step_of(sd, objective=OBJECTIVE, loss: LossOptions | None = None, *, is_text_trained: bool = True) -> Step:
    return Step(
        Sd(),
        sd.parts,
        objective,
        loss or LossOptions(),
        (sd.network,),
        is_text_trained=is_text_trained,
        untrained=lambda: plugin.switched_off(sd.network),
    )


def latents_of() -> Tensor:
    return 5 * torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tokens_of() -> Tensor:
    return Sd().tokenize(["a cat on a mat", "a dog"])


def losses_and_gradients(sd, step: Step, masks: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and every weight's gradient; the noise is the same at each call."""
    sd.network.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = losses_by(step, batch_of(masks, tokens=tokens_of()), latents_of())
    loss.mean().backward()
    gradients = {name: p.grad.clone() for name, p in sd.network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def left_half() -> Tensor:
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[..., : SIDE // 2] = 1
    return masks


def test_a_pixel_under_a_black_mask_adds_no_gradient(sd) -> None:
    """Whatever the loss is there, every gradient stays the same, bit for bit."""
    plain_loss, plain = losses_and_gradients(sd, step_of(sd), left_half())
    elsewhere = 100 * (1 - left_half())
    loss, gradients = losses_and_gradients(sd, step_of(sd, Shifted(OBJECTIVE, elsewhere)), left_half())
    assert torch.equal(loss, plain_loss)
    assert gradients.keys() == plain.keys()
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert all(gradient.isfinite().all() for gradient in plain.values())


def test_a_pixel_under_a_white_mask_adds_a_gradient(sd) -> None:
    _, plain = losses_and_gradients(sd, step_of(sd), left_half())
    one_cell = torch.zeros(2, 1, SIDE, SIDE)
    one_cell[:, :, 3, 2] = 1
    _, gradients = losses_and_gradients(sd, step_of(sd, Shifted(OBJECTIVE, one_cell)), left_half())
    assert sum(not torch.equal(gradients[name], plain[name]) for name in plain) > 0.9 * len(plain)


def test_the_gradient_of_a_mask_and_of_its_opposite_add_up_to_that_of_the_picture(sd) -> None:
    whole_loss, whole = losses_and_gradients(sd, step_of(sd), None)
    left_loss, left = losses_and_gradients(sd, step_of(sd), left_half())
    right_loss, right = losses_and_gradients(sd, step_of(sd), 1 - left_half())
    torch.testing.assert_close(left_loss + right_loss, whole_loss)
    for name, gradient in whole.items():
        assert (left[name] + right[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6


def test_white_masks_are_as_good_as_none(sd) -> None:
    none_loss, none = losses_and_gradients(sd, step_of(sd), None)
    white_loss, white = losses_and_gradients(sd, step_of(sd), torch.ones(2, 1, SIDE, SIDE))
    assert torch.equal(none_loss, white_loss)
    assert all(torch.equal(white[name], none[name]) for name in none)


def test_black_masks_give_no_gradient_at_all(sd) -> None:
    loss, gradients = losses_and_gradients(sd, step_of(sd), torch.zeros(2, 1, SIDE, SIDE))
    assert loss.tolist() == [0, 0]
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_loss_is_the_references_formula_element_by_element(sd) -> None:
    """masked_loss: l2 per element, times the mask, mean over all, times the image's weight, times min-SNR."""
    options = LossOptions(min_snr_gamma=5.0)
    objective = Ddpm.from_options(NoiseOptions(), options, v_parameterization=False)
    masks = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    batch = batch_of(masks, (1.0, 0.3), tokens_of())
    with torch.no_grad():
        torch.manual_seed(3)
        loss = losses_by(step_of(sd, objective, options), batch, latents_of())
        torch.manual_seed(3)
        noised = objective.noise(latents_of() * 0.18215)
        text = sd.parts.text_encoders[0](batch.tokens[:, 0]).last_hidden_state
        output = sd.parts.denoiser(noised.noisy, noised.timesteps, text).sample
    for i, weight in enumerate((1.0, 0.3)):
        total = 0.0
        for channel, row, column in np.ndindex(4, SIDE, SIDE):
            difference = float(output[i, channel, row, column]) - float(noised.noise[i, channel, row, column])
            total += difference**2 * float(masks[i, 0, row, column])
        kept = float(objective.alphas_cumprod[noised.timesteps[i]])
        ratio = kept / (1 - kept)
        expected = total / (4 * SIDE * SIDE) * weight * min(ratio, 5.0) / ratio
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_a_text_encoder_that_is_not_trained_gets_no_gradient(sd) -> None:
    _, trained = losses_and_gradients(sd, step_of(sd, is_text_trained=True), None)
    _, untrained = losses_and_gradients(sd, step_of(sd, is_text_trained=False), None)
    assert {name for name in trained if name.startswith("lora_te_")}
    assert {name for name in untrained if not name.startswith("lora_te_")} == set(untrained)


def test_only_what_is_trained_is_part_of_the_step(sd) -> None:
    step = step_of(sd)
    assert {id(p) for p in step.parameters()} == {id(p) for p in sd.network.parameters()}
    assert step.parts is sd.parts


# ---- images whose output is preserved --------------------------------------------------------------------------


@pytest.fixture
def identity(sd):
    """The model whose LoRA is as at the first step of a training: its up matrices are zero."""
    kept = {name: parameter.detach().clone() for name, parameter in sd.network.named_parameters()}
    with torch.no_grad():
        for layer in sd.network.layers:
            layer.lora_up.weight.zero_()
    yield sd
    with torch.no_grad():
        for name, parameter in sd.network.named_parameters():
            parameter.copy_(kept[name])


def preserving(sd, preserved: list[bool] | None, objective=OBJECTIVE) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses and every weight's gradient; the noise is the same at each call."""
    sd.network.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    flags = None if preserved is None else torch.tensor(preserved)
    loss = losses_by(step_of(sd, objective), replace(batch_of(tokens=tokens_of()), preserved=flags), latents_of())
    loss.mean().backward()
    gradients = {name: p.grad.clone() for name, p in sd.network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def test_a_preserved_image_has_no_loss_and_no_gradient_while_the_lora_changes_nothing(identity) -> None:
    loss, gradients = preserving(identity, [True, True])
    assert loss.tolist() == pytest.approx([0, 0], abs=1e-10)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-6


def test_in_a_mixed_batch_the_gradient_comes_from_the_other_image(identity) -> None:
    plain_loss, _ = preserving(identity, None)
    loss, gradients = preserving(identity, [True, False])
    assert loss[0].item() == pytest.approx(0, abs=1e-10)
    assert loss[1] == plain_loss[1]
    identity.network.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    alone = losses_by(step_of(identity), batch_of(weights=(0.0, 1.0), tokens=tokens_of()), latents_of())
    alone.mean().backward()
    for name, parameter in identity.network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert any(gradient.any() for gradient in gradients.values())


def test_the_target_of_a_preserved_image_is_what_the_model_says_without_the_lora(sd) -> None:
    """Neither its U-Net nor its text encoder takes part in the target, and both in the prediction."""
    loss, _ = preserving(sd, [True, False])
    with torch.no_grad():
        torch.manual_seed(3)
        noised = OBJECTIVE.noise(latents_of() * 0.18215)
        outputs = []
        for strength in (1.0, 0.0):
            plugin.set_multiplier(sd.network, strength)
            text = sd.parts.text_encoders[0](tokens_of()[:, 0]).last_hidden_state
            outputs.append(sd.parts.denoiser(noised.noisy, noised.timesteps, text).sample)
        plugin.set_multiplier(sd.network, 1.0)
    changed, original = outputs
    assert loss[0].item() == pytest.approx(float((changed - original)[0].square().mean()), rel=1e-4)
    assert loss[1].item() == pytest.approx(float((changed - noised.noise)[1].square().mean()), rel=1e-4)
    assert loss[0] > 1e-6


def test_the_network_is_at_its_strength_again_when_gradients_are_computed(sd) -> None:
    preserving(sd, [True, True])
    assert {layer.multiplier for layer in sd.network.layers} == {sd.network.multiplier} == {1.0}


def test_a_batch_without_preserved_images_predicts_once(sd) -> None:
    calls = []
    handle = sd.parts.denoiser.register_forward_hook(lambda *_: calls.append(1))
    try:
        preserving(sd, None)
        assert len(calls) == 1
        preserving(sd, [False, True])
        assert len(calls) == 3
    finally:
        handle.remove()


def test_a_preserved_image_is_weighed_by_its_mask(sd) -> None:
    torch.manual_seed(3)
    flags = torch.tensor([True, True])
    batch = replace(batch_of(torch.full((2, 1, SIDE, SIDE), 0.25), tokens=tokens_of()), preserved=flags)
    loss = losses_by(step_of(sd), batch, latents_of()).detach()
    torch.testing.assert_close(loss, 0.25 * preserving(sd, [True, True])[0])
