"""Where the tokens of a picture stand: windows of a model's table of positions, or positions of any resolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from library.errors import OptionError

PIXELS = 8  # a latent cell's side
KEPT_WINDOWS = 8  # sizes of pictures whose positions stay on the device
SPAN = 16.0  # a scaled grid's coordinates over the side of its own resolution
MARGIN = 1.5  # a scaled grid's side, over that of its own resolution
MAX_PERIOD = 10000.0


class Positions:
    """The table of positions of a model, in main memory; what a picture needs of it goes to the device.

    The table of SD3.5 medium has 147456 rows, of which a picture of 1024 by 1024 pixels needs 4096.
    """

    def __init__(self, table: Tensor, patch: int) -> None:
        """Take the table (1, side * side, D) of any floating dtype; patch: latent cells a side of a token."""
        self.table, self.patch = table, patch
        self.side = math.isqrt(table.shape[1])
        self._grids: list[tuple[int, int]] = []  # (largest area, side), both in tokens
        self._windows: dict[tuple[object, ...], Tensor] = {}  # of the middle, by rows, columns and device
        self._axes: dict[tuple[object, ...], Tensor] = {}  # of grids, by side and device

    def scale_to(self, resolutions: Sequence[tuple[int, int]]) -> None:
        """Use a grid of its own for pictures of about each resolution from here on, instead of the table.

        Args:
            resolutions: (width, height) in pixels; at least one.
        """
        cells = {round(math.sqrt(width * height)) // PIXELS for width, height in resolutions}
        sides = sorted({each // self.patch for each in cells})
        areas = [(one * one + other * other) // 2 for one, other in itertools.pairwise(sides)]
        self._grids = list(zip([*areas, _grid_side(sides[-1]) ** 2], sides, strict=True))
        self._windows.clear()

    def of(self, height: int, width: int, offset: tuple[float, float] | None, device: torch.device) -> Tensor:
        """Return the positions (1, N, D) of a picture's tokens, row by row.

        Args:
            height: of the latent, in cells.
            width: likewise.
            offset: (top, left) of the window in the room that it has, each in [0, 1); None: the middle.
            device: where they are wanted.

        Raises:
            OptionError: the picture is larger than the table, or does not divide into tokens.
        """
        rows, columns = self._tokens(height, width)
        if offset is not None:
            return self._cut(rows, columns, offset, device)
        key = (rows, columns, device)
        if key not in self._windows:
            if len(self._windows) >= KEPT_WINDOWS:
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._cut(rows, columns, None, device)
        return self._windows[key]

    def _tokens(self, height: int, width: int) -> tuple[int, int]:
        """Return a picture's rows and columns of tokens."""
        cell, size = PIXELS * self.patch, f"a picture of {width * PIXELS}x{height * PIXELS} pixels"
        if height % self.patch or width % self.patch:
            raise OptionError(
                f"{size} does not divide into this model's tokens of {cell}x{cell} pixels. "
                f"Give a --resolution and --bucket_reso_steps that are multiples of {cell}."
            )
        rows, columns = height // self.patch, width // self.patch
        if max(rows, columns) > self.side and not self._grids:
            raise OptionError(
                f"{size} is larger than this model's table of positions, which ends at {self.side * cell} pixels a "
                "side. Lower --resolution or --max_bucket_reso, or give --enable_scaled_pos_embed."
            )
        return rows, columns

    def _cut(self, rows: int, columns: int, offset: tuple[float, float] | None, device: torch.device) -> Tensor:
        """Return a window (1, rows * columns, D) on the device."""
        if self._grids:
            return self._cut_grid(rows, columns, offset, device)
        top, left = start(self.side, rows, offset, 0), start(self.side, columns, offset, 1)
        square = self.table.view(self.side, self.side, -1)
        window = square[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)
        if device.type == "cuda" and not window.is_cuda:  # pinned, the copy does not wait for the device
            window = window.pin_memory()
        return window.to(device, non_blocking=True)

    def _cut_grid(self, rows: int, columns: int, offset: tuple[float, float] | None, device: torch.device) -> Tensor:
        """Return a window of the grid for a picture of this size, float32."""
        patches = self._grid_for(rows, columns)
        side, width = _grid_side(patches), self.table.shape[-1]
        if (patches, device) not in self._axes:
            self._axes[patches, device] = scaled_axis(patches, width // 2).to(device)
        axis = self._axes[patches, device]
        top, left = start(side, rows, offset, 0), start(side, columns, offset, 1)
        down = axis[top : top + rows, None].expand(rows, columns, -1)
        across = axis[None, left : left + columns].expand(rows, columns, -1)
        return torch.cat([across, down], dim=-1).reshape(1, rows * columns, width)

    def _grid_for(self, rows: int, columns: int) -> int:
        """Return the side, in tokens, of the resolution whose grid fits a picture; of a new one if none does."""
        area = rows * columns
        patches = next((side for largest, side in self._grids if area <= largest), self._grids[-1][1])
        longest = max(rows, columns)
        return patches if longest <= _grid_side(patches) else longest


def start(side: int, length: int, offset: tuple[float, float] | None, axis: int) -> int:
    """Return where a window of this length begins on an axis of the table.

    Args:
        side: of the table.
        length: of the window, at most side.
        offset: (top, left), each in [0, 1); None: the middle.
        axis: 0 for top, 1 for left.
    """
    if offset is None:
        return (side - length) // 2
    return int(offset[axis] * (side - length + 1))


def scaled_axis(patches: int, width: int) -> Tensor:
    """Return the positions (1.5 * patches, width) along one axis, float32: sines, then cosines.

    The coordinate runs from 0 to 16 over the middle `patches` of them, at any resolution.

    Args:
        patches: tokens a side at the resolution that the axis is for.
        width: of a position along one axis; even.
    """
    side = _grid_side(patches)
    index = torch.arange(side, dtype=torch.float64)
    coordinate = (index - (side - patches) / 2) * SPAN / patches
    frequencies = MAX_PERIOD ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = coordinate[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _grid_side(patches: int) -> int:
    return int(MARGIN * patches)
