"""The seed of every draw made while training."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of parts, equal on every machine and in every Python run."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def seed_batch(seed: int, position: int, process_index: int) -> None:
    """Seed torch's generators for one micro-batch.

    Noise, timesteps and dropout of a batch then depend on (seed, its place in the run, process) alone: not on what ran
    before, so that previews, validation and a resumed run cannot shift them.
    """
    torch.manual_seed(seed_of(seed, position, process_index))
