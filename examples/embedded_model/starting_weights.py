"""Weights that let an untrained model show something: a VAE that pixelates, a U-Net that takes its input for noise.

Some channels, the carriers, bring a signal unchanged from a network's first layer to its last: every layer between
adds nothing to them. The others keep their random weights. What stands in the way is the last group norm, which would
take away each group's mean and scale. So a signal x travels as three channels, (x, K - x/2, -K - x/2): their mean is 0
and their variance almost constant for |x| << K, and the norm is a mere factor. A bias of 6 then puts the values where
SiLU is a straight line. This needs groups of three channels: 32 groups, so 96 channels at the ends of each network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 3  # channels a group of the last norms, and a signal
CARRYING_WIDTH = 32 * GROUP  # channels that the ends of a network need
CONSTANT = 8.0  # K
NORM_SCALE = CONSTANT * math.sqrt(2 / GROUP)  # the norm divides by this
LIFT = 6.0  # where SiLU is straight: its slope there is 1.012, its value 5.985
SILU_VALUE, SILU_SLOPE = 5.98516, 1.01228
LOG_VARIANCE = -8.0  # of the VAE's latents: a draw is 0.02 from its mean
# latent = MIX @ (red, green, blue): brightness, red against blue, green against both, and a blend. About SD's scale.
SD_SCALE = 0.18215  # that MIX is meant for
MIX = ((3.6, 3.6, 3.6), (11.0, 0.0, -11.0), (-7.0, 14.0, -7.0), (0.0, 4.0, 4.0))
UNET_RANDOM = 0.3  # what is left of the random part of the U-Net's output


@torch.no_grad()
def shape_vae(vae: Any) -> None:
    """Make a VAE (diffusers' AutoencoderKL) average 8x8 pixels into a latent cell and paint the cell back."""
    mix = torch.zeros(vae.config.latent_channels, 3)  # what channels there are beyond the four stay 0
    mix[: len(MIX)] = torch.tensor(MIX) * (SD_SCALE / vae.config.scaling_factor)
    encoder, decoder = vae.encoder, vae.decoder
    carriers = range(GROUP * 3)
    _start_carrying(encoder.conv_in, torch.eye(3))
    _start_carrying(decoder.conv_in, torch.linalg.pinv(mix))
    for half in (encoder, decoder):
        _leave_alone(half, carriers)
        _straighten(half.conv_norm_out, carriers)
    for block in encoder.down_blocks:
        for sampler in block.downsamplers or ():
            _set_taps(sampler.conv, carriers, slice(0, 2), 1 / 4)  # the mean of 2x2 pixels
    for block in decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _set_taps(sampler.conv, carriers, slice(1, 2), 1.0)
    _stop_carrying(encoder.conv_out, torch.cat([mix, torch.zeros_like(mix)]), keep_others=0.0)
    _stop_carrying(decoder.conv_out, torch.eye(3), keep_others=0.0)
    encoder.conv_out.bias[len(mix) :] = LOG_VARIANCE
    for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):  # SD3's has neither
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
        conv.bias.zero_()


@torch.no_grad()
def shape_unet(unet: Any) -> None:
    """Make a U-Net (diffusers' UNet2DConditionModel) return its input plus a little of its random self.

    At most timesteps the input is mostly noise, so this is a fair guess to begin with.
    """
    carriers = range(GROUP * unet.config.in_channels)
    _start_carrying(unet.conv_in, torch.eye(unet.config.in_channels))
    last = unet.up_blocks[-1]
    _leave_alone(last, carriers)
    # the last resnet sees conv_in's output, the carriers, behind the channels from below
    shortcut = last.resnets[-1].conv_shortcut
    below = shortcut.in_channels - unet.conv_in.out_channels
    shortcut.weight[list(carriers)] = 0.0
    for channel in carriers:
        shortcut.weight[channel, below + channel] = 1.0
    _straighten(unet.conv_norm_out, carriers)
    _stop_carrying(unet.conv_out, torch.eye(unet.config.in_channels), keep_others=UNET_RANDOM)


def _start_carrying(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Make a 3x3 convolution put matrix @ input (signals, channels) on the carriers."""
    assert conv.bias is not None
    for signal, row in enumerate(matrix):
        for place, (factor, constant) in enumerate(((1.0, 0.0), (-0.5, CONSTANT), (-0.5, -CONSTANT))):
            channel = GROUP * signal + place
            conv.weight[channel] = 0.0
            conv.weight[channel, :, 1, 1] = factor * row
            conv.bias[channel] = constant


def _leave_alone(network: nn.Module, carriers: Iterable[int]) -> None:
    """Make every residual branch in network add nothing to the carriers, and every shortcut keep them."""
    channels = list(carriers)
    for name, module in network.named_modules():
        if name.endswith(("conv2", "to_out.0", "proj_out")) and "transformer_blocks" not in name:
            module.weight[channels] = 0.0
            module.bias[channels] = 0.0
        elif name.endswith("conv_shortcut"):
            module.weight[channels] = 0.0
            module.bias[channels] = 0.0
            for channel in channels:
                module.weight[channel, channel] = 1.0


def _set_taps(conv: nn.Conv2d, carriers: Iterable[int], taps: slice, value: float) -> None:
    """Make a 3x3 convolution give each carrier value times the sum of its own square of taps."""
    assert conv.bias is not None
    for channel in carriers:
        conv.weight[channel] = 0.0
        conv.weight[channel, channel, taps, taps] = value
        conv.bias[channel] = 0.0


def _straighten(norm: nn.GroupNorm, carriers: Iterable[int]) -> None:
    """Make the norm, with the SiLU behind it, a straight line on the carriers."""
    channels = list(carriers)
    norm.weight[channels] = NORM_SCALE
    norm.bias[channels] = LIFT


def _stop_carrying(conv: nn.Conv2d, matrix: Tensor, keep_others: float) -> None:
    """Make a 3x3 convolution return matrix @ signals, plus keep_others times what it returned for other channels."""
    assert conv.bias is not None
    signals = matrix.shape[1]
    conv.weight *= keep_others
    conv.weight[:, : GROUP * signals] = 0.0
    conv.weight[:, range(0, GROUP * signals, GROUP), 1, 1] = matrix / SILU_SLOPE
    conv.bias.copy_(-matrix.sum(dim=1) * SILU_VALUE / SILU_SLOPE)
