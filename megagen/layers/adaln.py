"""Adaptive LayerNorm: shift, scale and gate of a block from the timestep (DiT, arXiv 2212.09748).

Legend: S tokens on this rank, B batch, D hidden, n modulations. The timestep embedding has R rows:
1 (one timestep a sample), T (one a latent frame) or S (one a token); ``rows_S`` says which token
uses which row, so rows are never spread over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megagen.core import process
from megagen.layers.linear import mark_sequence_parallel


class ModulationTable(nn.Module):
    """The learned table ``[1, n, D]`` (fp32) that is added to the timestep's n rows of modulation.

    Args:
        num: n, 6 in a block, 2 in the head.
        size: D.
        sequence_parallel: it acts on token shards.
    """

    def __init__(self, num: int, size: int, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(1, num, size, dtype=torch.float32, device=process.device())
        )
        mark_sequence_parallel(self.parameters(), sequence_parallel)

    def forward(self, rows_RBnD: Tensor) -> tuple[Tensor, ...]:
        """n tensors ``[R, B, D]`` fp32 from ``[R, B, n, D]`` (or ``[R, B, 1, D]``) of any dtype."""
        return (self.weight + rows_RBnD.float()).unbind(2)


def token_rows(
    num_rows: int, positions: range, num_tokens: int, device: torch.device
) -> Tensor | None:
    """``rows_S`` of the tokens at ``positions``, int64; None where there is one row.

    Args:
        num_rows: R rows for ``num_tokens`` tokens, each for ``num_tokens / R`` in turn.
        positions: the tokens here; those past the end (padding) get the last row.
        num_tokens: tokens of the sample before padding.
        device: where to.
    """
    if num_rows == 1:
        return None
    index = torch.arange(positions.start, positions.stop, device=device)
    return index.div_(num_tokens // num_rows, rounding_mode="floor").clamp_(max=num_rows - 1)
