"""Video sparse attention in the extension ``megagen._cpu``: fp32 and bf16, fp32 in every sum.

Results are the same bits on any number of threads. Tensors are contiguous, but for tokens in raster
order, which may have any strides. The callers have checked shapes and types.

Legend: B batch, H heads, Q K query and key slots (64 a block), q k n blocks, D head dim, S tokens,
P slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megagen.kernels.backend import address, cpu, load_cpu, num_threads
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 8
"""Head dims are multiples of it: a vector register of the narrowest fast build."""
_HUGE_FROM = 1 << 22
"""Bytes from which huge pages can make a difference."""


def serves(q_BHQD: Tensor) -> str | None:
    """None where tensors like ``q`` are served, the reason in words where not."""
    module, reason = load_cpu()
    if module is None:
        return f"the extension cannot be loaded ({reason})"
    if q_BHQD.device.type != "cpu":
        return f"it computes on the CPU, not on {q_BHQD.device.type}"
    if q_BHQD.dtype not in _DTYPES:
        return f"it takes float32 and bfloat16, not {q_BHQD.dtype}"
    if q_BHQD.size(-1) % _LANES:
        return f"it takes head dims that are multiples of {_LANES}, not {q_BHQD.size(-1)}"
    return None


def fine_forward(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the listed blocks: output, and natural-log LSE in fp32."""
    out = _empty_like(q_BHQD)
    lse = q_BHQD.new_empty(q_BHQD.shape[:-1], dtype=torch.float32)
    sizes, threads = _sizes(q_BHQD, lists), _threads(q_BHQD)
    workspace = _empty([cpu().fine_forward_workspace(sizes, threads)])
    tokens = map(_slots, (q_BHQD, k_BHKD, v_BHKD, out))
    cpu().fine_forward(
        sizes, scale, _lists(lists), *tokens, *map(address, (lse, workspace)), threads
    )
    return out, lse


