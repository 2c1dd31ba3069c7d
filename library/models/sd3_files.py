"""Where the parts of an SD3 model are: in one file, in files of their own, or in a diffusers folder."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.errors import CheckpointError
from library.models import folders, mmdit, recognition, sd3_text, shards
from library.models.checkpoint import Prefixed, TensorSource, has_prefix, open_tensors
from library.models.family import Absent
from library.models.layout import mmdit as layout
from library.models.layout.mmdit import MmditShape
from library.models.mmdit import Mmdit
from library.models.scaled import unscaled
from library.models.sd3_text import ENCODERS

log = logging.getLogger(__name__)

CLIP = ENCODERS[:2]
TITLES = dict(zip(ENCODERS, ("CLIP-L", "CLIP-G", "T5-XXL"), strict=True))
EMBEDDED = {name: f"text_encoders.{name}.transformer." for name in ENCODERS}  # in a single file
FOLDERS = dict(zip(ENCODERS, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True))
# a tensor that shows where a text encoder's names begin
CLIP_SIGNS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
SIGNS = dict.fromkeys(CLIP, CLIP_SIGNS) | {"t5xxl": ("encoder.block.0.layer.0.SelfAttention.q.weight",)}


@dataclass(frozen=True)
class Files:
    """What the options name."""

    checkpoint: str  # --pretrained_model_name_or_path
    texts: tuple[str | None, ...]  # --clip_l, --clip_g, --t5xxl: each wins over what the checkpoint holds
    is_mapped: bool = True  # into memory; otherwise read

    def shape(self) -> MmditShape:
        """Return the size and kind of the MMDiT, of which no weight is read. Raises: CheckpointError."""
        source, is_original = self.denoiser()
        shapes = source.shapes if is_original else mmdit.original_shapes(source)
        return mmdit.shape_of(shapes, str(source.path))

    def denoiser(self) -> tuple[TensorSource, bool]:
        """Return the MMDiT's tensors, and whether they have their original names. Raises: CheckpointError."""
        if not folders.is_file(self.checkpoint):
            folder = folders.model_folder(self.checkpoint, recognition.SD3) / "transformer"
            names = folders.DENOISER_FILES
            return shards.open_part(folder, names, "MMDiT", is_mapped=self.is_mapped), False
        file = self._open(self.checkpoint)
        return (Prefixed(file, layout.PREFIX) if has_prefix(file, f"{layout.PREFIX}joint_blocks.") else file), True

    def text(self, name: str) -> TensorSource | None:
        """Return a text encoder's tensors, None if it is nowhere.

        Args:
            name: of `ENCODERS`.

        Raises: CheckpointError: a file that is named does not hold it.
        """
        own = self.texts[ENCODERS.index(name)]
        if own is not None:
            file = open_tensors(Path(own), is_mapped=self.is_mapped)
            found = _below(file, EMBEDDED[name], name) or _below(file, "", name)
            if found is None:
                raise CheckpointError(f"--{name} {own}: holds no {TITLES[name]} text encoder. Give the file of one.")
            return found
        if folders.is_file(self.checkpoint):
            return _below(self._open(self.checkpoint), f"text_encoders.{name}.", name)
        folder = folders.model_folder(self.checkpoint, recognition.SD3) / FOLDERS[name]
        if not folder.is_dir():
            return None
        return shards.open_part(folder, folders.TEXT_ENCODER_WEIGHTS, TITLES[name], is_mapped=self.is_mapped)

    def _open(self, checkpoint: str) -> TensorSource:
        file = open_tensors(Path(checkpoint), is_mapped=self.is_mapped)
        recognition.check(file, recognition.SD3)
        return unscaled(file)


def _below(file: TensorSource, prefix: str, encoder: str) -> TensorSource | None:
    """Return a text encoder's tensors, whose names begin with prefix and perhaps more; None if there are none."""
    for sign in SIGNS[encoder]:
        for name in file.shapes:
            if name.startswith(prefix) and name.endswith(sign):
                return Prefixed(file, name.removesuffix(sign))
    return None


