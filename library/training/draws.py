"""The seed of every draw made while training."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of parts, equal on every machine and in every Python run."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def seed_batch(seed: int, position: int) -> None:
    """Seed torch's generators for one micro-batch, in all processes alike.

    What is drawn for a batch then depends on (seed, its place in the run) alone: not on what ran before, so that
    previews, validation and a resumed run cannot shift it.
    """
    torch.manual_seed(seed_of(seed, position))


def seed_process(process_index: int) -> None:
    """Let torch's generators go on differently in each process, after what all of them draw alike: for dropout."""
    torch.manual_seed(seed_of(torch.initial_seed(), process_index))
