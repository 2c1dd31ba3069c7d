"""What the tests of whole models that are written have in common."""

import functools
import warnings
from pathlib import Path

import torch

from library.models import sd, sdxl, whole_model
from library.models.family import Parts
from library.models.whole_model import Kept
from library.models.writing import WholeFamily
from tests.tiny_models import (
    tiny_sd15,
    tiny_sd15_folder,
    tiny_sd21,
    tiny_sd21_folder,
    tiny_sdxl,
    tiny_sdxl_folder,
)

FAMILIES = {
    "1": sd.Sd(),
    "1v": sd.Sd(v_parameterization=True),
    "2": sd.Sd(v2=True),
    "2v": sd.Sd(v2=True, v_parameterization=True),
    "xl": sdxl.Sdxl(),
}
FILES = {"1": tiny_sd15, "2": tiny_sd21, "x": tiny_sdxl}
FOLDERS = {"1": tiny_sd15_folder, "2": tiny_sd21_folder, "x": tiny_sdxl_folder}
TEXT = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."


def source(model: str, is_folder: bool = False) -> Path:
    return (FOLDERS if is_folder else FILES)[model[0]]()


def tensors_of(family: WholeFamily, parts: Parts) -> dict[str, torch.Tensor]:
    return sdxl.original_tensors(parts) if isinstance(family, sdxl.Sdxl) else sd.original_tensors(parts, family.v2)


@functools.cache
def trained(family: WholeFamily, checkpoint: Path) -> Parts:
    """Return the models of a checkpoint, every weight a little changed, as training does. Do not change them."""
    parts = family.load(str(checkpoint), None, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for module in (parts.denoiser, *parts.text_encoders):
        for parameter in module.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return parts


def save(
    family: WholeFamily,
    parts: Parts,
    kept: Kept,
    folder: Path,
    form: str,
    dtype: torch.dtype | None = None,
    place: tuple[int, int] = (7, 2),
) -> Path:
    """Return where the model was saved in a form."""
    path = folder / "saved"
    if form in whole_model.FOLDERS:
        path.mkdir()
    else:
        path = path.with_suffix(f".{form}")
    family.save_whole(parts, kept, path, form=form, dtype=dtype, metadata={"modelspec.title": "cat"}, place=place)
    return path


def loaded(family: WholeFamily, path: Path) -> dict[str, torch.Tensor]:
    return tensors_of(family, family.load(str(path), None, torch.float32))


def assert_same(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def pipeline_of(path: Path, config: Path | None = None):
    """Return diffusers' pipeline of a saved model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' and transformers' own
        import diffusers

        xl = (config or path) / "text_encoder_2"
        kind = diffusers.StableDiffusionXLPipeline if xl.is_dir() else diffusers.StableDiffusionPipeline
        if config is None:
            return kind.from_pretrained(str(path), local_files_only=True)
        return kind.from_single_file(str(path), config=str(config), local_files_only=True)
