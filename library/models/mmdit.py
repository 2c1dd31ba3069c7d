"""The denoiser of SD3 and SD3.5: built from a file in the original layout or diffusers', written to the former."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import CheckpointError
from library.models.checkpoint import TensorSource, build_on_meta, load_onto, require
from library.models.layout import mmdit as layout
from library.models.layout.mmdit import HEAD_WIDTH, POSITIONS, MmditShape
from library.models.mmdit_blocks import FinalLayer, JointBlock, PatchEmbedder, VectorEmbedder
from library.models.mmdit_files import FromDiffusers
from library.models.mmdit_positions import Positions
from library.models.scaled import unscaled

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10000.0
PART = "MMDiT"
MOST_KINDS = 64  # of compiled blocks

RunBlock = Callable[..., Any]


class Swap(Protocol):
    """Keeps some of the blocks' weights elsewhere while they are not needed, see library/models/block_swap.py."""

    def enter(self, index: int) -> None:
        """Have a block's weights in place from here on."""

    def leave(self, index: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a block's outputs as they are."""


def timestep_features(timesteps: Tensor) -> Tensor:
    """Return (B, 256) of timesteps (B,) in [0, 1000], float32: cosines, then sines."""
    half = TIMESTEP_FEATURES // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(index * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Mmdit(nn.Module):
    """A multimodal diffusion transformer; its modules are named as in checkpoints."""

    def __init__(self, shape: MmditShape, table: Tensor) -> None:
        """Lay out the layers; table: of positions, (1, side * side, D)."""
        super().__init__()
        self.shape = shape
        self.positions = Positions(table, shape.patch)
        self.x_embedder = PatchEmbedder(shape)
        self.t_embedder = VectorEmbedder(TIMESTEP_FEATURES, shape.width)
        self.y_embedder = VectorEmbedder(shape.pooled_width, shape.width)
        self.context_embedder = nn.Linear(shape.context_width, shape.width)
        self.joint_blocks = nn.ModuleList(JointBlock(shape, index) for index in range(shape.depth))
        self.final_layer = FinalLayer(shape)
        self.swap: Swap | None = None
        self._run: RunBlock | None = None

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        crop_offset: tuple[float, float] | None = None,
        kept_tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (B, C, h, w).

        Args:
            noisy: latents (B, C, h, w).
            timesteps: (B,) in [0, 1000], of any dtype; not rounded to that of the weights.
            context: texts (B, M, context_width).
            pooled: texts (B, pooled_width).
            crop_offset: (top, left), each in [0, 1), of the window in the table of positions; None: the middle.
            kept_tokens: (B, K) int64, sorted: the tokens of the picture, counted row by row, that are there; the
                others are left out of all blocks, and the output there is 0. None: all are there.

        Raises:
            OptionError: the picture is larger than the table of positions, or does not divide into tokens.
        """
        height, width = noisy.shape[-2:]
        noisy, context, pooled = (self._fitted(each) for each in (noisy, context, pooled))
        patches = self.x_embedder(noisy)
        # the table may be of a finer format than the tokens: the sum is rounded, not the table
        x = (patches + self.positions.of(height, width, crop_offset, noisy.device)).to(patches.dtype)
        kept = None if kept_tokens is None else kept_tokens[..., None]
        if kept is not None:
            x = x.gather(1, kept.expand(-1, -1, x.shape[-1]))
        condition = self.t_embedder(self._fitted(timestep_features(timesteps))) + self.y_embedder(pooled)
        activated = nn.functional.silu(condition)  # every modulation begins with it
        x = self.final_layer(self._through_blocks(x, self.context_embedder(context), activated), activated)
        if kept is not None:
            x = x.new_zeros(*patches.shape[:2], x.shape[-1]).scatter(1, kept.expand_as(x), x)
        return self._picture(x, height, width)

    def _through_blocks(self, x: Tensor, context: Tensor | None, activated: Tensor) -> Tensor:
        """Return the picture's tokens after all blocks."""
        run = self._run if torch.is_grad_enabled() else None
        for index, block in enumerate(self.joint_blocks):
            if self.swap is not None:
                self.swap.enter(index)
            x, context = block(x, context, activated) if run is None else run(block, x, context, activated)
            if self.swap is not None:
                left, context = self.swap.leave(index, x, context)
                assert left is not None
                x = left
        return x

    def _fitted(self, features: Tensor) -> Tensor:
        """Return inputs in the dtype that the layers compute in, unless autocast sees to that."""
        if torch.is_autocast_enabled(features.device.type):
            return features
        assert self.context_embedder.bias is not None
        return features.to(self.context_embedder.bias.dtype)  # weights may be stored in float8, biases never are

    def _picture(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Return (B, C, h, w) of patches (B, N, patch * patch * C)."""
        side, channels = self.shape.patch, self.shape.channels
        grid = patches.view(-1, height // side, width // side, side, side, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)

    def enable_gradient_checkpointing(self, run: RunBlock | None = None) -> None:
        """Compute each joint block anew in the backward pass instead of keeping its activations.

        Args:
            run: called with a block and its inputs, returns its outputs; None: torch's own checkpointing.
        """
        self._run = run or _recomputed

    def compile_repeated_blocks(self, backend: str) -> None:
        """Compile each joint block in place; names of weights stay as they are."""
        from torch._dynamo import config

        # torch counts the blocks' four kinds, for a picture's first and its other sizes, with gradients and without,
        # as one function's, and computes without a compiler beyond eight
        limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
        setattr(config, limit, max(getattr(config, limit), MOST_KINDS))
        for block in self.joint_blocks:
            block.compile(backend=backend)

    def scale_positions(self, resolutions: Sequence[tuple[int, int]]) -> None:
        """Give pictures of each resolution, (width, height) in pixels, positions that span the same range."""
        self.positions.scale_to(resolutions)


def _recomputed(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(block.__call__, *inputs, use_reentrant=False)


def shape_of(shapes: Mapping[str, tuple[int, ...]], origin: str) -> MmditShape:
    """Return the sizes of the MMDiT that tensors make up.

    Args:
        shapes: by original name, without the prefix.
        origin: the file, for messages.

    Raises:
        CheckpointError: they are not an MMDiT's.
    """
    block = "joint_blocks.0.x_block"
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        _, num_positions, _ = shapes[POSITIONS]
        shape = MmditShape(
            depth=layout.depth_of(shapes),
            width=width,
            channels=channels,
            patch=patch,
            context_width=shapes["context_embedder.weight"][1],
            pooled_width=shapes["y_embedder.mlp.0.weight"][1],
            mlp_width=shapes[f"{block}.mlp.fc1.weight"][0],
            has_qk_norm=f"{block}.attn.ln_q.weight" in shapes,
            num_dual=_num_dual(shapes),
            position_side=math.isqrt(num_positions),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{origin}: the tensors do not have the structure of SD3's {PART} (stopped at {error}). "
            "The file is incomplete or holds another kind of model."
        ) from error
    if width % HEAD_WIDTH or shape.position_side**2 != num_positions:
        raise CheckpointError(
            f"{origin}: the {PART} is {width} wide with {num_positions} positions, expected a multiple of {HEAD_WIDTH} "
            "and a square number. The file is damaged or holds another kind of model."
        )
    return shape


def _num_dual(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many of the first blocks have a second attention."""
    count = 0
    while f"joint_blocks.{count}.x_block.attn2.qkv.weight" in shapes:
        count += 1
    return count


def build(file: TensorSource, dtype: torch.dtype) -> Mmdit:
    """Return the MMDiT with the file's weights, frozen, in eval mode, its sizes read from the tensors' shapes.

    Args:
        file: names start at "joint_blocks."; weights of any floating dtype, float8 with or without factors too.
        dtype: of the weights in memory; the table of positions keeps the file's.

    Raises:
        CheckpointError: tensors are missing, of a wrong shape, or of something that this model does not have.
    """
    return _built(unscaled(file), file, lambda name: (name,), dtype)


def build_from_diffusers(file: TensorSource, dtype: torch.dtype) -> Mmdit:
    """Return the MMDiT with the weights of the folder `transformer` of a diffusers model, as `build` does.

    Args:
        file: all shards of the folder as one.
        dtype: of the weights in memory; the table of positions keeps the file's.

    Raises:
        CheckpointError: tensors are missing, of a wrong shape, or of something that this model does not have.
    """
    ours = FromDiffusers(file)
    return _built(ours, file, ours.parts, dtype)


def original_shapes(file: TensorSource) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes that the tensors of a diffusers model's folder `transformer` have under original names."""
    return FromDiffusers(file).shapes


def _built(
    file: TensorSource, stored: TensorSource, stored_names: Callable[[str], Iterable[str]], dtype: torch.dtype
) -> Mmdit:
    """Return the model of a file's tensors.

    Args:
        file: under their original names.
        stored: under those they have in the file, by which missing ones are named.
        stored_names: of an original name.
        dtype: of the weights in memory.
    """
    shape = shape_of(file.shapes, str(file.path))
    table = file.read(POSITIONS)
    table = table.half() if table.element_size() == 1 else table  # float8, which cannot be added up; half holds it
    module = build_on_meta(lambda: Mmdit(shape, table))
    assert isinstance(module, Mmdit)
    names = list(module.state_dict())
    require(stored, [each for name in (*names, POSITIONS) for each in stored_names(name)], PART)
    _refuse_unknown(file, {*names, POSITIONS})
    load_onto(module, ((name, file.read(name)) for name in names), dtype, str(file.path), PART)
    return module


def _refuse_unknown(file: TensorSource, names: Collection[str]) -> None:
    """Check that the file's blocks have nothing that ours lack: the model would compute something else without it."""
    unknown = [name for name in file.shapes if name.startswith("joint_blocks.") and name not in names]
    if unknown:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} tensors of the {PART}'s blocks are not known (first: {unknown[0]}). The "
            "file is quantised, incomplete or another kind of model; fetch a float16, bfloat16 or plain float8 version."
        )


def original_tensors(denoiser: Mmdit, prefix: str = layout.PREFIX) -> dict[str, Tensor]:
    """Return the weights under their names in a full checkpoint."""
    tensors = {POSITIONS: denoiser.positions.table, **denoiser.state_dict()}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
