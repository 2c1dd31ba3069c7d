"""Steps within the backward pass of a whole U-Net: what it is for, as a LoRA's gradients take little memory."""

import pytest
import torch
from tiny_models import tiny_sd15

from library.models.sd import Sd
from library.options.optimizer import OptimizerOptions
from library.training import fused, optimizers, rounding

ADAFACTOR = ("relative_step=False", "scale_parameter=False", "warmup_init=False")
KINDS = (
    OptimizerOptions(optimizer_type="Adafactor", optimizer_args=ADAFACTOR),
    OptimizerOptions(optimizer_type="AdamW8bit"),
)


def unet(dtype: torch.dtype) -> torch.nn.Module:
    denoiser = Sd().load(str(tiny_sd15()), None, dtype).denoiser
    denoiser.enable_gradient_checkpointing()  # gradients of a block come while others are computed again
    return denoiser.train().requires_grad_()


def step(trained: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(0)
    dtype = next(trained.parameters()).dtype
    noisy, text = torch.randn(1, 4, 8, 8).to(dtype), torch.randn(1, 77, trained.config.cross_attention_dim).to(dtype)
    trained(noisy, torch.tensor([500]), text).sample.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(options: OptimizerOptions, trained: torch.nn.Module) -> torch.optim.Optimizer:
    return optimizers.create(options, [{"params": list(trained.parameters()), "lr": 1e-4}])


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options.optimizer_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_gradients_of_a_whole_unet_are_freed_as_they_come(options: OptimizerOptions, dtype: torch.dtype) -> None:
    """At no time is there more than one of them, and every weight has learnt."""
    trained = unet(dtype)
    before = [weight.detach().clone() for weight in trained.parameters()]
    optimizer = optimizer_of(options, trained)
    if dtype == torch.bfloat16:
        rounding.attach(optimizer, seed=1)
    weights = list(trained.parameters())
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(weight.grad is not None for weight in weights))

    for weight in weights:  # before the steps, which free it
        weight.register_post_accumulate_grad_hook(count)
    fused.step_in_backward(optimizer, 0)
    step(trained, optimizer)
    assert most == 1
    moved = [not torch.equal(*pair) for pair in zip(before, weights, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options.optimizer_type)
def test_a_whole_unet_learns_the_same_as_with_plain_steps(options: OptimizerOptions) -> None:
    ends = []
    for is_fused in (False, True):
        trained = unet(torch.float32)
        optimizer = optimizer_of(options, trained)
        if is_fused:
            fused.step_in_backward(optimizer, 0)
        for _ in range(2):
            step(trained, optimizer)
        ends.append([weight.detach() for weight in trained.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
