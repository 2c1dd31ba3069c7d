"""T5's tokenizer: captions to rows of token ids."""

from __future__ import annotations

import functools
import hashlib
import lzma
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.whole_file import whole_file

PAD, EOS = 0, 1
NAME = "google_t5-v1_1-xxl"  # of its folder in --tokenizer_cache_dir
FILE = "tokenizer.json"
SHIPPED = "tokenizers/t5_v1_1_tokenizer.json.xz"


def shipped_tokenizer() -> bytes:
    """Return T5 v1.1's vocabulary of 32,100 pieces and its rules, as a tokenizer.json (2.4 MB)."""
    return lzma.decompress(resources.files("library.models").joinpath(SHIPPED).read_bytes())


@functools.cache
def tokenizer(cache_dir: str | None) -> Any:
    """Return the `tokenizers.Tokenizer` of T5, which neither cuts nor pads.

    Args:
        cache_dir: folder of tokenizer folders, where the shipped one is kept if there is none yet; None for the
            shipped one.

    Raises:
        CheckpointError: it cannot be read, or the folder cannot be written.
    """
    from tokenizers import Tokenizer

    if cache_dir is None:
        return Tokenizer.from_buffer(shipped_tokenizer())
    folder = Path(cache_dir) / NAME
    if not (folder / FILE).is_file():
        _keep(folder)
    try:
        built = Tokenizer.from_buffer((folder / FILE).read_bytes())
    except Exception as error:  # of no narrower type, whatever `tokenizers` finds wrong with a file
        raise CheckpointError(
            f"{folder}: not a T5 tokenizer ({error}). Delete the folder to have it made anew."
        ) from error
    built.no_truncation()  # transformers saves how it was used last
    built.no_padding()
    return built


def _keep(folder: Path) -> None:
    """Write the shipped tokenizer to a folder that has none."""
    if (folder / "spiece.model").is_file():
        raise CheckpointError(
            f"{folder}: has a spiece.model but no {FILE}, which is what is read. Save the tokenizer there with "
            "transformers' T5TokenizerFast, or delete the folder to have the shipped one put there."
        )
    try:
        with whole_file(folder / FILE) as partial:
            partial.write_bytes(shipped_tokenizer())
    except OSError as error:
        raise CheckpointError(f"--tokenizer_cache_dir: {folder} cannot be written ({error.strerror}).") from None


def vocabulary_name(cache_dir: str | None) -> str:
    """Return what tells the tokenizer kept in cache_dir from others: "shipped", or 16 digits of its content.

    Raises:
        CheckpointError: see `tokenizer`.
    """
    if cache_dir is None:
        return "shipped"
    content = tokenizer(cache_dir).to_str()
    if content == tokenizer(None).to_str():
        return "shipped"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def tokenize(captions: Sequence[str], length: int, cache_dir: str | None) -> Tensor:
    """Return the captions' tokens, (B, length) int64: the text, EOS, then padding.

    Args:
        captions: spaces at their ends do not count, as in T5's own tokenizer.
        length: at least 1; what of a text does not fit before EOS is left off.
        cache_dir: --tokenizer_cache_dir.
    """
    encoded = tokenizer(cache_dir).encode_batch([caption.strip() for caption in captions], add_special_tokens=False)
    rows = [[*entry.ids[: length - 1], EOS] for entry in encoded]
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
