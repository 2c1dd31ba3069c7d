"""Where the weights that a LoRA adapts stand in a checkpoint: one table for each kind of model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from library.errors import CheckpointError
from library.models.checkpoint import Prefixed, TensorSource, has_prefix
from library.models.clip import OPENCLIP_LAYERS
from library.models.layout import clip as clip_layout
from library.models.layout import lora_names
from library.models.layout import unet as unet_layout

PROJECTIONS = (".proj_in", ".proj_out")  # Linear in some files and 1x1 convolutions in others
OPTIONAL = ".conv_shortcut"  # a resnet that keeps its width has none


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a checkpoint."""

    prefix: str  # of its tensors
    lora: str  # of its modules in LoRA files
    is_openclip: bool
    whole: int | None = None  # with so many layers the last is not used, and no LoRA adapts it


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint."""

    version: str  # ss_base_model_version
    title: str
    lora_family: str  # see `lora_names`
    text_encoders: tuple[TextEncoder, ...]
    needs_text: bool = False  # a file without the text encoders is incomplete


SD1 = Kind(
    "sd_v1",
    "a Stable Diffusion 1.x model",
    lora_names.SD,
    (TextEncoder(clip_layout.SD1_PREFIX, "lora_te_text_model_", is_openclip=False),),
)
SD2 = Kind(
    "sd_v2",
    "a Stable Diffusion 2.x model",
    lora_names.SD,
    (TextEncoder(clip_layout.SD2_PREFIX, "lora_te_text_model_", is_openclip=True, whole=OPENCLIP_LAYERS),),
)
SDXL = Kind(
    "sdxl_base_v1-0",
    "an SDXL model",
    lora_names.SDXL,
    (
        TextEncoder(clip_layout.SDXL_PREFIXES[0], "lora_te1_text_model_", is_openclip=False),
        TextEncoder(clip_layout.SDXL_PREFIXES[1], "lora_te2_text_model_", is_openclip=True),
    ),
    needs_text=True,
)
KINDS = {kind.version: kind for kind in (SD1, SD2, SDXL)}
SIGNS = (  # (a part of a tensor's name, what such a file is); the first that is there decides
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    (".lora_down.weight", "a LoRA file, where a whole model is needed"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("conditioner.embedders.", SDXL),
    (clip_layout.SD2_PREFIX, SD2),
    (clip_layout.SD1_PREFIX, SD1),
    (f"{unet_layout.PREFIX}label_emb.", SDXL),
)


@dataclass(frozen=True)
class Place:
    """A weight in the file: a whole tensor, or a third of one in which q, k and v lie above each other."""

    key: str
    shape: tuple[int, ...]  # (out, in) or (out, in, k, k), of the third if it is one
    kind: str  # "text_encoder", "attention" or "resnet"
    third: int | None = None
    is_projection: bool = False  # 4-D in LoRA files, whatever it is in the checkpoint

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of lora_down without its rank: (in,), or (in, k, k)."""
        return (*self.shape[1:], 1, 1) if self.is_projection and len(self.shape) == 2 else self.shape[1:]

    def part(self, tensor: Tensor) -> Tensor:
        """Return this weight of the tensor, a view."""
        if self.third is None:
            return tensor
        rows = tensor.shape[0] // 3
        return tensor[self.third * rows : (self.third + 1) * rows]


def places(file: TensorSource, kind: Kind, advice: Mapping[str, str] | None = None) -> dict[str, Place]:
    """Return every weight that a LoRA can adapt, by the module's name in LoRA files.

    Args:
        file: the checkpoint.
        kind: what it should be.
        advice: what to do where it is of another kind, by that kind's version.

    Raises: CheckpointError where it is of another kind, or incomplete.
    """
    _check(file, kind, advice or {})
    found: dict[str, Place] = {}
    for encoder in kind.text_encoders:
        found |= _text_places(file, encoder, is_needed=kind.needs_text)
    return found | dict(_unet_places(file, kind))


def _check(file: TensorSource, kind: Kind, advice: Mapping[str, str]) -> None:
    found = next((sign for part, sign in SIGNS if any(part in name for name in file.shapes)), None)
    if isinstance(found, str):
        raise CheckpointError(f"{file.path}: is {found}.")
    if not has_prefix(file, unet_layout.PREFIX):
        what = found.title if found else "a Stable Diffusion checkpoint"
        raise CheckpointError(
            f"{file.path}: holds no U-Net (no tensor starts with {unet_layout.PREFIX}). Give a whole file of {what}."
        )
    if found not in {kind, None}:
        raise CheckpointError(f"{file.path}: is {found.title}. {advice.get(found.version, f'Give {kind.title}.')}")


def _text_places(file: TensorSource, encoder: TextEncoder, *, is_needed: bool) -> dict[str, Place]:
    shapes = Prefixed(file, encoder.prefix).shapes
    nested = clip_layout.NESTED if any(name.startswith(clip_layout.NESTED) for name in shapes) else ""
    pattern = "transformer.resblocks.{}.mlp." if encoder.is_openclip else f"{nested}encoder.layers.{{}}.mlp."
    layers = 0
    while any(name.startswith(pattern.format(layers)) for name in shapes):
        layers += 1
    if is_needed and not layers:
        raise CheckpointError(
            f"{file.path}: holds no text encoder where one belongs (no tensor starts with "
            f"{encoder.prefix}{pattern.format(0)}). The file is incomplete."
        )
    if layers == encoder.whole:
        layers -= 1
    table = clip_layout.openclip_table(layers)
    found = {}
    for path in clip_layout.lora_paths(layers):
        key, third = f"{nested}{path}.weight", None
        if encoder.is_openclip:
            source = clip_layout.fused_source(f"{path}.weight")
            key, third = source if source else (str(table.to_original(f"{path}.weight")), None)
        if key not in shapes:
            raise _incomplete(file, encoder.prefix + key)
        shape = shapes[key] if third is None else (shapes[key][0] // 3, *shapes[key][1:])
        found[encoder.lora + path.replace(".", "_")] = Place(encoder.prefix + key, shape, "text_encoder", third)
    return found


def _unet_places(file: TensorSource, kind: Kind) -> Iterator[tuple[str, Place]]:
    shapes: Mapping[str, tuple[int, ...]] = Prefixed(file, unet_layout.PREFIX).shapes
    try:
        blocks = unet_layout.blocks_of(shapes)
    except KeyError as error:
        raise CheckpointError(f"{file.path}: the U-Net lacks {error}. The file is incomplete.") from None
    if kind.lora_family == lora_names.SDXL:
        for entry in unet_layout.original_lora_paths(blocks):
            key = f"{entry.original}.weight"
            if key in shapes:
                name = f"{lora_names.UNET}{entry.original.replace('.', '_')}"
                yield name, Place(unet_layout.PREFIX + key, shapes[key], entry.kind)
            elif not entry.path.endswith(OPTIONAL):
                raise _incomplete(file, unet_layout.PREFIX + key)
        return
    table = unet_layout.unet_table(blocks)
    for entry in unet_layout.lora_paths(layers=blocks.layers, levels=len(blocks.depths)):
        found = table.to_original(f"{entry.path}.weight")
        if found is not None and found in shapes:
            name = f"{lora_names.UNET}{entry.path.replace('.', '_')}"
            is_projection = entry.path.endswith(PROJECTIONS)
            yield name, Place(unet_layout.PREFIX + found, shapes[found], entry.kind, is_projection=is_projection)


def _incomplete(file: TensorSource, key: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: {key} is missing. The file is incomplete.")
