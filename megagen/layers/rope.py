"""Rotary position embedding over three axes (RoFormer, arXiv 2104.09864), by absolute position.

The head dimension K is cut into (frame, row, column) parts; a pair of neighbours (2i, 2i+1) is
turned by ``position * theta^(-2i/part)``. Tables are made in fp64 and rounded once to fp32.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor


class RotaryTables:
    """``cos`` and ``sin`` of the tokens a rank holds, kept for the last shapes seen.

    Args:
        head_dim: K, even.
        theta: base of the frequencies.
        parts: sizes of the (frame, row, column) parts of K, even, summing to K. Default: Wan's,
            row and column ``2 * (K // 6)``, the frame part the rest.
        keep: how many shapes to keep.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        parts: tuple[int, int, int] | None = None,
        keep: int = 8,
    ) -> None:
        spatial = 2 * (head_dim // 6)
        self.parts = parts or (head_dim - 2 * spatial, spatial, spatial)
        self.theta = theta
        self.keep = keep
        self._tables: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def tables(
        self, grid: tuple[int, int, int], positions: range, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin``, ``[len(positions), K/2]`` fp32.

        Args:
            grid: tokens along (frame, row, column).
            positions: tokens in (frame, row, column) order; those past the grid (padding) get some
                position of it.
            device: where to.
        """
        key = (grid, positions.start, positions.stop, device)
        if key not in self._tables:
            self._tables[key] = self._make(grid, positions, device)
            while len(self._tables) > self.keep:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def frame_turn(self, num_frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin``, ``[K/2]`` fp32, that move a rotated token on by so many frames."""
        angles = [torch.zeros(part // 2, dtype=torch.float64) for part in self.parts]
        exponent = torch.arange(0, self.parts[0], 2, dtype=torch.float64) / self.parts[0]
        angles[0] = num_frames / self.theta**exponent
        angle = torch.cat(angles)
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def _make(
        self, grid: tuple[int, int, int], positions: range, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        frames, rows, columns = grid
        index = torch.arange(positions.start, positions.stop) % (frames * rows * columns)
        coordinates = (index // (rows * columns), index // columns % rows, index % columns)
        angles = []
        for coordinate, part in zip(coordinates, self.parts, strict=True):
            exponent = torch.arange(0, part, 2, dtype=torch.float64) / part
            angles.append(torch.outer(coordinate.double(), 1.0 / self.theta**exponent))
        angle = torch.cat(angles, dim=1)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def turn(x_SBNK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every token turned by the same angles ``[K/2]``, in fp32, in the type of ``x``."""
    even, odd = x_SBNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_SBNK.dtype)
