"""What a family provides whose whole models are trained, and how they are saved in every form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from library.models import diffusers_folder, whole_model
from library.models.diffusers_folder import FolderKind
from library.models.family import Parts
from library.models.whole_model import Kept, Pieces


@runtime_checkable
class WholeFamily(Protocol):
    """A family whose whole models can be saved."""

    @property
    def folder_kind(self) -> FolderKind:
        """What the family's diffusers folders hold besides weights, where the source was a single file."""

    def kept(self, checkpoint: str) -> Kept:
        """Return what the model's source holds besides the weights, for `save_whole`; the source is not read again.

        Raises:
            CheckpointError: as `load` does.
        """

    def whole_pieces(self, parts: Parts, kept: Kept) -> Pieces:
        """Return what each tensor of a single file is joined of, those aside that `kept` has and the models lack."""

    def save_whole(
        self,
        parts: Parts,
        kept: Kept,
        path: Path,
        *,
        form: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        place: tuple[int, int],
    ) -> None:
        """Write the whole model; see `Written`."""


class Written:
    """The one way in which whole models are saved, whatever their family."""

    def save_whole(
        self: WholeFamily,
        parts: Parts,
        kept: Kept,
        path: Path,
        *,
        form: str,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        place: tuple[int, int],
    ) -> None:
        """Write the whole model, as it is now; half a file or folder is left where this fails.

        Args:
            parts: with all text encoders and the VAE.
            kept: from `kept`.
            path: of the file or, for whole_model.FOLDERS, of an empty folder.
            form: one of whole_model.FORMS.
            dtype: of the weights in the file; None: as in memory.
            metadata: of the header of a single .safetensors file.
            place: (steps, epochs) of this training, for a .ckpt.

        Raises: OSError.
        """
        if form in whole_model.FOLDERS:
            diffusers_folder.write(path, parts, kept, self.folder_kind, form=form, dtype=dtype)
        else:
            pieces = self.whole_pieces(parts, kept)
            whole_model.write_file(path, pieces, kept, form=form, dtype=dtype, metadata=metadata, place=place)