def fine_backward(
    do_BHQD: Tensor,
    dlse_BHQ: Tensor | None,
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    o_BHQD: Tensor,
    lse_BHQ: Tensor,
    lists: Lists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; zeros in empty slots and where nothing is attended to."""
    if lists.indptr is None or lists.rows is None:
        num_k = lists.kv_sizes.numel()
        indptr, rows = transpose_index(lists.idx_BHqM, lists.num_BHq, num_k)
        lists = dataclasses.replace(lists, indptr=indptr, rows=rows)
    dq, dk, dv = (_empty_like(x) for x in (q_BHQD, k_BHKD, v_BHKD))
    sizes, threads = _sizes(q_BHQD, lists), _threads(q_BHQD)
    floats = cpu().fine_backward_workspace(sizes, lists.idx_BHqM.size(-1), threads)
    workspace = _empty([floats])
    given = [_slots(x) for x in (do_BHQD, q_BHQD, k_BHKD, v_BHKD, o_BHQD)]
    wanted = [_slots(x) for x in (dq, dk, dv)]
    others = map(address, (lse_BHQ, dlse_BHQ, workspace))
    cpu().fine_backward(sizes, scale, _lists(lists), given, wanted, *others, threads)
    return dq, dk, dv


def block_mean(x_BHPD: Tensor, sizes_n: Tensor) -> Tensor:
    """Mean over the real tokens of each block, ``[B, H, n, D]``; 0 for an empty block."""
    batch, heads, _, dim = x_BHPD.shape
    mean = x_BHPD.new_empty(batch, heads, sizes_n.numel(), dim)
    _glue("block_mean", mean, sizes_n, _slots(x_BHPD), _NONE, _slots(mean))
    return mean


def select_topk(scores_BHqk: Tensor, sizes_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties by the lower index, never an empty block; ascending."""
    *rows, num_k = scores_BHqk.shape
    width = min(k, num_k)
    scores = scores_BHqk.float()
    idx = torch.empty(*rows, width, dtype=torch.int32)
    num = torch.empty(rows, dtype=torch.int32)
    threads = num_threads(scores.numel() * 8)
    workspace = torch.empty(threads * num_k, dtype=torch.float32)
    tensors = (scores, sizes_k, idx, num, workspace)
    cpu().select_topk(num.numel(), num_k, width, *map(address, tensors), threads)
    return idx, num


def coarse_forward(
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    sizes_k: Tensor,
    k: int,
    scale: float,
    score_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense attention over block means, its LSE, and lists of the k best key blocks.

    ``score_dtype`` bf16 rounds the product, then the scaled product, before it is used.
    """
    batch, heads, num_q, dim = qm_BHqD.shape
    num_k = km_BHkD.size(2)
    out = _empty_like(qm_BHqD)
    lse = qm_BHqD.new_empty(qm_BHqD.shape[:-1], dtype=torch.float32)
    idx = torch.empty(batch, heads, num_q, k, dtype=torch.int32)
    num = torch.empty(batch, heads, num_q, dtype=torch.int32)
    sizes, threads = [batch, heads, num_q, num_k, dim], _threads(qm_BHqD)
    workspace = torch.empty(cpu().coarse_forward_workspace(sizes, threads), dtype=torch.float32)
    tokens = [_slots(x) for x in (qm_BHqD, km_BHkD, vm_BHkD, out)]
    others = map(address, (sizes_k, lse, idx, num, workspace))
    is_rounded = score_dtype == torch.bfloat16
    cpu().coarse_forward(sizes, k, scale, is_rounded, tokens, *others, threads)
    return out, lse, idx, num


def transpose_index(
    idx_BHqM: Tensor, num_BHq: Tensor, num_key_blocks: int
) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that list it: see ``index.transpose_index``."""
    batch, heads, num_q, width = idx_BHqM.shape
    indptr = torch.empty(batch, heads, num_key_blocks + 1, dtype=torch.int32)
    rows = torch.empty(batch, heads, num_q * width, dtype=torch.int32)
    tensors = (idx_BHqM, num_BHq, indptr, rows)
    sizes = [batch * heads, num_q, num_key_blocks, width]
    cpu().transpose_lists(sizes, *map(address, tensors), num_threads(idx_BHqM.numel()))
    return indptr, rows


def tile_pool(x_BSHD: Tensor, slot_to_raster_P: Tensor, sizes_n: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to slots ``[B, H, P, D]``, zeros in empty ones, and the means of the blocks."""
    batch, _, heads, dim = x_BSHD.shape
    x_BSHD = _rows(x_BSHD)
    slots = _empty((batch, heads, slot_to_raster_P.numel(), dim), x_BSHD.dtype)
    mean = x_BSHD.new_empty(batch, heads, sizes_n.numel(), dim)
    tokens = _raster(x_BSHD, slot_to_raster_P)
    _glue("block_mean", mean, sizes_n, tokens, _slots(slots), _slots(mean))
    return slots, mean


def tile_pool_backward(
    dx_BHPD: Tensor, dmean_BHnD: Tensor, raster_to_slot_S: Tensor, sizes_n: Tensor
) -> Tensor:
    """A token's gradient: its slot's, and its share of its block's mean's; ``[B, S, H, D]``."""
    batch, heads, _, dim = dx_BHPD.shape
    grad = _empty((batch, raster_to_slot_S.numel(), heads, dim), dx_BHPD.dtype)
    slot_to_raster, _ = _blocks(raster_to_slot_S, sizes_n.numel())
    tokens = (_raster(grad, slot_to_raster), _slots(dx_BHPD), _slots(dmean_BHnD))
    _glue("block_mean_backward", dmean_BHnD, sizes_n, *tokens)
    return grad


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, raster_to_slot_S: Tensor
) -> Tensor:
    """``o + gate oc`` of each token, ``[B, S, H, D]``; without a gate the plain sum."""
    batch, heads, _, dim = o_BHPD.shape
    out = _empty((batch, raster_to_slot_S.numel(), heads, dim), o_BHPD.dtype)
    slot_to_raster, sizes = _blocks(raster_to_slot_S, oc_BHnD.size(2))
    gate = None if gate_BSHD is None else _rows(gate_BSHD)
    tokens = (_raster(out, slot_to_raster), _slots(o_BHPD.contiguous()))
    oc = oc_BHnD.contiguous()
    _glue("combine", oc, sizes, *tokens, _slots(oc), _raster(gate, slot_to_raster))
    return out


def untile_combine_backward(
    do_BSHD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    slot_to_raster_P: Tensor,
    raster_to_slot_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``o`` (slots), ``oc`` (blocks), and the gate (tokens; None without one)."""
    batch, _, heads, dim = do_BSHD.shape
    do = _empty((batch, heads, slot_to_raster_P.numel(), dim), do_BSHD.dtype)
    gate = None if gate_BSHD is None else _rows(gate_BSHD)
    dgate = None if gate is None else _empty(gate.shape, gate.dtype)
    oc, given = oc_BHnD.contiguous(), _rows(do_BSHD)
    doc = _empty_like(oc)
    _, sizes = _blocks(raster_to_slot_S, oc.size(2))
    raster = [_raster(x, slot_to_raster_P) for x in (given, gate, dgate)]
    tokens = (raster[0], _slots(do), _slots(oc), *raster[1:], _slots(doc))
    _glue("combine_backward", oc, sizes, *tokens)
    return do, doc, dgate


_NONE = [0, 0, 0, 0, 0, 0]
"""A tensor that is not there."""


def _glue(name: str, mean_BHnD: Tensor, sizes_n: Tensor, *tokens: list[int]) -> None:
    """An operation on x, slots, means, gate, its gradient, the means' gradient."""
    threads = num_threads(mean_BHnD.numel() * BLOCK)
    given = [*tokens, *[_NONE] * (6 - len(tokens))]
    getattr(cpu(), name)(list(mean_BHnD.shape), address(sizes_n), given, threads)


def _blocks(raster_to_slot_S: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Token of each slot (-1: none), and the number of each block's tokens."""
    slot_to_raster = torch.full((num_blocks * BLOCK,), -1, dtype=torch.int64)
    slot_to_raster[raster_to_slot_S] = torch.arange(raster_to_slot_S.numel())
    return slot_to_raster, (slot_to_raster.view(-1, BLOCK) >= 0).sum(1, dtype=torch.int32)


def _rows(x: Tensor) -> Tensor:
    """``x``, its last axis without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory, of huge pages where it is large."""
    x = torch.empty(tuple(shape), dtype=dtype)
    if x.nbytes >= _HUGE_FROM:
        cpu().advise_huge(x.data_ptr(), x.nbytes)
    return x


def _empty_like(x: Tensor) -> Tensor:
    return _empty(x.shape, x.dtype)


def _sizes(q_BHQD: Tensor, lists: Lists) -> list[int]:
    """B, H, query blocks, key blocks, D."""
    batch, heads, _, dim = q_BHQD.shape
    return [batch, heads, lists.q_sizes.numel(), lists.kv_sizes.numel(), dim]


def _lists(lists: Lists) -> list[int]:
    tensors = (lists.idx_BHqM, lists.num_BHq, lists.q_sizes, lists.kv_sizes)
    return [lists.idx_BHqM.size(-1), *map(address, (*tensors, lists.indptr, lists.rows))]


def _slots(x_BHPD: Tensor) -> list[int]:
    """Where the extension finds the tokens of a tensor with heads before slots."""
    strides = (x_BHPD.stride(0), x_BHPD.stride(1), x_BHPD.stride(2))
    return [x_BHPD.data_ptr(), x_BHPD.dtype == torch.bfloat16, *strides, 0]


def _raster(x_BSHD: Tensor | None, slot_to_raster_P: Tensor) -> list[int]:
    """Likewise of tokens in raster order."""
    if x_BSHD is None:
        return _NONE
    strides = (x_BSHD.stride(0), x_BSHD.stride(2), x_BSHD.stride(1))
    is_bf16 = x_BSHD.dtype == torch.bfloat16
    return [x_BSHD.data_ptr(), is_bf16, *strides, slot_to_raster_P.data_ptr()]


def _threads(x: Tensor) -> int:
    return num_threads(x.numel() * 8)  # far more work for a number than an elementwise operation
