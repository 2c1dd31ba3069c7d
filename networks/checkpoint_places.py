"""Where the weights that a LoRA adapts stand in a checkpoint: one table for each kind of model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from library.errors import CheckpointError
from library.models import mmdit
from library.models.checkpoint import Prefixed, TensorSource, has_prefix
from library.models.clip import OPENCLIP_LAYERS
from library.models.layout import clip as clip_layout
from library.models.layout import lora_names, mmdit_lora
from library.models.layout import mmdit as mmdit_layout
from library.models.layout import unet as unet_layout
from library.models.sd3_files import CLIP
from library.models.sd3_files import SIGNS as TEXT_SIGNS
from library.models.sd3_text import ENCODERS

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
# Its version is one of three, see `sd3_version`; its text encoders are in it or not, under names of several kinds.
SD3 = Kind("sd3", "a Stable Diffusion 3 model", lora_names.SD3, ())
KINDS = {kind.version: kind for kind in (SD1, SD2, SDXL, SD3)}
EMBEDDED = "text_encoders."  # in a single file, before the encoder's name
SD3_TEXT = {name: f"lora_te{index}_" for index, name in enumerate(ENCODERS, 1)}  # how names in its LoRA files start
SIGNS = (  # (a part of a tensor's name, what such a file is); the first that is there decides
    (".lora_down.weight", "a LoRA file, where a whole model is needed"),
    ("transformer_blocks.0.attn.add_q_proj.", "a part of a diffusers folder, where a single file is needed"),
    ("joint_blocks.", SD3),
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
    if kind is SD3:
        texts = [sd3_text_places(file, encoder, f"{EMBEDDED}{encoder}.") for encoder in ENCODERS]
        return {name: place for each in (*texts, dict(_mmdit_places(file))) for name, place in each.items()}
    found: dict[str, Place] = {}
    for encoder in kind.text_encoders:
        found |= _text_places(file, encoder, is_needed=kind.needs_text)
    return found | dict(_unet_places(file, kind))


def _check(file: TensorSource, kind: Kind, advice: Mapping[str, str]) -> None:
    found = next((sign for part, sign in SIGNS if any(part in name for name in file.shapes)), None)
    if isinstance(found, str):
        raise CheckpointError(f"{file.path}: is {found}.")
    if kind is SD3 and found is None:
        raise CheckpointError(
            f"{file.path}: holds no MMDiT (no tensor starts with {mmdit_layout.PREFIX}joint_blocks. or joint_blocks.). "
            "Give the file of an SD3 or SD3.5 model."
        )
    if found is not SD3 and not has_prefix(file, unet_layout.PREFIX):
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


def mmdit_tensors(file: TensorSource) -> tuple[str, TensorSource]:
    """Return the prefix of the MMDiT's tensors in an SD3 model's file, "" for none, and those tensors without it."""
    prefix = mmdit_layout.PREFIX if has_prefix(file, f"{mmdit_layout.PREFIX}joint_blocks.") else ""
    return prefix, Prefixed(file, prefix)


def sd3_version(file: TensorSource) -> str:
    """Return which of SD3's models a file is, as ss_base_model_version says it. Raises: CheckpointError."""
    return mmdit.shape_of(mmdit_tensors(file)[1].shapes, str(file.path)).name


def _mmdit_places(file: TensorSource) -> Iterator[tuple[str, Place]]:
    prefix, tensors = mmdit_tensors(file)
    depth = mmdit.shape_of(tensors.shapes, str(file.path)).depth
    for entry in mmdit_lora.lora_paths(depth):
        key = f"{entry.path}.weight"
        if key in tensors.shapes:
            yield (
                f"{lora_names.UNET}{entry.path.replace('.', '_')}",
                Place(prefix + key, tensors.shapes[key], entry.kind),
            )
        elif entry.path.endswith("attn.qkv") or entry.kind == mmdit_lora.EMBEDDING:
            raise _incomplete(file, prefix + key)


def sd3_text_places(file: TensorSource, encoder: str, start: str = "") -> dict[str, Place]:
    """Return the weights of one of SD3's text encoders that a LoRA can adapt, none where the file does not hold it.

    Args:
        file: a single file of the model, or the encoder's own.
        encoder: of ENCODERS.
        start: of the names of its tensors, as far as it is certain.

    Raises: CheckpointError where it is incomplete.
    """
    found = _text_prefix(file, encoder, start)
    if found is None:
        return {}
    prefix, nested = found
    shapes = Prefixed(file, prefix).shapes
    if encoder in CLIP:
        paths = clip_layout.lora_paths(mmdit_layout.depth_of(shapes, f"{nested}encoder.layers."))
        names = {f"text_model_{path.replace('.', '_')}": f"{nested}{path}.weight" for path in paths}
    else:
        paths = mmdit_lora.t5_lora_paths(mmdit_layout.depth_of(shapes, "encoder.block."))
        names = {path.replace(".", "_"): f"{path}.weight" for path in paths}
    for key in names.values():
        if key not in shapes:
            raise _incomplete(file, prefix + key)
    return {SD3_TEXT[encoder] + name: Place(prefix + key, shapes[key], "text_encoder") for name, key in names.items()}


def _text_prefix(file: TensorSource, encoder: str, start: str) -> tuple[str, str] | None:
    """Return what comes before an encoder's names, and the level that CLIP's may have beneath it."""
    for sign in TEXT_SIGNS[encoder]:
        for name in file.shapes:
            if name.startswith(start) and name.endswith(sign):
                nested = clip_layout.NESTED if sign.startswith(clip_layout.NESTED) else ""
                return name.removesuffix(sign), nested
    return None


def _incomplete(file: TensorSource, key: str) -> CheckpointError:
    return CheckpointError(f"{file.path}: {key} is missing. The file is incomplete.")
