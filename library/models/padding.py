"""Padding that text encoders are not to look at."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(is_text: Tensor, dtype: torch.dtype, *, looks_back: bool) -> Tensor:
    """Return what a text encoder of transformers takes as its attention mask.

    Args:
        is_text: (B, N) bool, False for padding.
        dtype: of the encoder's weights.
        looks_back: whether a token sees none that follow it, as in CLIP.

    Returns: (B, 1, N, N) or (B, 1, 1, N) numbers to be added to the attention's scores. Before transformers 5, which
        knows no other, is_text itself as int64.
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return is_text.long()
    # of is_text itself transformers would ask whether all of it is True, and so wait for the device
    is_seen = is_text[:, None, None, :]
    if looks_back:
        is_seen = is_seen & is_text.new_ones(is_text.shape[1], is_text.shape[1]).tril()
    hidden = torch.zeros(is_seen.shape, dtype=dtype, device=is_text.device)
    return hidden.masked_fill(~is_seen, torch.finfo(dtype).min)
