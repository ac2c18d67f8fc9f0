"""Which tokens a rank holds.

The S tokens of a sample are padded at the end to a multiple of cp x (tp under sequence
parallelism) and cut contiguously: first over CP, then over TP. Tokens count from 0 in (frame, row,
column) order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenShard:
    """The part of ``num_tokens`` tokens on one rank.

    Args:
        num_tokens: tokens before padding.
        cp_size: context parallel ranks.
        cp_rank: own rank among them.
        sp_size: TP ranks that share the tokens outside attention and MLP; 1 without sequence
            parallel.
        sp_rank: own rank among them.
        grid: (frames, rows, columns) of the video's tokens; sparse attention makes tiles of it.
        prefix: tokens before the video (text of a joint model); with the grid all ``num_tokens``.
        sparsity: see ``Request``.
    """

    num_tokens: int
    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0
    grid: tuple[int, int, int] | None = None
    prefix: int = 0
    sparsity: float | None = None

    @property
    def padded(self) -> int:
        """Tokens after padding."""
        parts = self.cp_size * self.sp_size
        return -(-self.num_tokens // parts) * parts

    @property
    def context(self) -> range:
        """Positions seen inside attention on this CP rank (padding included)."""
        length = self.padded // self.cp_size
        return range(self.cp_rank * length, (self.cp_rank + 1) * length)

    @property
    def own(self) -> range:
        """Positions of the hidden states on this rank (padding included)."""
        length = self.padded // (self.cp_size * self.sp_size)
        start = self.context.start + self.sp_rank * length
        return range(start, start + length)
