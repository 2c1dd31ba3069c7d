"""Checkpoints in main memory: equal gradients, and what is kept where."""

import pytest
import torch
from tiny_models import tiny_sd15
from torch import Tensor

from library.models.family import Parts
from library.models.sd import Sd

FAMILY = Sd()


def gradients(*, is_checkpointed: bool, is_offloaded: bool = False, device: str = "cpu") -> list[Tensor]:
    """Return the gradients of the U-Net's weights and of its input."""
    parts = FAMILY.load(str(tiny_sd15()), None, torch.float32)
    parts.denoiser.requires_grad_().to(device)
    if is_checkpointed:
        FAMILY.enable_gradient_checkpointing(parts, False, is_offloaded=is_offloaded)
    noisy = inputs(device)[0].requires_grad_()
    predict(parts, noisy).square().mean().backward()
    return [noisy.grad, *(parameter.grad for parameter in parts.denoiser.parameters())]


def inputs(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 8, generator=generator).to(device), torch.randn(1, 77, 32, generator=generator).to(
        device
    )


def predict(parts: Parts, noisy: Tensor) -> Tensor:
    text = inputs(noisy.device.type)[1]
    return FAMILY.predict(parts, noisy, torch.tensor([500], device=noisy.device), text, None)


def test_gradients_are_those_without_checkpoints() -> None:
    plain = gradients(is_checkpointed=False)
    found = gradients(is_checkpointed=True, is_offloaded=True)
    assert len(found) == len(plain) > 100
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)


def kept_by_the_graph(*, is_offloaded: bool) -> int:
    """Return how many elements, without weights, the graph keeps where the forward pass computes."""
    parts = FAMILY.load(str(tiny_sd15()), None, torch.float32)
    FAMILY.enable_gradient_checkpointing(parts, False, is_offloaded=is_offloaded)
    weights = {parameter.untyped_storage().data_ptr() for parameter in parts.denoiser.parameters()}
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        kept[0] += 0 if tensor.untyped_storage().data_ptr() in weights else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        predict(parts, inputs("cpu")[0].requires_grad_())
    return kept[0]


def test_the_inputs_of_blocks_are_not_kept_where_they_are_computed() -> None:
    """What the U-Net keeps outside of its blocks, for its resizing and its last norm, stays."""
    assert kept_by_the_graph(is_offloaded=True) < 0.5 * kept_by_the_graph(is_offloaded=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_less_until_the_backward_pass() -> None:
    def kept(is_offloaded: bool) -> int:
        parts = FAMILY.load(str(tiny_sd15()), None, torch.float32)
        parts.denoiser.to("cuda")
        FAMILY.enable_gradient_checkpointing(parts, False, is_offloaded=is_offloaded)
        noisy = inputs("cuda")[0].repeat(8, 1, 4, 4).requires_grad_()
        text = inputs("cuda")[1].repeat(8, 1, 1)
        before = torch.cuda.memory_allocated()
        output = FAMILY.predict(parts, noisy, torch.full((8,), 500, device="cuda"), text, None)
        bytes_kept = torch.cuda.memory_allocated() - before
        output.sum().backward()
        return bytes_kept

    assert kept(True) < 0.6 * kept(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_are_the_same_on_a_gpu() -> None:
    plain = gradients(is_checkpointed=True, device="cuda")
    found = gradients(is_checkpointed=True, is_offloaded=True, device="cuda")
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
