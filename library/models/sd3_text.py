"""The text of SD3: what CLIP-L, CLIP-G and T5 make of a caption, and how the denoiser is given it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models import clip, clip_tokens, t5, t5_tokens
from library.models.checkpoint import TensorSource
from library.models.clip_tokens import WINDOW
from library.models.family import Absent
from library.models.scaled import unscaled

ENCODERS = ("clip_l", "clip_g", "t5xxl")
CLIP_TOKENIZERS = (clip_tokens.CLIP_L, clip_tokens.OPENCLIP_G)
ABSENT_T5_LENGTH = WINDOW  # rows of zeros where there is no T5, as sd-scripts has them


@dataclass(frozen=True)
class Sd3Text:
    """What the encoders make of captions; None where an encoder is missing, whose features are zeros by design."""

    clip_l: Tensor | None  # (B, 77, 768), of the last layer but one, not normed
    pooled_l: Tensor | None  # (B, 768), projected
    clip_g: Tensor | None  # (B, 77, 1280)
    pooled_g: Tensor | None  # (B, 1280)
    t5: Tensor | None  # (B, N, 4096)


def build(file: TensorSource, slot: int, dtype: torch.dtype) -> nn.Module:
    """Return a text encoder of a file in transformers' layout.

    Args:
        file: of this encoder alone, or a part of a larger one; also in float8, with scales and without.
        slot: its place in ENCODERS, which is what tells CLIP-L from CLIP-G: they compute differently.
        dtype: of the weights in memory.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape.
    """
    kind, file = ENCODERS[slot], unscaled(file)
    if kind == "t5xxl":
        return t5.build(file, dtype)
    is_l = kind == "clip_l"  # whose files often lack the projection
    activation = "quick_gelu" if is_l else "gelu"
    return clip.build(file, dtype, has_projection=True, activation=activation, pools_unprojected=is_l)


def fingerprint(file: TensorSource, slot: int) -> str:
    """Return 32 hex digits that identify a text encoder, see `build`. Raises: CheckpointError: it is none."""
    file = unscaled(file)
    return t5.fingerprint(file) if ENCODERS[slot] == "t5xxl" else clip.fingerprint(file)


def original_tensors(text_encoder: nn.Module, slot: int) -> dict[str, Tensor]:
    """Return a text encoder's weights under their names in a file of its own, as `build` reads them."""
    return t5.original_tensors(text_encoder) if ENCODERS[slot] == "t5xxl" else clip.separate_tensors(text_encoder)


def vocabulary_names(cache_dir: str | None) -> list[str]:
    """Return what tells the three tokenizers from others; see `clip_tokens.vocabulary_name`."""
    names = [clip_tokens.vocabulary_name(cache_dir, kind.name) for kind in CLIP_TOKENIZERS]
    return [*names, t5_tokens.vocabulary_name(cache_dir)]


def tokenize(captions: Sequence[str], t5_length: int, cache_dir: str | None) -> Tensor:
    """Return the captions' tokens, (B, 1, 77 + 77 + t5_length) int64: CLIP-L's, CLIP-G's and T5's, one window of each.

    Args:
        captions: what does not fit is left off.
        t5_length: --t5xxl_max_token_length.
        cache_dir: --tokenizer_cache_dir.
    """
    rows = [
        clip_tokens.tokenize(captions, kind, num_windows=1, has_weights=False, cache_dir=cache_dir)[:, 0]
        for kind in CLIP_TOKENIZERS
    ]
    return torch.cat([*rows, t5_tokens.tokenize(captions, t5_length, cache_dir)], dim=1).unsqueeze(1)


def encode(
    text_encoders: Sequence[nn.Module],
    tokens: Tensor,
    *,
    masks_clip: bool,
    masks_t5: bool,
    which: Collection[str] = ENCODERS,
) -> Sd3Text:
    """Return what the encoders make of tokens, on the tokens' device; differentiable in the encoders.

    Each encoder may be on a device of its own.

    Args:
        text_encoders: in the order of ENCODERS, `Absent` where one is missing.
        tokens: from `tokenize`.
        masks_clip: whether no token of CLIP looks at padding, --apply_lg_attn_mask. As tokens look only back, this
            changes nothing but what the padding itself becomes.
        masks_t5: whether no token of T5 looks at padding, --apply_t5_attn_mask.
        which: of ENCODERS, those that are run.
    """
    rows = tokens[:, 0].split([WINDOW, WINDOW, tokens.shape[-1] - 2 * WINDOW], dim=1)
    found: dict[str, Tensor | None] = {field.name: None for field in fields(Sd3Text)}
    for name, text_encoder, own in zip(ENCODERS, text_encoders, rows, strict=True):
        if name not in which or isinstance(text_encoder, Absent):
            continue
        own = own.to(next(text_encoder.parameters()).device)
        if name == "t5xxl":
            found["t5"] = t5.encode(text_encoder, own, own != t5_tokens.PAD if masks_t5 else None)
            continue
        states, last = clip.penultimate_states(text_encoder, own, clip.text_mask(own) if masks_clip else None)
        found[name], found[name.replace("clip", "pooled")] = states, clip.pooled_text(text_encoder, last, own)
    return Sd3Text(**{name: None if each is None else each.to(tokens.device) for name, each in found.items()})


def outputs_of(text: Sd3Text) -> dict[str, Tensor]:
    """Return what there is of a text by its names in the cache."""
    found = {field.name: getattr(text, field.name) for field in fields(Sd3Text)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def text_of(outputs: Mapping[str, Tensor]) -> Sd3Text:
    """Return what `outputs_of` gave as `context_of` takes it."""
    return Sd3Text(**{field.name: outputs.get(field.name) for field in fields(Sd3Text)})


def context_of(
    text: Sd3Text, context_width: int, pooled_width: int, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what the denoiser takes: context (B, 77 + N, context_width) and pooled text (B, pooled_width).

    The rows of CLIP-L and CLIP-G stand side by side, then zeros up to the width; T5's rows follow.

    Args:
        text: of at least one encoder; the features of others are zeros, 77 rows for T5's.
        context_width: of the denoiser's context.
        pooled_width: of its pooled text, which is as wide as CLIP-L's and CLIP-G's states together.
        dropped: (B, 3) bool on the text's device, of which samples CLIP-L's, CLIP-G's and T5's features are zeros;
            None: of none.
    """
    some = next(iter(outputs_of(text).values()))
    size = len(some)
    l_width = _width(text.clip_l, pooled_width - _width(text.clip_g, 0))
    g_width = pooled_width - l_width

    def part(tensor: Tensor | None, slot: int, *shape: int) -> Tensor:
        if tensor is None:
            return some.new_zeros(size, *shape)
        if dropped is None:
            return tensor
        return tensor.masked_fill(dropped[:, slot].view(-1, *(1,) * (tensor.dim() - 1)), 0.0)

    pooled = torch.cat([part(text.pooled_l, 0, l_width), part(text.pooled_g, 1, g_width)], dim=-1)
    states = torch.cat([part(text.clip_l, 0, WINDOW, l_width), part(text.clip_g, 1, WINDOW, g_width)], dim=-1)
    states = F.pad(states, (0, context_width - states.shape[-1]))
    return torch.cat([states, part(text.t5, 2, ABSENT_T5_LENGTH, context_width)], dim=1), pooled


def _width(tensor: Tensor | None, absent: int) -> int:
    return absent if tensor is None else tensor.shape[-1]
