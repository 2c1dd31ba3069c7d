"""Frozen weights in float8: what they weigh, what they compute, and what stays out of it."""

import pytest
import torch
from tiny_models import tiny_sd15
from torch import Tensor, nn

from library.errors import OptionError
from library.models import float8
from library.models.family import Parts
from library.models.sd import Sd

FAMILY = Sd()


def load() -> Parts:
    return FAMILY.load(str(tiny_sd15()), None, torch.bfloat16)


def rounded_in_place() -> Parts:
    """Return the models with each weight cast to float8 and back: the same numbers at twice the size."""
    parts = load()
    for model in (parts.denoiser, *parts.text_encoders):
        for layer in layers_of(model):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    return parts


def stored() -> Parts:
    parts = load()
    for model in (parts.denoiser, *parts.text_encoders):
        float8.store(model)
    return parts


def layers_of(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def num_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def prediction(parts: Parts, noisy: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        text = FAMILY.encode_text(parts, FAMILY.tokenize(["a cat", "two dogs"]))
        return FAMILY.predict(parts, noisy, torch.tensor([500, 20]), text, None)


def gradient(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return the U-Net's output and the gradient of its input."""
    torch.manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8).requires_grad_()
    output = prediction(parts, noisy)
    output.float().square().mean().backward()
    return output.detach(), noisy.grad


def test_the_u_net_takes_half_the_memory() -> None:
    before = num_bytes(load().denoiser)
    after = num_bytes(stored().denoiser)
    assert before / 2 < after < 0.51 * before


def test_weights_of_layers_are_stored_and_all_else_stays() -> None:
    parts = stored()
    for model in (parts.denoiser, parts.text_encoders[0]):
        weights = {id(layer.weight) for layer in layers_of(model)}
        for name, parameter in model.named_parameters():
            wanted = torch.float8_e4m3fn if id(parameter) in weights else torch.bfloat16
            assert parameter.dtype == wanted, name


def test_the_models_compute_as_with_weights_cast_to_float8_and_back() -> None:
    wanted, wanted_gradient = gradient(rounded_in_place())
    output, found_gradient = gradient(stored())
    assert torch.equal(output, wanted)
    assert torch.equal(found_gradient, wanted_gradient)
    assert found_gradient.abs().max() > 0


def test_gradient_checkpointing_changes_nothing() -> None:
    wanted, wanted_gradient = gradient(stored())
    parts = stored()
    FAMILY.enable_gradient_checkpointing(parts, train_text_encoder=True)
    output, found_gradient = gradient(parts)
    assert torch.equal(output, wanted)
    assert torch.equal(found_gradient, wanted_gradient)


def test_nothing_larger_than_float8_is_kept_of_a_weight_for_the_backward_pass() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1).to(torch.bfloat16).requires_grad_(False)
    float8.store(layer)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(1, 4, 6, 6, requires_grad=True))
    assert [tensor.dtype for tensor in kept] == [torch.float8_e4m3fn]


@pytest.mark.parametrize("layer", [nn.Linear(6, 5, bias=False), nn.Conv2d(6, 4, 3, 2, 1, groups=2), nn.Linear(6, 5)])
def test_layers_of_any_geometry_have_the_gradient_of_their_plain_kind(layer: nn.Module) -> None:
    layer = layer.requires_grad_(False)
    layer.weight.data = float8.rounded(layer.weight.data).float()
    shape = (3, 6, 7, 7) if isinstance(layer, nn.Conv2d) else (3, 7, 6)
    plain, own = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    layer(plain).square().sum().backward()
    float8.store(layer)
    layer(own).square().sum().backward()
    assert torch.equal(own.grad, plain.grad)


def test_a_second_time_changes_nothing() -> None:
    parts = stored()
    before, _ = gradient(parts)
    float8.store(parts.denoiser)
    assert torch.equal(gradient(parts)[0], before)


def test_a_weight_beyond_the_range_is_cut_and_does_not_become_a_nan() -> None:
    assert float8.rounded(torch.tensor([1e4, -449.0, 447.0])).float().tolist() == [448.0, -448.0, 448.0]


def test_a_network_that_computes_with_the_weights_themselves_is_refused_in_one_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16).requires_grad_(False)
    float8.store(model)
    model[0].forward = lambda x: x @ (model[0].weight * 2)  # as LyCORIS does
    refused = pytest.raises(OptionError, match=r"--network_module some\.module .* bypass_mode=True")
    with refused, float8.refusing("some.module"):
        float8.try_adapted(model, torch.bfloat16)


def test_other_mistakes_of_a_network_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"), float8.refusing("some.module"):
        raise RuntimeError("shapes do not fit")
