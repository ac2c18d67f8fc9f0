"""Video sparse attention in the extension ``megagen._cpu``: fp32 and bf16, fp32 in every sum.

Results are the same bits on any number of threads. Tensors are contiguous, but for tokens in raster
order, which may have any strides. The callers have checked shapes and types.

Legend: B batch, H heads, Q K query and key slots (64 a block), q k n blocks, D head dim, S tokens,
P slots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megagen.kernels.backend import address, cpu, load_cpu, num_threads
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK, Blocks
from megagen.kernels.vsa.raster import RasterForward

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
    tokens = [_slots(x) for x in (q_BHQD, k_BHKD, v_BHKD, out)]
    return out, _fine_forward(q_BHQD.shape[:2], q_BHQD.size(-1), lists, scale, tokens)


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
    dq, dk, dv = (_empty_like(x) for x in (q_BHQD, k_BHKD, v_BHKD))
    given = [_slots(x) for x in (do_BHQD, q_BHQD, k_BHKD, v_BHKD, o_BHQD)]
    wanted = [_slots(x) for x in (dq, dk, dv)]
    _fine_backward(given, wanted, [_NONE] * 3, lse_BHQ, dlse_BHQ, lists, scale, q_BHQD.size(-1))
    return dq, dk, dv


def raster_forward(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    gate_BSHD: Tensor | None,
    queries: Blocks,
    keys: Blocks,
    topk: int,
    scale: float,
    score_dtype: torch.dtype,
    *,
    keep: bool,
) -> RasterForward:
    """Both stages and their gated sum: see ``raster.RasterForward``."""
    given = ((q_BSHD, queries), (k_BSHD, keys), (v_BSHD, keys))
    (qm, km, vm), panels = zip(
        *(_means_and_panels(_rows(x), each) for x, each in given), strict=True
    )
    oc, lse_c, idx, num = coarse_forward(qm, km, vm, keys.sizes_n, topk, scale, score_dtype)
    batch, num_tokens, heads, dim = q_BSHD.shape
    shape = (batch, heads, queries.slot_to_raster_P.numel(), dim)
    fits = panels[0].numel() == math.prod(shape) and q_BSHD.dtype == torch.float32
    # a block's output may take the place of its queries, which no other block reads
    o = panels[0].view(shape) if fits and not keep else _empty(shape, q_BSHD.dtype)
    lists = Lists(idx, num, queries.sizes_n, keys.sizes_n)
    tokens = [_NONE, _NONE, _NONE, _slots(o)]
    lse = _fine_forward((batch, heads), dim, lists, scale, tokens, panels)
    order, sizes = queries.slot_to_raster_P, queries.sizes_n
    out = _combined(o, oc, gate_BSHD, order, sizes, num_tokens)
    kept = o if keep else o.new_empty(batch, heads, 0, dim)
    return RasterForward(out, kept, lse, oc, lse_c, idx, num, qm, km, vm)


def raster_backward(
    dout_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    gate_BSHD: Tensor | None,
    made: RasterForward,
    queries: Blocks,
    keys: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the gate, ``[B, S, H, D]``, what the means hand on included."""
    order_q, order_k = queries.slot_to_raster_P, keys.slot_to_raster_P
    dout, q, k, v = (_rows(x) for x in (dout_BSHD, q_BSHD, k_BSHD, v_BSHD))
    gate = None if gate_BSHD is None else _rows(gate_BSHD)
    dgate = None if gate is None else _empty(gate.shape, gate.dtype)
    doc = _empty_like(made.oc)
    combined = (_raster(dout, order_q), _NONE, _slots(made.oc), _raster(gate, order_q))
    more = (_raster(dgate, order_q), _slots(doc))
    _glue("combine_backward", doc, queries.sizes_n, *combined, *more)
    means = coarse_backward(
        doc, made.qm, made.km, made.vm, made.oc, made.lse_c, keys.sizes_n, scale
    )
    dq, dk, dv = (_empty(x.shape, x.dtype) for x in (q, k, v))
    wanted = [_raster(x, order) for x, order in ((dq, order_q), (dk, order_k), (dv, order_k))]
    given = [_raster(x, order) for x, order in ((dout, order_q), (q, order_q), (k, order_k))]
    given += [_raster(v, order_k), _slots(made.o)]
    lists = Lists(made.idx, made.num, queries.sizes_n, keys.sizes_n)
    shares = [_slots(x) for x in means]
    _fine_backward(given, wanted, shares, made.lse, None, lists, scale, q.size(-1))
    return dq, dk, dv, dgate


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
    sizes, threads = [batch, heads, num_q, num_k, dim], _threads(qm_BHqD.numel())
    workspace = torch.empty(cpu().coarse_forward_workspace(sizes, threads), dtype=torch.float32)
    tokens = [_slots(x) for x in (qm_BHqD, km_BHkD, vm_BHkD, out)]
    others = map(address, (sizes_k, lse, idx, num, workspace))
    is_rounded = score_dtype == torch.bfloat16
    cpu().coarse_forward(sizes, k, scale, is_rounded, tokens, *others, threads)
    return out, lse, idx, num


