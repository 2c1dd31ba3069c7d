"""CLIP text encoders: built from a file, run window by window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.models import checkpoint
from library.models.checkpoint import TensorSource, build_on_meta, load_onto, require
from library.models.clip_tokens import BOS, EOS
from library.models.layout import clip as layout
from library.models.padding import attention_mask

TOKEN_EMBEDDING, POSITION_EMBEDDING = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
OPENCLIP_LAYERS = 24  # OpenCLIP ViT-H as SD 2.x carries it whole; trainers write 23
PART = "text encoder"  # in messages
HEAD_WIDTH = 64  # of every CLIP text encoder that SD uses


def build(
    file: TensorSource,
    dtype: torch.dtype,
    config: Any = None,
    *,
    has_projection: bool = False,
    activation: str = "quick_gelu",
    pools_unprojected: bool = False,
) -> nn.Module:
    """Return a text encoder with the weights of a file in transformers' layout.

    Args:
        file: names start at "embeddings.", or at "text_model.embeddings.".
        dtype: of the weights in memory.
        config: transformers' CLIPTextConfig; None: CLIP-L's, with the size read from the tensors' shapes.
        has_projection: whether it also makes a pooled text.
        activation: in its MLPs, where there is no config: "quick_gelu" for CLIP-L, "gelu" for OpenCLIP's.
        pools_unprojected: whether a file may lack the projection of the pooled text, which is the identity then.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape.
    """
    nested = layout.NESTED if f"{layout.NESTED}{TOKEN_EMBEDDING}" in file.shapes else ""
    module = _empty(config or _config_of(file, nested, activation), has_projection)
    names = {
        name: name if name == layout.PROJECTION else nested + name.removeprefix(layout.NESTED)
        for name in module.state_dict()
    }
    given: list[tuple[str, Tensor]] = []
    if has_projection and pools_unprojected and layout.PROJECTION not in file.shapes:
        del names[layout.PROJECTION]
        given.append((layout.PROJECTION, torch.eye(module.state_dict()[layout.PROJECTION].shape[0])))
    require(file, names.values(), PART)
    tensors = ((name, file.read(stored)) for name, stored in names.items())
    load_onto(module, chain(tensors, given), dtype, str(file.path), PART)
    return module


def build_openclip(file: TensorSource, dtype: torch.dtype, *, has_projection: bool = False) -> nn.Module:
    """Return OpenCLIP's text encoder: SD 2.x's without its last layer, which it does not use, or whole.

    Args:
        file: names start at "token_embedding.".
        dtype: of the weights in memory.
        has_projection: whether it also makes a pooled text, for which its last layer is needed.

    Raises:
        CheckpointError: tensors are missing or of a wrong shape.
    """
    layers = _used_openclip_layers(file, has_projection)
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    projection = (layout.OPENCLIP_PROJECTION,) if has_projection else ()
    require(file, ("token_embedding.weight", "positional_embedding", first, *projection), PART)
    config = _config(
        vocabulary=file.shapes["token_embedding.weight"][0],
        positions=file.shapes["positional_embedding"][0],
        fc1=file.shapes[first],
        layers=layers,
        activation="gelu",
        projected=file.shapes[projection[0]][1] if projection else None,
    )
    module = _empty(config, has_projection)
    table = layout.openclip_table(layers)
    names = {name: name.removeprefix(layout.NESTED) for name in module.state_dict() if name != layout.PROJECTION}
    sources = {name: layout.fused_source(canonical) for name, canonical in names.items()}
    stored = {name: source[0] if source else table.to_original(names[name]) for name, source in sources.items()}
    require(file, (key for key in stored.values() if key), PART)

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, source in sources.items():
            key = stored[name]
            assert key is not None, name
            if source is None:
                yield name, file.read(key)
            else:
                third = file.shapes[key][0] // 3
                yield name, file.rows(key, source[1] * third, (source[1] + 1) * third)
        if has_projection:
            yield layout.PROJECTION, file.read(layout.OPENCLIP_PROJECTION).T.contiguous()

    load_onto(module, read(), dtype, str(file.path), PART)
    return module


def fingerprint(file: TensorSource) -> str:
    """Return 32 hex digits that identify a text encoder in either layout, read without loading it.

    transformers' layout has one fingerprint whichever version wrote the names. At most 8 rows of a tensor are read.

    Raises:
        CheckpointError: there is no text encoder.
    """
    names = {name.removeprefix(layout.NESTED): name for name in file.shapes if "position_ids" not in name}
    if not any("token_embedding" in name for name in names):
        require(file, (TOKEN_EMBEDDING,), PART)
    return checkpoint.fingerprint(file, names)


def names_today(file: TensorSource, prefix: str) -> dict[str, str]:
    """Return the names that `original_tensors` gives what an old SD 1.x file has without `text_model.`, {} for others.

    Args:
        file: names start as `build` wants them.
        prefix: of both names.
    """
    if TOKEN_EMBEDDING not in file.shapes:
        return {}
    return {f"{prefix}{name}": f"{prefix}{layout.NESTED}{name}" for name in file.shapes}


def _used_openclip_layers(file: TensorSource, has_projection: bool) -> int:
    """Return how many of the file's layers are used: SD 2.x leaves the last one out."""
    stored_layers = _count_layers(file, "transformer.resblocks.{}.mlp.c_fc.weight")
    return stored_layers - 1 if stored_layers == OPENCLIP_LAYERS and not has_projection else stored_layers