def load_denoiser(files: Files, dtype: torch.dtype) -> Mmdit:
    """Return the MMDiT on the CPU, frozen, in eval mode. Raises: CheckpointError."""
    source, is_original = files.denoiser()
    return mmdit.build(source, dtype) if is_original else mmdit.build_from_diffusers(source, dtype)


def load_text_encoders(
    files: Files, dtype: torch.dtype, t5_dtype: torch.dtype | None = None, which: Collection[str] = ENCODERS
) -> tuple[nn.Module, ...]:
    """Return CLIP-L, CLIP-G and T5 on the CPU, frozen, in eval mode; `Absent` for each that is not there.

    Args:
        files: where they are.
        dtype: of the weights in memory.
        t5_dtype: of T5's, where it differs.
        which: those that are wanted.

    Raises:
        CheckpointError: none is there, or one does not fit the MMDiT.
    """
    sources = {name: files.text(name) for name in ENCODERS}
    missing = [name for name, source in sources.items() if source is None]
    if len(missing) == len(ENCODERS):
        raise CheckpointError(
            f"{files.checkpoint}: holds no text encoder. Give their files with --clip_l, --clip_g and --t5xxl."
        )
    _check_widths(files, sources)
    for name in missing:
        if name in which:
            log.warning(
                "%s is not in %s, and --%s is not given: all that it would say of a caption is 0",
                TITLES[name], files.checkpoint, name,
            )  # fmt: skip
    made: list[nn.Module] = []
    for slot, (name, source) in enumerate(sources.items()):
        own_dtype = t5_dtype if name == "t5xxl" and t5_dtype is not None else dtype
        if source is None or name not in which:
            made.append(Absent())
        else:
            made.append(sd3_text.build(source, slot, own_dtype))
    return tuple(made)


def _check_widths(files: Files, sources: Mapping[str, TensorSource | None]) -> None:
    """Raise CheckpointError where the widths show that text encoders are not those of the MMDiT."""
    widths = {name: _width(source) for name, source in sources.items() if source is not None}
    shape = files.shape()
    t5_width = widths.get("t5xxl", shape.context_width)
    if t5_width != shape.context_width:
        raise CheckpointError(
            f"{files.checkpoint}: takes rows of text of width {shape.context_width}, and this T5's are {t5_width} "
            "wide. Give the model's own."
        )
    clips = [widths[name] for name in CLIP if name in widths]
    if sum(clips) > shape.pooled_width or (len(clips) == len(CLIP) and sum(clips) != shape.pooled_width):
        told = " and ".join(f"{TITLES[name]}'s {widths[name]}" for name in CLIP if name in widths)
        raise CheckpointError(
            f"{files.checkpoint}: takes pooled text of width {shape.pooled_width}, which {told} do not make up. "
            "Give the model's own."
        )
    if len(clips) == len(CLIP) and clips[0] > clips[1]:
        raise CheckpointError("--clip_l and --clip_g: the first is wider than the second. They seem to be swapped.")


def _width(source: TensorSource) -> int:
    names = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
    return next((shape[1] for name, shape in source.shapes.items() if name.endswith(names)), 0)


def text_fingerprints(files: Files) -> list[str]:
    """Return 32 hex digits for each text encoder, "none" for one that is not there, read without loading them."""
    sources = [files.text(name) for name in ENCODERS]
    return ["none" if source is None else sd3_text.fingerprint(source, slot) for slot, source in enumerate(sources)]


def open_vae(checkpoint: str, vae_path: str | None, is_mapped: bool) -> TensorSource:
    """Return the tensors of --vae, or else of the checkpoint, which its VAE is among. Raises: CheckpointError."""
    return open_tensors(folders.vae_file(vae_path or checkpoint), is_mapped=is_mapped)