def coarse_backward(
    doc_BHqD: Tensor,
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    oc_BHqD: Tensor,
    lse_BHq: Tensor,
    sizes_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the means: as of tokens of a small dense attention, by the fine stage."""
    doc, qm, oc, km, vm = map(_rows, (doc_BHqD, qm_BHqD, oc_BHqD, km_BHkD, vm_BHkD))
    dq, dk, dv = (torch.zeros_like(x) for x in (qm, km, vm))
    queries = _as_blocks(torch.arange(qm.size(2)))
    keys = _as_blocks(sizes_k.nonzero().flatten())
    num_q, num_k = queries.sizes_n.numel(), keys.sizes_n.numel()
    every = torch.arange(num_k, dtype=torch.int32)
    idx = every.expand(*doc.shape[:2], num_q, num_k).contiguous()
    num = torch.full(idx.shape[:3], num_k, dtype=torch.int32)
    lse = torch.nn.functional.pad(lse_BHq, (0, num_q * BLOCK - lse_BHq.size(-1)))
    order_q, order_k = queries.slot_to_raster_P, keys.slot_to_raster_P
    given = [_slots(x, order_q) for x in (doc, qm)] + [_slots(x, order_k) for x in (km, vm)]
    given.append(_slots(oc, order_q))
    wanted = [_slots(x, order) for x, order in ((dq, order_q), (dk, order_k), (dv, order_k))]
    lists = Lists(idx, num, queries.sizes_n, keys.sizes_n)
    _fine_backward(given, wanted, [_NONE] * 3, lse, None, lists, scale, dq.size(-1))
    return dq, dk, dv


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
    order, sizes = _blocks(raster_to_slot_S, oc_BHnD.size(2))
    given = (o_BHPD.contiguous(), oc_BHnD.contiguous(), gate_BSHD)
    return _combined(*given, order, sizes, raster_to_slot_S.numel())


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


def _glue(
    name: str,
    mean_BHnD: Tensor,
    sizes_n: Tensor,
    *tokens: list[int],
    panels: Tensor | None = None,
) -> None:
    """An operation on x, slots, means, gate, its gradient, the means' gradient."""
    threads = num_threads(mean_BHnD.numel() * BLOCK)
    given = [*tokens, *[_NONE] * (6 - len(tokens))]
    sizes = list(mean_BHnD.shape)
    getattr(cpu(), name)(sizes, address(sizes_n), given, address(panels), threads)


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


def _means_and_panels(x_BSHD: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Of the blocks of tokens in raster order: means, and the tokens as the fine stage has them."""
    batch, _, heads, dim = x_BSHD.shape
    num_blocks = blocks.sizes_n.numel()
    mean = x_BSHD.new_empty(batch, heads, num_blocks, dim)
    panels = _empty((batch, heads, num_blocks, cpu().block_panels(dim)))
    tokens = _raster(x_BSHD, blocks.slot_to_raster_P)
    _glue("block_mean", mean, blocks.sizes_n, tokens, _NONE, _slots(mean), panels=panels)
    return mean, panels


def _combined(
    o_BHPD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    order_P: Tensor,
    sizes_n: Tensor,
    num_tokens: int,
) -> Tensor:
    """``o + gate oc`` of each token, ``[B, S, H, D]``."""
    batch, heads, _, dim = o_BHPD.shape
    out = _empty((batch, num_tokens, heads, dim), o_BHPD.dtype)
    gate = None if gate_BSHD is None else _rows(gate_BSHD)
    tokens = (_raster(out, order_P), _slots(o_BHPD), _slots(oc_BHnD), _raster(gate, order_P))
    _glue("combine", oc_BHnD, sizes_n, *tokens)
    return out


def _fine_forward(
    sequences: Sequence[int],
    dim: int,
    lists: Lists,
    scale: float,
    tokens: Sequence[list[int]],
    panels: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:
    """LSE; tokens are q, k, v and o, the first three not needed where they come in panels."""
    sizes = [*sequences, lists.q_sizes.numel(), lists.kv_sizes.numel(), dim]
    lse = torch.empty(*sequences, sizes[2] * BLOCK, dtype=torch.float32)
    threads = _threads(lse.numel() * dim)
    workspace = _empty([cpu().fine_forward_workspace(sizes, threads)])
    given = ([address(x) for x in panels], tokens, address(lse), address(workspace), threads)
    cpu().fine_forward(sizes, scale, _lists(lists), *given)
    return lse


def _fine_backward(
    given: Sequence[list[int]],
    wanted: Sequence[list[int]],
    means: Sequence[list[int]],
    lse_BHQ: Tensor,
    dlse_BHQ: Tensor | None,
    lists: Lists,
    scale: float,
    dim: int,
) -> None:
    """From do, q, k, v, o to dq, dk, dv; to each token's gradient its share of its mean's."""
    num_q, num_k = lists.q_sizes.numel(), lists.kv_sizes.numel()
    if lists.indptr is None or lists.rows is None:
        indptr, rows = transpose_index(lists.idx_BHqM, lists.num_BHq, num_k)
        lists = dataclasses.replace(lists, indptr=indptr, rows=rows)
    sizes, threads = [*lse_BHQ.shape[:2], num_q, num_k, dim], _threads(lse_BHQ.numel() * dim)
    floats = cpu().fine_backward_workspace(sizes, lists.idx_BHqM.size(-1), threads)
    workspace = _empty([floats])
    others = map(address, (lse_BHQ, dlse_BHQ, workspace))
    cpu().fine_backward(sizes, scale, _lists(lists), given, wanted, means, *others, threads)


def _lists(lists: Lists) -> list[int]:
    tensors = (lists.idx_BHqM, lists.num_BHq, lists.q_sizes, lists.kv_sizes)
    return [lists.idx_BHqM.size(-1), *map(address, (*tensors, lists.indptr, lists.rows))]


def _as_blocks(tokens_S: Tensor) -> Blocks:
    """Tokens in blocks of 64, one after the other."""
    count = -(-tokens_S.numel() // BLOCK)
    order = torch.nn.functional.pad(tokens_S, (0, count * BLOCK - tokens_S.numel()), value=-1)
    sizes = (tokens_S.numel() - BLOCK * torch.arange(count)).clamp(max=BLOCK)
    return Blocks(order, sizes.int())


def _slots(x_BHPD: Tensor, order_P: Tensor | None = None) -> list[int]:
    """Where the extension finds the tokens of a tensor with heads before slots."""
    strides = (x_BHPD.stride(0), x_BHPD.stride(1), x_BHPD.stride(2))
    return [x_BHPD.data_ptr(), x_BHPD.dtype == torch.bfloat16, *strides, address(order_P)]


def _raster(x_BSHD: Tensor | None, slot_to_raster_P: Tensor) -> list[int]:
    """Likewise of tokens in raster order."""
    if x_BSHD is None:
        return _NONE
    strides = (x_BSHD.stride(0), x_BSHD.stride(2), x_BSHD.stride(1))
    is_bf16 = x_BSHD.dtype == torch.bfloat16
    return [x_BSHD.data_ptr(), is_bf16, *strides, slot_to_raster_P.data_ptr()]


def _threads(elements: int) -> int:
    return num_threads(elements * 8)  # far more work for a number than an elementwise operation