def _count_layers(file: TensorSource, pattern: str) -> int:
    """Return how many layers the file has, counted by one tensor's name."""
    layers = 0
    while pattern.format(layers) in file.shapes:
        layers += 1
    return layers


def _config_of(file: TensorSource, nested: str, activation: str) -> Any:
    """Return the configuration of a text encoder that fits the file's tensors, which are in transformers' layout."""
    tokens, positions = f"{nested}{TOKEN_EMBEDDING}", f"{nested}{POSITION_EMBEDDING}"
    pattern = f"{nested}encoder.layers.{{}}.mlp.fc1.weight"
    require(file, (tokens, positions, pattern.format(0)), PART)
    return _config(
        vocabulary=file.shapes[tokens][0],
        positions=file.shapes[positions][0],
        fc1=file.shapes[pattern.format(0)],
        layers=_count_layers(file, pattern),
        activation=activation,
        projected=file.shapes.get(layout.PROJECTION, (None,))[0],
    )


def _config(
    vocabulary: int,
    positions: int,
    fc1: tuple[int, ...],
    layers: int,
    activation: str,
    projected: int | None = None,
) -> Any:
    """Return a CLIPTextConfig; fc1 is the (inner width, width) of the first MLP, projected the pooled text's width."""
    from transformers import CLIPTextConfig

    inner_width, width = fc1
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=positions,
        hidden_act=activation,
        projection_dim=projected or width,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def _empty(config: Any, has_projection: bool) -> nn.Module:
    """Return a CLIPTextModel, or a CLIPTextModelWithProjection, on the meta device."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
    return build_on_meta(lambda: kind(config))


def original_tensors(text_encoder: nn.Module, openclip: bool, prefix: str | None = None) -> dict[str, Tensor]:
    """Return the text encoder's weights under their names in a full checkpoint; see `original_pieces`."""
    pieces = original_pieces(text_encoder, openclip, prefix)
    return {name: joined(own) for name, own in pieces.items()}


