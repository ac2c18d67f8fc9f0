"""Self-attention over tokens that are sharded contiguously over context-parallel ranks.

``a2a`` (Jacobs et al. 2023, DeepSpeed Ulysses): tokens are exchanged for heads, attention is dense.
``all_gather``: keys and values are gathered, each rank attends with its own queries.
``p2p`` (Liu et al. 2023, Ring Attention): key/value shards travel round the ranks, see ``ring.py``.
``a2a+p2p``: Ulysses within ``a2a_group``, a ring over ``ring_group``.

Tokens are padded at the end to equal shards; padding is dropped from the keys, so no mask is needed
and any token count is exact. Legend: S tokens, B batch, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megagen.parallel.comm import all_to_all, gather_keys
from megagen.parallel.dims import CPCommType
from megagen.parallel.ring import ring_attention

Attend = Callable[..., Tensor]
"""Whole queries, keys, values and what else travels with the queries -> output."""


def context_attention(
    q_SBNK: Tensor,
    k_SBNK: Tensor,
    v_SBNK: Tensor,
    *,
    num_tokens: int,
    group_cp: ProcessGroup,
    comm_type: CPCommType,
    a2a_group: ProcessGroup | None = None,
    ring_group: ProcessGroup | None = None,
    attend: Attend,
    gate_SBNK: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's tokens to all tokens.

    Args:
        q_SBNK: queries of this rank's shard ``[S / cp, B, N, K]``, with RoPE applied.
        k_SBNK: keys of the same tokens.
        v_SBNK: values of the same tokens.
        num_tokens: tokens before padding, over all shards.
        group_cp: the ranks that hold the shards, in token order.
        comm_type: how they meet.
        a2a_group: for ``a2a+p2p``: consecutive ranks of ``group_cp`` that exchange heads.
        ring_group: for ``a2a+p2p``: the ranks with this rank's place in each ``a2a_group``.
        attend: attention of whole tensors, (q, k, v) -> o, each ``[S, B, N, K]``; with a gate
            (q, k, v, gate) -> o.
        gate_SBNK: of the queries' tokens; goes where they go. For one rank and for ``a2a``.

    Returns:
        ``[S / cp, B, N, K]``. Rows of padding tokens are finite and otherwise meaningless.
    """
    given = [q_SBNK, k_SBNK, v_SBNK, *([] if gate_SBNK is None else [gate_SBNK])]
    if group_cp.size() == 1:
        return attend_to_valid(given, num_tokens, attend)
    if comm_type == "a2a":
        whole = to_heads(torch.stack(given), group_cp)
        return to_tokens(attend_to_valid(whole.unbind(), num_tokens, attend), group_cp)
    assert gate_SBNK is None, "gated attention works on whole sequences: a2a"
    if comm_type == "all_gather":
        k, v = gather_keys(torch.stack([k_SBNK, v_SBNK], dim=1), group_cp)[:num_tokens].unbind(1)
        return attend(q_SBNK, k, v)
    if comm_type == "p2p":
        return ring_attention(q_SBNK, k_SBNK, v_SBNK, num_tokens, group_cp)
    assert a2a_group is not None and ring_group is not None, "a2a+p2p needs both groups"
    q, k, v = to_heads(torch.stack([q_SBNK, k_SBNK, v_SBNK]), a2a_group)
    return to_tokens(ring_attention(q, k, v, num_tokens, ring_group), a2a_group)


def attend_to_valid(given: Sequence[Tensor], num_tokens: int, attend: Attend) -> Tensor:
    """``attend`` on the first ``num_tokens`` of whole tensors; zeros in the padding rows."""
    padding = given[0].shape[0] - num_tokens
    if padding == 0:
        return attend(*given)
    out = attend(*(x[:num_tokens] for x in given))
    return functional.pad(out, (0, 0, 0, 0, 0, 0, 0, padding))


def to_heads(x_XSBNK: Tensor, group: ProcessGroup) -> Tensor:
    """Several tensors with this rank's tokens and all heads -> all tokens and this rank's heads.

    ``[X, S / n, B, N, K] -> [X, S, B, N / n, K]``.
    """
    num_ranks = group.size()
    if num_ranks == 1:
        return x_XSBNK
    num_tensors, tokens, batch, heads, head_dim = x_XSBNK.shape
    x = x_XSBNK.view(num_tensors, tokens, batch, num_ranks, heads // num_ranks, head_dim)
    x = all_to_all(x.permute(3, 0, 1, 2, 4, 5).contiguous(), group)
    return x.transpose(0, 1).reshape(
        num_tensors, num_ranks * tokens, batch, heads // num_ranks, head_dim
    )


def to_tokens(x_SBNK: Tensor, group: ProcessGroup) -> Tensor:
    """All tokens and this rank's heads -> this rank's tokens and all heads."""
    num_ranks = group.size()
    if num_ranks == 1:
        return x_SBNK
    tokens, batch, heads, head_dim = x_SBNK.shape
    x = all_to_all(x_SBNK.reshape(num_ranks, tokens // num_ranks, batch, heads, head_dim), group)
    return x.permute(1, 2, 0, 3, 4).reshape(tokens // num_ranks, batch, num_ranks * heads, head_dim)
