"""The inputs of a row, the same for every arm, and the orders in which arms take them.

Legend: B batch (1), S tokens in raster order, H heads, D head dim, P slots (64 a block), n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.kernels import lists
from benchmarks.kernels.rows import HEAD_DIM, Row
from megagen.kernels.vsa import BlockIndex, block_mean, coarse_attention, tile

ORDERS = ("slots", "bhsd", "bshd")
"""``[B, H, P, D]`` by blocks, ``[B, H, S, D]`` and ``[B, S, H, D]`` in raster order."""
_CORRELATION = 8
"""Tokens along each axis over which smooth inputs stay alike."""


@dataclass
class Problem:
    """One row's inputs.

    Args:
        row: what they are of.
        mask: one of ``lists.KINDS``.
        index: the selected blocks.
        q: ``[1, S, H, D]``; so are ``k``, ``v``, ``gate`` and the output's gradient ``grad``.
    """

    row: Row
    mask: str
    index: BlockIndex
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    grad: Tensor
    _leaves: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.q.device

    @cached_property
    def sizes_n(self) -> Tensor:
        """Real tokens of each block."""
        return self.row.layout.tables(self.device).sizes_n

    @cached_property
    def every(self) -> BlockIndex:
        """Lists of all blocks."""
        return lists.every_block(self.row.layout, self.row.heads, self.device)

    def ordered(self, x_BSHD: Tensor, order: str) -> Tensor:
        """A contiguous copy in one of ``ORDERS``."""
        if order == "slots":
            return tile(x_BSHD, self.row.layout)
        return (x_BSHD.transpose(1, 2) if order == "bhsd" else x_BSHD).contiguous()

    def leaves(self, order: str, *, has_gate: bool = False) -> tuple[Tensor, ...]:
        """q, k, v and, if wanted, the gate in an order, to take gradients of; arms share them."""
        if order not in self._leaves:
            given = (self.q, self.k, self.v, self.gate)
            ordered = (self.ordered(x, order).detach() for x in given)
            self._leaves[order] = tuple(x.requires_grad_() for x in ordered)
        return self._leaves[order][: 4 if has_gate else 3]

    def head(self, x: Tensor, order: str, head: int) -> Tensor:
        """One head's tokens in raster order, ``[S, D]``."""
        if order == "slots":
            return x[0, head].index_select(0, self.row.layout.tables(x.device).raster_to_slot_S)
        return x[0, head] if order == "bhsd" else x[0, :, head]


def make(row: Row, mask: str, device: torch.device, dtype: torch.dtype) -> Problem:
    """The inputs of a row, always the same ones on a device.

    Args:
        row: the shape.
        mask: ``random`` | ``local`` | ``smooth``; only smooth inputs are alike among neighbours,
            and only their lists follow from them.
        device: where to make them.
        dtype: of everything but the lists.

    Raises:
        ValueError: no such mask.
    """
    if mask not in lists.KINDS:
        raise ValueError(f"mask must be one of {', '.join(lists.KINDS)}, found {mask!r}")
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, row.layout.num_tokens, row.heads, HEAD_DIM)
    q, k, v, gate, grad = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(5)
    )
    if mask == "smooth":
        field = smooth_field(row, generator)
        q, k = ((0.7 * x + 0.7 * field).to(dtype) for x in (q, k))
        index = _by_means(row, q, k, v)
    else:
        draw = lists.random_lists if mask == "random" else lists.local_lists
        index = draw(row.layout, row.heads, row.selected, generator)
    return Problem(row, mask, index, q, k, v, gate, grad)


def smooth_field(row: Row, generator: torch.Generator) -> Tensor:
    """Noise that changes slowly over the video, ``[1, S, H, D]`` of variance about 1."""
    coarse = [max(2, -(-g // _CORRELATION)) for g in row.grid]
    shape = (row.heads, HEAD_DIM, *coarse)
    low = torch.randn(shape, generator=generator, device=generator.device)
    heads = [
        interpolate(one[None], size=row.grid, mode="trilinear", align_corners=True)[0]
        for one in low
    ]
    field = torch.stack([h.flatten(1).T for h in heads], 1)[None]
    scaled: Tensor = field / field.std()
    return scaled


def _by_means(row: Row, q: Tensor, k: Tensor, v: Tensor) -> BlockIndex:
    sizes = row.layout.tables(q.device).sizes_n
    qm, km, vm = (block_mean(tile(x, row.layout), sizes) for x in (q, k, v))
    _, _, index = coarse_attention(qm, km, vm, sizes, topk=row.selected)
    return index
