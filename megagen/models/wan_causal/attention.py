"""Block-causal self-attention, block by block.

Each block's queries meet exactly the keys they may see: slices of the whole sequence's keys, the
cached ones before. No mask exists, so its memory and the masked half of the work do not either, and
any dense backend serves (a boolean mask ``[S, S]`` would rule flash kernels out; at 32,760 tokens
it takes 1 GiB). Sparse attention chooses among the tiles of those keys, which cross no border of
blocks: they are the same whether the keys come from the sequence or from the cache. Under ``a2a``
each rank has the whole sequence for its heads, under ``all_gather`` its own queries and all keys; a
ring would have to pass keys that most queries must not see.

Legend: S tokens, B batch, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megagen.layers.attention import SelfAttention
from megagen.layers.rope import RotaryTables, turn
from megagen.layers.tokens import TokenShard
from megagen.models.cache import KVCache
from megagen.models.wan_causal.window import BlockView, KeyRange
from megagen.parallel.context import Attend


@dataclass(frozen=True)
class CausalShard(TokenShard):
    """A rank's tokens, and what the blocks of all of them see.

    Args:
        views: of every block of the request.
        cache: of earlier frames.
        frame_tokens: tokens of a frame.
        positions: frames of the video, ``[first, last + 1)``, that the request's frames are; a
            teacher-forced request has each twice.
        rope: tables of the network.
    """

    views: tuple[BlockView, ...] = ()
    cache: KVCache = field(default_factory=KVCache)
    frame_tokens: int = 1
    positions: range = range(0)
    rope: RotaryTables | None = None


class CausalSelfAttention(SelfAttention):
    """``SelfAttention`` of a block-causal network.

    Args:
        layer: global number of the block.
        args, kwargs: of ``SelfAttention``.
    """

    def __init__(self, *args: Any, layer: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer = layer

    def _blocks_of_norm(self, q: Tensor, shard: TokenShard) -> None:
        """Never: blocks of frames choose among keys of several, and of the cache."""

    def _whole(self, shard: TokenShard) -> Attend:
        assert isinstance(shard, CausalShard)
        has_own_rows = self.comm_type == "all_gather" and shard.cp_size > 1
        rows = shard.context if has_own_rows else range(shard.num_tokens)

        def attend_for(view: BlockView) -> Attend:
            return self._between([len(view.queries)], view.key_runs, shard)

        return partial(
            attend_blocks, shard=shard, layer=self.layer, rows=rows, attend_for=attend_for
        )


def attend_blocks(
    q_SBNK: Tensor,
    k_SBNK: Tensor,
    v_SBNK: Tensor,
    gate_SBNK: Tensor | None = None,
    *,
    shard: CausalShard,
    layer: int,
    rows: range,
    attend_for: Callable[[BlockView], Attend],
) -> Tensor:
    """Each block's queries attend to what they see.

    Args:
        q_SBNK: queries of the request's tokens ``rows``; those past the end are padding.
        k_SBNK: keys of all tokens of the request, rotated to their frames.
        v_SBNK: values of all tokens of the request.
        gate_SBNK: of the queries, for sparse attention.
        shard: what blocks see, and the cached keys and values.
        layer: whose.
        rows: see ``q_SBNK``.
        attend_for: what attends from a block's queries to the keys that it sees.

    Returns:
        ``[len(rows), B, N, K]``; rows of padding are finite and otherwise meaningless.
    """
    if shard.cache.record is not None:
        # copies: views would keep the fused projection alive
        shard.cache.record[layer] = (k_SBNK.detach().clone(), v_SBNK.detach().clone())
    past = [block.layers[layer] for block in shard.cache.blocks]
    if past:
        k_SBNK = torch.cat([*(keys for keys, _ in past), k_SBNK])
        v_SBNK = torch.cat([*(values for _, values in past), v_SBNK])
    found, size = [], shard.frame_tokens
    for view in shard.views:
        first = max(view.queries.start * size, rows.start)
        last = min(view.queries.stop * size, rows.stop)
        if first < last:
            own = slice(first - rows.start, last - rows.start)
            keys = _seen(k_SBNK, view.keys, shard, is_rotated=True)
            gate = () if gate_SBNK is None else (gate_SBNK[own],)
            values = _seen(v_SBNK, view.keys, shard)
            found.append(attend_for(view)(q_SBNK[own], keys, values, *gate))
    num_missing = q_SBNK.size(0) - sum(part.size(0) for part in found)
    if num_missing:  # padding; through attention, so that every rank's backward takes part
        assert gate_SBNK is None, "padding is dropped before sparse attention"
        attend = attend_for(shard.views[0])
        found.append(attend(q_SBNK[-num_missing:], k_SBNK[:1], v_SBNK[:1]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _seen(
    x_SBNK: Tensor, ranges: tuple[KeyRange, ...], shard: CausalShard, *, is_rotated: bool = False
) -> Tensor:
    """The tokens of some frames of the timeline, keys turned on where their sink has moved."""
    parts, size = [], shard.frame_tokens
    for part in ranges:
        tokens = x_SBNK[part.frames.start * size : part.frames.stop * size]
        if is_rotated and part.shift:
            assert shard.rope is not None
            tokens = turn(tokens, *shard.rope.frame_turn(part.shift, tokens.device))
        parts.append(tokens)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
