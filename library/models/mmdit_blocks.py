"""The layers of an MMDiT, under the names they have in checkpoints.

A LoRA takes the place of a Linear's `forward`, and float8 does so too: layers are called, their weights never touched.
Norms compute in the format of their input, inside in float32: autocast would widen all tokens for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.layout.mmdit import HEAD_WIDTH, MmditShape

EPSILON = 1e-6


class HeadNorm(nn.RMSNorm):
    """The norm of each head's queries or keys."""

    def __init__(self) -> None:
        super().__init__(HEAD_WIDTH, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., 64) with a root mean square of 1, times the weight; in x's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def normed(tokens: Tensor) -> Tensor:
    """Return tokens (B, N, D), each with a mean of 0 and a variance of 1; in their own dtype."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return normed tokens (B, N, D) times 1 + scale, plus shift (both (B, 1, D))."""
    return torch.addcmul(shift, tokens, 1 + scale)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what each query finds (B, N, D); all three are (B, N, heads, 64)."""
    queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Queries, keys and values of a stream, and the projection of what they found."""

    def __init__(self, shape: MmditShape, *, has_output: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width) if has_output else None
        self.ln_q = HeadNorm() if shape.has_qk_norm else None
        self.ln_k = HeadNorm() if shape.has_qk_norm else None

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, N, heads, 64) of tokens (B, N, D)."""
        queries, keys, values = self.qkv(tokens).unflatten(-1, (3, -1, HEAD_WIDTH)).unbind(2)
        if self.ln_q is not None and self.ln_k is not None:
            queries, keys = self.ln_q(queries), self.ln_k(keys)
        return queries, keys, values

    def project(self, found: Tensor) -> Tensor:
        """Return the output (B, N, D) of what the queries found."""
        assert self.proj is not None
        return self.proj(found)


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, inner: int, hidden: int, outer: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inner, hidden)
        self.fc2 = nn.Linear(hidden, outer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens (..., outer) of tokens (..., inner)."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


@dataclass(frozen=True)
class Begun:
    """A stream's part of a joint block up to the joint attention."""

    parts: tuple[Tensor, Tensor, Tensor]  # queries, keys and values (B, N, heads, 64)
    own: Tensor | None  # what the second attention found (B, N, D)
    modulations: Sequence[Tensor]  # (B, 1, D): shift, scale and gate of the attention, the MLP, the second attention


class SingleDiTBlock(nn.Module):
    """The picture's or the text's half of a joint block.

    The last block's text is read and then dropped: that half has neither output nor MLP. The name is that of the field,
    by which network modules of other packages find the layers to adapt.
    """

    def __init__(self, shape: MmditShape, *, is_read_only: bool = False, has_second: bool = False) -> None:
        super().__init__()
        self.attn = Attention(shape, has_output=not is_read_only)
        self.attn2 = Attention(shape) if has_second else None
        self.mlp = None if is_read_only else Mlp(shape.width, shape.mlp_width, shape.width)
        self.num_modulations = 2 if is_read_only else 9 if has_second else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, self.num_modulations * shape.width))

    def begin(self, tokens: Tensor, activated: Tensor) -> Begun:
        """Return what the joint attention takes of this stream.

        Args:
            tokens: (B, N, D).
            activated: what the modulations are made of (B, D), after the SiLU that they all begin with.
        """
        modulations = self.adaLN_modulation[1](activated)[:, None].chunk(self.num_modulations, dim=-1)
        tokens = normed(tokens)  # for both attentions
        parts = self.attn.split(modulated(tokens, *modulations[:2]))
        own = None if self.attn2 is None else attend(*self.attn2.split(modulated(tokens, *modulations[6:8])))
        return Begun(parts, own, modulations)

    def finish(self, tokens: Tensor, found: Tensor, begun: Begun) -> Tensor:
        """Return the tokens (B, N, D) after the block.

        Args:
            tokens: before the block.
            found: by the queries of the joint attention.
            begun: with these tokens.
        """
        assert self.mlp is not None
        tokens = torch.addcmul(tokens, begun.modulations[2], self.attn.project(found))
        if self.attn2 is not None and begun.own is not None:
            tokens = torch.addcmul(tokens, begun.modulations[8], self.attn2.project(begun.own))
        shift, scale, gate = begun.modulations[3:6]
        return torch.addcmul(tokens, gate, self.mlp(modulated(normed(tokens), shift, scale)))


class JointBlock(nn.Module):
    """Text and picture, each with layers of its own, in one attention."""

    def __init__(self, shape: MmditShape, index: int) -> None:
        super().__init__()
        self.is_last = index == shape.depth - 1
        self.context_block = SingleDiTBlock(shape, is_read_only=self.is_last)
        self.x_block = SingleDiTBlock(shape, has_second=index < shape.num_dual)

    def forward(self, x: Tensor, context: Tensor, activated: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the picture's tokens (B, N, D) and the text's (B, M, D), which are None after the last block."""
        text, picture = self.context_block.begin(context, activated), self.x_block.begin(x, activated)
        joint = [torch.cat(pair, dim=1) for pair in zip(text.parts, picture.parts, strict=True)]
        found_by_text, found_by_x = attend(*joint).split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.finish(x, found_by_x, picture)
        return x, None if self.is_last else self.context_block.finish(context, found_by_text, text)


class FinalLayer(nn.Module):
    """The picture's tokens become patches of the output."""

    def __init__(self, shape: MmditShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 2 * shape.width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """Return patches (B, N, patch * patch * channels) of tokens (B, N, D)."""
        shift, scale = self.adaLN_modulation[1](activated)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(normed(x), shift, scale))


class PatchEmbedder(nn.Module):
    """The first layer: patches of the latent become tokens."""

    def __init__(self, shape: MmditShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape.channels, shape.width, shape.patch, stride=shape.patch)

    def forward(self, noisy: Tensor) -> Tensor:
        """Return tokens (B, N, D), row by row, of a latent (B, C, h, w)."""
        channels_last = noisy.contiguous(memory_format=torch.channels_last)  # the tokens then lie as they are wanted
        return self.proj(channels_last).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


class VectorEmbedder(nn.Module):
    """What a block's modulation is told of the timestep or of the pooled text."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inner, outer), nn.SiLU(), nn.Linear(outer, outer))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, outer) of features (B, inner)."""
        return self.mlp(features)
