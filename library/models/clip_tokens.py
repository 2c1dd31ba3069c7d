"""CLIP's tokenizer: captions to windows of 77 token ids."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.models.prompt_weights import parse
from library.whole_file import whole_file

BOS, EOS = 49406, 49407  # <|startoftext|>, <|endoftext|>
WINDOW = 77
CONTENT = WINDOW - 2  # a window's own BOS and EOS
START_WORD, END_WORD = "<|startoftext|>", "<|endoftext|>"
# OpenAI CLIP's pattern: contractions, words, single digits, runs of anything else
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Kind:
    """One of the tokenizers that share CLIP's vocabulary."""

    name: str  # of its folder in --tokenizer_cache_dir
    pad_word: str  # a word of its own wherever it stands in a caption
    pad: int  # what fills a window after its EOS


CLIP_L = Kind("openai_clip-vit-large-patch14", END_WORD, EOS)
OPENCLIP_H = Kind("stabilityai_stable-diffusion-2", "!", 0)
OPENCLIP_G = Kind("laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", END_WORD, 0)  # "!" stays a word as any other


@dataclass(frozen=True)
class Vocabulary:
    """A byte-pair vocabulary."""

    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]


@functools.cache
def shipped_vocabulary() -> Vocabulary:
    """Return CLIP's vocabulary of 49,408 words: 256 bytes, the same ending a word, the merges, BOS and EOS."""
    packed = resources.files("library.models").joinpath("tokenizers/clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()[1:]  # the first names the version
    merges = tuple((left, right) for left, right in (line.split() for line in lines if line))
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    words += [START_WORD, END_WORD]
    return Vocabulary({word: index for index, word in enumerate(words)}, merges)


def _byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write merges.txt and vocab.json, as every version of transformers' CLIPTokenizer reads them.

    Where vocab.json is, both are whole: other processes may be reading.
    """
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary.merges)]
    with whole_file(folder / "merges.txt") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with whole_file(folder / "vocab.json") as partial:
        partial.write_text(json.dumps(dict(vocabulary.ids), ensure_ascii=False), encoding="utf-8")


def read_vocabulary(folder: Path) -> Vocabulary:
    """Return the vocabulary of a tokenizer folder: vocab.json with merges.txt, or tokenizer.json.

    Raises:
        CheckpointError: neither is there or readable.
    """
    try:
        if (folder / "vocab.json").is_file():
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines: list[Any] = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        else:
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            ids = model["vocab"]
            pairs = [merge.split() if isinstance(merge, str) else merge for merge in model["merges"]]
        return Vocabulary(ids, tuple((left, right) for left, right in pairs))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: not a CLIP tokenizer ({error}). Delete the folder to have it made anew."
        ) from error


def cached_vocabulary(cache_dir: str | None, name: str) -> Vocabulary:
    """Return the vocabulary kept in cache_dir/name, or the shipped one, which is then kept there.

    Raises:
        CheckpointError: it cannot be read, or the folder cannot be written.
    """
    if cache_dir is None:
        return shipped_vocabulary()
    folder = Path(cache_dir) / name
    if any((folder / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        return read_vocabulary(folder)
    try:
        write_vocabulary(folder, shipped_vocabulary())
    except OSError as error:
        raise CheckpointError(f"--tokenizer_cache_dir: {folder} cannot be written ({error.strerror}).") from None
    return shipped_vocabulary()


def vocabulary_name(cache_dir: str | None, name: str) -> str:
    """Return what tells the vocabulary kept in cache_dir/name from others: "shipped", or 16 digits of its content.

    Raises:
        CheckpointError: see `cached_vocabulary`.
    """
    vocabulary = cached_vocabulary(cache_dir, name)
    if vocabulary == shipped_vocabulary():
        return "shipped"
    content = json.dumps([dict(vocabulary.ids), vocabulary.merges], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


@functools.cache
def tokenizer(cache_dir: str | None, name: str, pad_word: str) -> Any:
    """Return the `tokenizers.Tokenizer` of CLIP: lower case, byte pairs, no BOS or EOS added.

    Args:
        cache_dir: folder of tokenizer folders, None for the shipped vocabulary.
        name: the tokenizer's folder in cache_dir.
        pad_word: with BOS and EOS a word of its own wherever it stands in a caption ("!" for OpenCLIP).
    """
    # built with `tokenizers` itself: transformers' CLIPTokenizer changed its arguments between versions 4 and 5
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary = cached_vocabulary(cache_dir, name)
    model = BPE(dict(vocabulary.ids), list(vocabulary.merges), end_of_word_suffix="</w>", unk_token=END_WORD)
    built = Tokenizer(model)
    built.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    words = dict.fromkeys((START_WORD, END_WORD, pad_word))
    built.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return built


def windows(ids: Sequence[int], num_windows: int, pad: int) -> list[list[int]]:
    """Return a caption's token ids as num_windows windows of 77: BOS, 75 of the text, EOS, then pad.

    Args:
        ids: the text without BOS and EOS; what does not fit is left off.
        num_windows: 1, 2 or 3.
        pad: EOS for SD 1.x, 0 for OpenCLIP.

    Returns: in a window that the text fills, the last token is EOS; after its end EOS stands once, then pad; a window
        without text is BOS, EOS, pad.
    """
    result = []
    for index in range(num_windows):
        tokens = [BOS, *ids[CONTENT * index : CONTENT * (index + 1)], EOS]
        result.append(tokens + [pad] * (WINDOW - len(tokens)))
    return result


def weight_windows(weights: Sequence[float], num_windows: int) -> list[list[float]]:
    """Return the weights of a caption's tokens as `windows` lays them out; BOS, EOS and pad weigh 1."""
    result = []
    for index in range(num_windows):
        content = [1.0, *weights[CONTENT * index : CONTENT * (index + 1)]]
        result.append(content + [1.0] * (WINDOW - len(content)))
    return result


def num_windows(max_token_length: int | None) -> int:
    """Return how many windows of 77 tokens a caption gets; None is the 75 tokens of one."""
    return (max_token_length or CONTENT) // CONTENT


def tokenize(
    captions: Sequence[str], kind: Kind, num_windows: int, *, has_weights: bool, cache_dir: str | None
) -> Tensor:
    """Return the captions' tokens, (B, windows, 77) int64.

    With weights (B, windows, 2, 77) float32: the tokens, which float32 holds exactly, and their weights.

    Args:
        captions: with weights read as `prompt_weights.parse` does.
        kind: which tokenizer.
        num_windows: 1, 2 or 3.
        has_weights: whether brackets in captions are weights.
        cache_dir: --tokenizer_cache_dir.
    """
    encode = tokenizer(cache_dir, kind.name, kind.pad_word).encode_batch
    if not has_weights:
        encoded = encode(list(captions), add_special_tokens=False)
        return torch.tensor([windows(entry.ids, num_windows, kind.pad) for entry in encoded])
    rows = []
    for caption in captions:
        pieces = parse(caption)
        encoded = encode([text for text, _ in pieces], add_special_tokens=False)
        ids = [token for entry in encoded for token in entry.ids]
        weights = [weight for entry, (_, weight) in zip(encoded, pieces, strict=True) for _ in range(len(entry.ids))]
        tokens = windows(ids, num_windows, kind.pad)
        factors = weight_windows(weights, num_windows)
        rows.append(torch.stack([torch.tensor(tokens, dtype=torch.float32), torch.tensor(factors)], dim=1))
    return torch.stack(rows)


def without_padding(tokens: Tensor) -> Tensor:
    """Return tokens (B, ..., 77) up to the end of the longest caption, its EOS included.

    Args:
        tokens: of one window, on the CPU; with weights (B, 1, 2, 77).
    """
    ids = tokens[:, :, 0] if tokens.dim() == 4 else tokens
    ends = (ids == EOS).int().argmax(dim=-1)  # the first of several: CLIP-L pads with it
    return tokens[..., : int(ends.max()) + 1]


def split_weights(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return tokens (..., 77) int64 and their weights, None without, of what `tokenize` returned."""
    if not tokens.is_floating_point():
        return tokens, None
    return tokens[..., 0, :].long(), tokens[..., 1, :]