def joined(pieces: tuple[Tensor, ...]) -> Tensor:
    """Return what a tensor of `original_pieces` is; a copy only where it has several pieces."""
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def original_pieces(
    text_encoder: nn.Module, openclip: bool, prefix: str | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """Return what each tensor of a full checkpoint is joined of, along its first axis, without copying weights.

    Args:
        text_encoder: transformers' CLIPTextModel, or CLIPTextModelWithProjection for OpenCLIP's layout.
        openclip: OpenCLIP's layout, q, k and v fused, instead of transformers'.
        prefix: of the names; None: where SD 1.x has CLIP's and SD 2.x OpenCLIP's.
    """
    prefix = prefix or (layout.SD2_PREFIX if openclip else layout.SD1_PREFIX)
    canonical = _canonical_tensors(text_encoder)
    if not openclip:
        return {f"{prefix}{layout.NESTED}{name}": (tensor,) for name, tensor in canonical.items()}
    model: Any = inner(text_encoder)
    table = layout.openclip_table(len(model.encoder.layers))
    written: dict[str, tuple[Tensor, ...]] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in canonical.items():
        source = layout.fused_source(name)
        if source is not None:
            thirds.setdefault(prefix + source[0], {})[source[1]] = tensor
        elif name == layout.PROJECTION:
            written[f"{prefix}{layout.OPENCLIP_PROJECTION}"] = (tensor.T,)
        else:
            written[f"{prefix}{table.to_original(name)}"] = (tensor,)
    return written | {name: tuple(own[index] for index in range(len(own))) for name, own in thirds.items()}


def unused_tail(text_encoder: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Return stand-ins for what SD 2.x's text encoder has in a full checkpoint and does not use; {} at other sizes.

    Its last layer, which training drops, is a copy of the one before (as sd-scripts); the projection is the identity,
    and the scale OpenCLIP's own.
    """
    model: Any = inner(text_encoder)
    last = len(model.encoder.layers)
    if last != OPENCLIP_LAYERS - 1:
        return {}
    start = f"{layout.SD2_PREFIX}transformer.resblocks."
    before = f"{start}{last - 1}."
    pieces = original_pieces(text_encoder, openclip=True)
    copies = {f"{start}{last}.{name[len(before) :]}": own for name, own in pieces.items() if name.startswith(before)}
    width = model.config.hidden_size
    return copies | {
        f"{layout.SD2_PREFIX}{layout.OPENCLIP_PROJECTION}": (torch.eye(width),),
        f"{layout.SD2_PREFIX}{layout.LOGIT_SCALE}": (torch.tensor(layout.LOGIT_SCALE_START),),
    }


def weight_names(file: TensorSource, openclip: bool, *, has_projection: bool = False) -> set[str]:
    """Return the names of those tensors of a text encoder in a full checkpoint that are read and written anew.

    Args:
        file: names start as `build` or `build_openclip` wants them.
        openclip: it is in OpenCLIP's layout.
        has_projection: whether it also makes a pooled text.
    """
    if not openclip:
        return {name for name in file.shapes if name.removeprefix(layout.NESTED).startswith(layout.WEIGHTS)}
    layers = _used_openclip_layers(file, has_projection)
    table = layout.openclip_table(layers)
    fused = tuple(f"transformer.resblocks.{index}.attn.in_proj_" for index in range(layers))
    names = {name for name in file.shapes if table.to_library(name) is not None or name.startswith(fused)}
    return names | ({layout.OPENCLIP_PROJECTION} if has_projection else set())


def separate_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Return the text encoder's weights under their names in a file of its own, in transformers' layout."""
    canonical = _canonical_tensors(text_encoder)
    return {name if name == layout.PROJECTION else layout.NESTED + name: canonical[name] for name in canonical}


def _canonical_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Return the weights under the names of newer transformers."""
    canonical = {name.removeprefix(layout.NESTED): tensor for name, tensor in text_encoder.state_dict().items()}
    canonical.pop("embeddings.position_ids", None)  # a counter, which old transformers count among the weights
    return canonical


def join(states: Tensor, num_windows: int, weights: Tensor | None) -> Tensor:
    """Return hidden states (B * windows, 77, D) as (B, 75 * windows + 2, D), each token's times its weight.

    Args:
        states: each window was encoded alone.
        num_windows: of each caption.
        weights: (B, windows, 77), without renormalising; None: all 1.
    """
    states = states.unflatten(0, (-1, num_windows))
    if weights is not None:
        states = states * weights.to(states).unsqueeze(-1)
    return join_windows(states)


def join_windows(states: Tensor) -> Tensor:
    """Return hidden states (B, windows, 77, D) as one sequence (B, 75 * windows + 2, D).

    Kept are the first window's BOS, every window's 75, and the last window's last position.
    """
    middle = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], middle, states[:, -1, -1:]], dim=1)


def inner(text_encoder: nn.Module) -> nn.Module:
    """Return the module that has `encoder` and `final_layer_norm`: older transformers nest it one level deeper."""
    nested = getattr(text_encoder, "text_model", None)
    return nested if isinstance(nested, nn.Module) else text_encoder


def check_skip(text_encoder: nn.Module, clip_skip: int | None) -> None:
    """Raise OptionError if the text encoder has fewer layers than --clip_skip asks for."""
    model: Any = inner(text_encoder)
    layers = len(model.encoder.layers)
    if (clip_skip or 1) > layers:
        raise OptionError(f"--clip_skip {clip_skip}: the text encoder has {layers} layers. Give a number up to that.")


def hidden_states(text_encoder: nn.Module, tokens: Tensor, clip_skip: int | None) -> Tensor:
    """Return the normed hidden states (B, 77, D) of tokens (B, 77).

    Args:
        text_encoder: transformers' CLIPTextModel.
        tokens: int64.
        clip_skip: None or 1 for the last layer's output, N for the Nth layer from the end; the final layer norm
            follows either way.
    """
    if clip_skip is None or clip_skip == 1:
        return text_encoder(tokens).last_hidden_state
    outputs = text_encoder(tokens, output_hidden_states=True)
    model: Any = inner(text_encoder)
    layers = len(model.encoder.layers)
    # counted from the front: [0] is the embedding, [n] the output of layer n
    return model.final_layer_norm(outputs.hidden_states[layers + 1 - clip_skip])


def penultimate_states(text_encoder: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what the last layer but one makes of tokens (B, 77), not normed, and the last one's, normed.

    Args:
        text_encoder: transformers' CLIPTextModel or CLIPTextModelWithProjection.
        tokens: int64.
        mask: (B, 77) bool, False for padding, at which no token looks; None: each looks at all before it.
    Returns: both (B, 77, D).
    """
    model: Any = inner(text_encoder)
    if mask is not None:
        mask = attention_mask(mask, model.embeddings.token_embedding.weight.dtype, looks_back=True)
    outputs = model(tokens, attention_mask=mask, output_hidden_states=True)
    return outputs.hidden_states[len(model.encoder.layers) - 1], outputs.last_hidden_state


def text_mask(tokens: Tensor) -> Tensor:
    """Return True for each of tokens (B, 77) up to its row's first EOS, False for the padding that follows."""
    ends = (tokens == EOS).long()
    return ends.cumsum(dim=1) - ends == 0


def pooled_text(text_encoder: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the projected state (B, D) of each caption's first EOS.

    Args:
        text_encoder: transformers' CLIPTextModelWithProjection.
        states: (B, 77, D) of the last layer, normed.
        tokens: (B, 77) int64.
    """
    model: Any = text_encoder
    ends = (tokens == EOS).int().argmax(dim=1)
    projected: Tensor = model.text_projection(states[torch.arange(len(tokens), device=tokens.device), ends])
    return projected
