"""Masks: where one comes from, how it is shrunk to latent size, and how it weighs a loss.

Reading a dataset needs this file without torch, so torch is imported only by the functions that need tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class MaskSource:
    """Where an image's mask comes from: a file, the image's own alpha channel, or nowhere (weight 1)."""

    kind: Literal["file", "alpha", "none"]
    path: Path | None = None  # the mask file; only for kind "file"
