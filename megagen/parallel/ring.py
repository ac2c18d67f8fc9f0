"""Ring attention: key/value shards travel round the ranks while each keeps its queries.

Online softmax (Milakov and Gimelshein 2018) in fp32: with running maximum m, sum l and output o, a
shard with scores s gives ``m' = max(m, max s)``, ``p = exp(s - m')``,
``l' = l exp(m - m') + sum p``, ``o' = o exp(m - m') + p v``; the result is ``o / l`` and
``lse = m + log l``. Backward (Dao 2023, FlashAttention-2): ``p = exp(s - lse)``,
``ds = p (do v^T - sum(do o))``; dk and dv travel with their shard and are home after a full round.
Queries go in blocks, so scores take bounded memory.
Legend: S tokens, B batch, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MAX_SCORES = 2**24
"""Numbers in one block of scores (64 MiB in fp32)."""


class _Shift:
    """Tensors on their way to the next rank; ``wait`` gives those of the rank before."""

    def __init__(self, tensors: list[Tensor], group: ProcessGroup) -> None:
        size, rank = group.size(), group.rank()
        to = dist.get_global_rank(group, (rank + 1) % size)
        source = dist.get_global_rank(group, (rank - 1) % size)
        self._sent = [t.contiguous() for t in tensors]  # kept alive until they have arrived
        self._received = [torch.empty_like(t) for t in self._sent]
        send = [dist.P2POp(dist.isend, t, to, group) for t in self._sent]
        receive = [dist.P2POp(dist.irecv, t, source, group) for t in self._received]
        self._works = dist.batch_isend_irecv(send + receive)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._received


def _shards(group: ProcessGroup, shard_size: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """(step, valid keys) of the shards in the order in which they pass this rank."""
    for step in range(group.size()):
        owner = (group.rank() - step) % group.size()
        yield step, min(max(num_tokens - owner * shard_size, 0), shard_size)


def _blocks(q_BNSK: Tensor, num_keys: int) -> Iterator[slice]:
    batch, heads, tokens, _ = q_BNSK.shape
    size = max(1, MAX_SCORES // max(1, batch * heads * num_keys))
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def _heads_first(x_SBNK: Tensor) -> Tensor:
    return x_SBNK.permute(1, 2, 0, 3).float().contiguous()


def _tokens_first(x_BNSK: Tensor, like: Tensor) -> Tensor:
    return x_BNSK.permute(2, 0, 1, 3).to(like.dtype)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SBNK: Tensor,
        k_SBNK: Tensor,
        v_SBNK: Tensor,
        num_tokens: int,
        group: ProcessGroup,
    ) -> Tensor:
        scale = q_SBNK.shape[-1] ** -0.5
        q, k, v = (_heads_first(x) for x in (q_SBNK, k_SBNK, v_SBNK))
        out, total = torch.zeros_like(q), q.new_zeros(*q.shape[:-1], 1)
        top = torch.full_like(total, -torch.inf)
        for step, valid in _shards(group, k.shape[2], num_tokens):
            shift = _Shift([k, v], group) if step + 1 < group.size() else None
            for rows in _blocks(q, valid) if valid else ():
                scores = q[:, :, rows] @ k[:, :, :valid].mT * scale
                old = top[:, :, rows].clone()
                new = torch.maximum(old, scores.amax(-1, keepdim=True))
                weights = (scores - new).exp_()
                shrink = (old - new).exp_()
                total[:, :, rows] = total[:, :, rows] * shrink + weights.sum(-1, keepdim=True)
                out[:, :, rows] = out[:, :, rows] * shrink + weights @ v[:, :, :valid]
                top[:, :, rows] = new
            if shift is not None:
                k, v = shift.wait()
        out = out / total
        ctx.save_for_backward(q_SBNK, k_SBNK, v_SBNK, out, top + total.log())
        ctx.num_tokens, ctx.group, ctx.scale = num_tokens, group, scale
        return _tokens_first(out, q_SBNK)

    @staticmethod
    def backward(ctx: Any, grad_SBNK: Tensor) -> Any:
        q_SBNK, k_SBNK, v_SBNK, out, lse = ctx.saved_tensors
        q, k, v, grad = (_heads_first(x) for x in (q_SBNK, k_SBNK, v_SBNK, grad_SBNK))
        dot = (grad * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for step, valid in _shards(ctx.group, k.shape[2], ctx.num_tokens):
            # the last shift of k and v would bring home what is not needed any more
            shift = _Shift([k, v], ctx.group) if step + 1 < ctx.group.size() else None
            keys, values = k[:, :, :valid], v[:, :, :valid]
            for rows in _blocks(q, valid) if valid else ():
                weights = (q[:, :, rows] @ keys.mT * ctx.scale - lse[:, :, rows]).exp_()
                dv[:, :, :valid] += weights.mT @ grad[:, :, rows]
                ds = weights * (grad[:, :, rows] @ values.mT - dot[:, :, rows]) * ctx.scale
                dq[:, :, rows] += ds @ keys
                dk[:, :, :valid] += ds.mT @ q[:, :, rows]
            if shift is not None:
                k, v = shift.wait()
            dk, dv = _Shift([dk, dv], ctx.group).wait()
        return (
            _tokens_first(dq, q_SBNK),
            _tokens_first(dk, k_SBNK),
            _tokens_first(dv, v_SBNK),
            None,
            None,
        )


def ring_attention(
    q_SBNK: Tensor, k_SBNK: Tensor, v_SBNK: Tensor, num_tokens: int, group: ProcessGroup
) -> Tensor:
    """Attention of this rank's queries to the first ``num_tokens`` of all shards' keys.

    Args:
        q_SBNK: queries of this rank's shard.
        k_SBNK: keys of the same tokens; shards have one size, padding is at the end of the last.
        v_SBNK: values.
        num_tokens: tokens before padding, over all shards, at least 1.
        group: the ranks of the ring in token order.
    """
    return _Ring.apply(q_SBNK, k_SBNK, v_SBNK, num_tokens, group)
