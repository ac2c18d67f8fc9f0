"""Video sparse attention (VSA, arXiv 2505.13389) of whole tokens, as a layer calls it.

Each rank holds all tokens of its heads (after the all-to-all of context parallelism), so tiles are
made and chosen without communication. Tiles are made of runs of frames and cross no border between
runs, so that those of a causal network's earlier frames stay what they are as the video grows.

Legend: S tokens, B batch, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megagen.core.vsa import VSAOptions
from megagen.kernels import norm_rope_tile_pool
from megagen.kernels import vsa as kernels
from megagen.kernels.backend import serves_triton
from megagen.layers.norm import sum_squares_of_heads
from megagen.parallel.context import attend_to_valid


def frames_layout(
    options: VSAOptions, runs: Sequence[int], rows: int, columns: int, prefix: int = 0
) -> Any:
    """Tiles of runs of frames, as ``megagen.kernels.VSALayout``.

    Args:
        options: tile.
        runs: frames of each run.
        rows: tokens of a frame's column.
        columns: tokens of a frame's row.
        prefix: tokens before the video (text of a joint model).
    """
    grid = (sum(runs), rows, columns)
    tile: Any = options.tile
    if tile == "auto":
        tile = kernels.best_tile((max(runs), rows, columns))
    if all(run % tile[0] == 0 for run in runs[:-1]):
        return kernels.VSALayout(grid, tile, prefix)
    return kernels.VSALayout(grid, tile, prefix, runs=tuple(runs))


def sparse_attention(
    q_SBNK: Tensor,
    k_SBNK: Tensor,
    v_SBNK: Tensor,
    gate_SBNK: Tensor,
    *,
    options: VSAOptions,
    sparsity: float | None,
    layout: Any,
    kv_layout: Any = None,
) -> Tensor:
    """``O_fine + gate * O_coarse``; at sparsity 0 the fine part is dense attention.

    Args:
        q_SBNK: queries of all tokens of ``layout``.
        k_SBNK: keys of all tokens of ``kv_layout``.
        v_SBNK: values of the same.
        gate_SBNK: of the queries' tokens.
        options: kernels.
        sparsity: share of key tiles left out; None: what the schedule ends at.
        layout: of the queries.
        kv_layout: of the keys; None: the queries'.

    Returns:
        ``[S, B, N, K]``, S the queries'.
    """
    share = options.at(None) if sparsity is None else sparsity
    keys = kv_layout or layout
    q, k, v, gate = (x.transpose(0, 1) for x in (q_SBNK, k_SBNK, v_SBNK, gate_SBNK))
    found = kernels.vsa_attention(
        q,
        k,
        v,
        gate,
        layout=layout,
        topk=keys.topk(share),
        kv_layout=kv_layout,
        backend=options.kernels,
        deterministic=options.deterministic,
    )
    assert isinstance(found, Tensor)
    return found.transpose(0, 1)


def makes_blocks(
    like_SBNK: Tensor, options: VSAOptions, sparsity: float | None, layout: Any
) -> bool:
    """Whether ``normed_sparse_attention`` does in one pass what else are several.

    Args:
        like_SBNK: queries before their norm.
        options: kernels.
        sparsity: see ``sparse_attention``.
        layout: of queries and keys.
    """
    topk = layout.topk(options.at(None) if sparsity is None else sparsity)
    return serves_triton(like_SBNK) and kernels.wants_pooled(
        like_SBNK, layout, topk, options.kernels
    )


def normed_sparse_attention(
    q_SBNK: Tensor,
    k_SBNK: Tensor,
    v_SBNK: Tensor,
    gate_SBNK: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    tp_group: Any,
    options: VSAOptions,
    sparsity: float | None,
    layout: Any,
) -> Tensor:
    """``norm_heads`` of queries and keys and ``sparse_attention``, with blocks made by the norm.

    Args:
        q_SBNK: projected queries, ``[S, B, N, K]``; tokens after those of ``layout`` are padding.
        k_SBNK: keys of the same tokens.
        v_SBNK: values.
        gate_SBNK: of the coarse part.
        weights: of the norms of queries and keys.
        cos, sin: ``[S, K/2]``.
        eps, tp_group: as of ``norm_heads``.
        options, sparsity, layout: as of ``sparse_attention``.

    Returns:
        ``[S, B, N, K]``, zeros in the padding.
    """
    sums = sum_squares_of_heads([q_SBNK, k_SBNK], tp_group)
    share, count = options.at(None) if sparsity is None else sparsity, layout.num_tokens
    num_features = q_SBNK.shape[-2:].numel() * tp_group.size()

    def pooled(x: Tensor, weight: Tensor, total: Tensor | None) -> kernels.Pooled:
        made = norm_rope_tile_pool(
            x,
            weight,
            cos[:count],
            sin[:count],
            layout=layout,
            eps=eps,
            sum_squares_SB1=None if total is None else total[:count],
            num_features=num_features,
        )
        return kernels.Pooled(*made)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return kernels.vsa_attention_pooled(
            pooled(q, weights[0], sums[0]),
            pooled(k, weights[1], sums[1]),
            kernels.Pooled(*norm_rope_tile_pool(v, None, layout=layout)),
            gate.transpose(0, 1),
            layout=layout,
            topk=layout.topk(share),
            backend=options.kernels,
            deterministic=options.deterministic,
        ).transpose(0, 1)

    return attend_to_valid([q_SBNK, k_SBNK, v_SBNK, gate_SBNK], count, attend)


def scored_pairs(
    options: VSAOptions | None,
    sparsity: float | None,
    queries: Sequence[int],
    keys: Sequence[int],
    frame: tuple[int, int],
) -> float:
    """Pairs of a query and a key, tokens or tiles, that get a score in one head.

    Args:
        options: of sparse attention; None: it is dense.
        sparsity: see ``sparse_attention``.
        queries: frames of each run of the queries.
        keys: of the keys.
        frame: rows and columns of tokens.
    """
    size = frame[0] * frame[1]
    dense = float(sum(queries) * sum(keys) * size * size)
    if options is None:
        return dense
    share = options.at(None) if sparsity is None else sparsity
    query, key = (frames_layout(options, runs, *frame) for runs in (queries, keys))
    return dense * key.topk(share) / key.num_blocks + query.num_blocks * key.num_blocks
