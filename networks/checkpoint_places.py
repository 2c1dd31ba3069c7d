"""Where the weights that a LoRA adapts stand in a checkpoint of SD 1.x or 2.x."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from library.errors import CheckpointError
from library.models import recognition
from library.models.checkpoint import Prefixed, TensorSource, has_prefix
from library.models.clip import OPENCLIP_LAYERS
from library.models.layout import clip as clip_layout
from library.models.layout import unet as unet_layout

PROJECTIONS = (".proj_in", ".proj_out")  # Linear in some files and 1x1 convolutions in others; always 4-D in LoRA files


@dataclass(frozen=True)
class Place:
    """A weight in the file: a whole tensor, or a third of one in which q, k and v lie above each other."""

    key: str
    shape: tuple[int, ...]  # (out, in) or (out, in, k, k), of the third if it is one
    kind: str  # "text_encoder", "attention" or "resnet"
    third: int | None = None
    is_projection: bool = False

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


def places(file: TensorSource, v2: bool) -> dict[str, Place]:
    """Return every weight that a LoRA can adapt, by the module's name in LoRA files.

    Raises: CheckpointError where the file is no checkpoint of that version.
    """
    _check(file, v2)
    return {**dict(_text_places(file, v2)), **dict(_unet_places(file))}


def _check(file: TensorSource, v2: bool) -> None:
    for kind in recognition.KINDS:
        if kind != recognition.SD and any(part in name for name in file.shapes for part in kind.parts):
            raise CheckpointError(f"{file.path}: is {kind.model}. This command is for Stable Diffusion 1.x and 2.x.")
    if any(name.endswith(".lora_down.weight") for name in file.shapes):
        raise CheckpointError(f"{file.path}: is a LoRA file, where a whole model is needed.")
    if not has_prefix(file, unet_layout.PREFIX):
        raise CheckpointError(
            f"{file.path}: holds no U-Net (no tensor starts with {unet_layout.PREFIX}). "
            "Give a full Stable Diffusion checkpoint."
        )
    if has_prefix(file, clip_layout.SD2_PREFIX) and not v2:
        raise CheckpointError(f"{file.path}: is a Stable Diffusion 2.x model. Add --v2.")
    if has_prefix(file, clip_layout.SD1_PREFIX) and v2:
        raise CheckpointError(f"{file.path}: is a Stable Diffusion 1.x model. Leave out --v2.")


def _text_places(file: TensorSource, v2: bool) -> Iterator[tuple[str, Place]]:
    prefix = clip_layout.SD2_PREFIX if v2 else clip_layout.SD1_PREFIX
    shapes = Prefixed(file, prefix).shapes
    pattern = "transformer.resblocks.{}.mlp.c_fc.weight" if v2 else "{}encoder.layers.{{}}.mlp.fc1.weight"
    nested = (
        "" if v2 else next((n for n in (clip_layout.NESTED, "") if f"{n}encoder.layers.0.mlp.fc1.weight" in shapes), "")
    )
    pattern = pattern if v2 else pattern.format(nested)
    layers = 0
    while pattern.format(layers) in shapes:
        layers += 1
    if v2 and layers == OPENCLIP_LAYERS:
        layers -= 1  # the last one is there, but SD 2.x does not use its output
    table = clip_layout.openclip_table(layers)
    for path in clip_layout.lora_paths(layers):
        key, third = f"{nested}{path}.weight", None
        if v2:
            source = clip_layout.fused_source(f"{path}.weight")
            key, third = source if source else (str(table.to_original(f"{path}.weight")), None)
        if key in shapes:
            shape = shapes[key] if third is None else (shapes[key][0] // 3, *shapes[key][1:])
            yield f"lora_te_text_model_{path.replace('.', '_')}", Place(prefix + key, shape, "text_encoder", third)


def _unet_places(file: TensorSource) -> Iterator[tuple[str, Place]]:
    shapes: Mapping[str, tuple[int, ...]] = Prefixed(file, unet_layout.PREFIX).shapes
    try:
        blocks = unet_layout.blocks_of(shapes)
    except KeyError as error:
        raise CheckpointError(f"{file.path}: the U-Net lacks {error}. The file is incomplete.") from None
    table = unet_layout.unet_table(blocks)
    for entry in unet_layout.lora_paths(layers=blocks.layers, levels=len(blocks.depths)):
        key = table.to_original(f"{entry.path}.weight")
        if key is not None and key in shapes:
            is_projection = entry.path.endswith(PROJECTIONS)
            name = f"lora_unet_{entry.path.replace('.', '_')}"
            yield name, Place(unet_layout.PREFIX + key, shapes[key], entry.kind, is_projection=is_projection)
