"""Frozen weights in one byte each (float8_e4m3fn), cast to the format of the arithmetic where a layer computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from library.errors import OptionError

STORAGE = torch.float8_e4m3fn
LARGEST = torch.finfo(STORAGE).max  # 448; what is beyond would become a nan


def store(model: nn.Module) -> None:
    """Keep the weights of a model's Linear and Conv2d layers as float8_e4m3fn from here on, in place.

    Each layer computes in the format that its weights had. Biases, norms and embeddings, hardly a hundredth of a model,
    keep that format, as a rounded norm would shift everything behind it. A layer that is stored already stays as it is,
    so that it does no harm to call this again. To be called before a network is attached: a layer's `forward` changes.

    diffusers' layerwise casting is not used, as it turns weights that autograd holds for the backward pass into float8
    under its hands, and casts what is attached to a layer along with it.

    Args:
        model: frozen; on any device.
    """
    for layer in _layers(model):
        weight = layer.weight
        assert not weight.requires_grad, "weights that learn need more than three bits of a fraction"
        layer.forward = _Float8Forward(layer, weight.dtype)  # type: ignore[assignment]
        layer.weight = nn.Parameter(rounded(weight.detach()), requires_grad=False)


@contextmanager
def refusing(network_module: str | None) -> Iterator[None]:
    """Return a context that refuses a network which computes with the weights of layers, not with their `forward`.

    Raises: OptionError, for most of LyCORIS unless it is told otherwise.
    """
    try:
        yield
    except RuntimeError as error:
        if "Float8" not in str(error):
            raise
        raise OptionError(
            f"--network_module {network_module} computes with the weights of the base model themselves, which does not "
            f"work in float8 ({error}). For LyCORIS add bypass_mode=True to --network_args, or leave out --fp8_base."
        ) from error


def try_adapted(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the first layer that a network is attached to compute, where it would otherwise fail in the first step.

    Args:
        model: with the network attached.
        dtype: of the arithmetic.

    Raises: RuntimeError if it cannot.
    """
    adapted = next((layer for layer in model.modules() if isinstance(layer, nn.Linear) and _is_adapted(layer)), None)
    if adapted is None:
        return
    device = next(model.parameters()).device
    drawn_on = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=drawn_on), torch.autocast(device.type, dtype):
        adapted(torch.zeros(1, adapted.in_features, device=device))


def _is_adapted(layer: nn.Linear) -> bool:
    return "forward" in vars(layer) and not isinstance(layer.forward, _Float8Forward)


def rounded(weight: Tensor) -> Tensor:
    """Return a weight of any shape as float8_e4m3fn, cut at ±448."""
    return weight.clamp(-LARGEST, LARGEST).to(STORAGE)


def _layers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or module.weight.dtype == STORAGE:
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            continue  # no model here has such a layer, whose forward is more than one call
        yield module


class _Float8Forward:
    """A layer's forward that casts its weight anew each time, and so never keeps the larger copy."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return _Linear.apply(x.to(self.dtype), layer.weight, layer.bias)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return _Conv2d.apply(x.to(self.dtype), layer.weight, layer.bias, geometry)


class _Linear(torch.autograd.Function):
    """x W^T + b with W frozen in float8; the backward pass casts W again instead of having kept it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None, None


class _Conv2d(torch.autograd.Function):
    """A convolution with its weight frozen in float8; the backward pass casts it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.input_shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight.to(x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        own = conv2d_input(ctx.input_shape, weight.to(gradient.dtype), gradient, *ctx.geometry)
        return own, None, None, None
