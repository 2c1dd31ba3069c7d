"""The layers of an MMDiT, under the names they have in checkpoints.

A LoRA takes the place of a Linear's `forward`, and float8 does so too: layers are called, their weights never touched.
Norms compute in the format of their input, inside in float32: autocast would widen all tokens for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.layout.mmdit import HEAD_WIDTH, MmditShape

EPSILON = 1e-6
ATTENTION, MLP, SECOND = slice(0, 3), slice(3, 6), slice(6, 9)  # shift, scale and gate of each


class HeadNorm(nn.RMSNorm):
    """The norm of each head's queries or keys."""

    def __init__(self) -> None:
        super().__init__(HEAD_WIDTH, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., 64) with a root mean square of 1, times the weight; in x's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return tokens (B, N, D) normed, times 1 + scale, plus shift (both (B, 1, D))."""
    with torch.autocast(tokens.device.type, enabled=False):
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPSILON)
    return torch.addcmul(shift, normed, 1 + scale)


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


class Stream(nn.Module):
    """The picture's or the text's half of a joint block.

    The last block's text is read and then dropped: that half has neither output nor MLP.
    """

    def __init__(self, shape: MmditShape, *, is_read_only: bool = False, has_second: bool = False) -> None:
        super().__init__()
        self.attn = Attention(shape, has_output=not is_read_only)
        self.attn2 = Attention(shape) if has_second else None
        self.mlp = None if is_read_only else Mlp(shape.width, shape.mlp_width, shape.width)
        self.num_modulations = 2 if is_read_only else 9 if has_second else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, self.num_modulations * shape.width))

    def modulations(self, activated: Tensor) -> Sequence[Tensor]:
        """Return shift, scale and gate (B, 1, D) of each part; activated: the condition (B, D) after its SiLU."""
        return self.adaLN_modulation[1](activated)[:, None].chunk(self.num_modulations, dim=-1)

    def finish(self, tokens: Tensor, found: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Return the tokens (B, N, D) after the block.

        Args:
            tokens: before the block.
            found: by the queries of the joint attention.
            modulations: of this stream.
        """
        assert self.mlp is not None
        after = torch.addcmul(tokens, modulations[ATTENTION][2], self.attn.project(found))
        if self.attn2 is not None:
            shift, scale, gate = modulations[SECOND]
            own = attend(*self.attn2.split(modulated(tokens, shift, scale)))
            after = torch.addcmul(after, gate, self.attn2.project(own))
        shift, scale, gate = modulations[MLP]
        return torch.addcmul(after, gate, self.mlp(modulated(after, shift, scale)))


class JointBlock(nn.Module):
    """Text and picture, each with layers of its own, in one attention."""

    def __init__(self, shape: MmditShape, index: int) -> None:
        super().__init__()
        self.is_last = index == shape.depth - 1
        self.context_block = Stream(shape, is_read_only=self.is_last)
        self.x_block = Stream(shape, has_second=index < shape.num_dual)

    def forward(self, x: Tensor, context: Tensor, activated: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the picture's tokens (B, N, D) and the text's (B, M, D), which are None after the last block."""
        of_context, of_x = self.context_block.modulations(activated), self.x_block.modulations(activated)
        texts = self.context_block.attn.split(modulated(context, *of_context[:2]))
        pictures = self.x_block.attn.split(modulated(x, *of_x[:2]))
        joint = [torch.cat(pair, dim=1) for pair in zip(texts, pictures, strict=True)]
        found_by_text, found_by_x = attend(*joint).split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.finish(x, found_by_x, of_x)
        return x, None if self.is_last else self.context_block.finish(context, found_by_text, of_context)


class FinalLayer(nn.Module):
    """The picture's tokens become patches of the output."""

    def __init__(self, shape: MmditShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 2 * shape.width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """Return patches (B, N, patch * patch * channels) of tokens (B, N, D)."""
        shift, scale = self.adaLN_modulation[1](activated)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


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
