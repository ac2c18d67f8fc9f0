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
from megagen.kernels.vsa.backends.cpu_tensors import (
    NONE,
    as_blocks,
    blocks_of,
    fresh,
    fresh_like,
    lists_of,
    raster_of,
    rows_of,
    slots_of,
    threads_for,
)
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK, Blocks
from megagen.kernels.vsa.raster import RasterForward

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 8
"""Head dims are multiples of it: a vector register of the narrowest fast build."""
_PANELS = 24 << 20
"""Bytes of one tensor's panels at a time. Memory of this size is used again, in a call and by the
next one; of 32 MiB and more glibc asks the system for fresh pages every time."""


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
    out = fresh_like(q_BHQD)
    tokens = [slots_of(x) for x in (q_BHQD, k_BHKD, v_BHKD, out)]
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
    dq, dk, dv = (fresh_like(x) for x in (q_BHQD, k_BHKD, v_BHKD))
    given = [slots_of(x) for x in (do_BHQD, q_BHQD, k_BHKD, v_BHKD, o_BHQD)]
    wanted = [slots_of(x) for x in (dq, dk, dv)]
    _fine_backward(given, wanted, [NONE] * 3, lse_BHQ, dlse_BHQ, lists, scale, q_BHQD.size(-1))
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
    q, k, v = (rows_of(x) for x in (q_BSHD, k_BSHD, v_BSHD))
    gate = None if gate_BSHD is None else rows_of(gate_BSHD)
    batch, num_tokens, heads, dim = q.shape
    order, sizes = queries.slot_to_raster_P, queries.sizes_n
    out = fresh((batch, num_tokens, heads, dim), q.dtype)
    kept = fresh((batch, heads, order.numel() if keep else 0, dim), q.dtype)
    size = _heads_at_once(batch, heads, dim, queries, keys)
    counts = [x.sizes_n.numel() for x in (queries, keys, keys)]
    memory = [fresh((batch * size * n * cpu().block_panels(dim),)) for n in counts]
    found = []
    for part in (slice(first, first + size) for first in range(0, max(1, heads), size)):
        given = zip((q, k, v), (queries, keys, keys), memory, strict=True)
        (qm, km, vm), panels = zip(
            *(_means_and_panels(x[:, :, part], blocks, place) for x, blocks, place in given),
            strict=True,
        )
        oc, lse_c, idx, num = coarse_forward(qm, km, vm, keys.sizes_n, topk, scale, score_dtype)
        o = kept[:, part] if keep else _in_place_of(panels[0], order.numel(), dim, q.dtype)
        lists = Lists(idx, num, sizes, keys.sizes_n)
        tokens = [NONE, NONE, NONE, slots_of(o)]
        lse = _fine_forward(qm.shape[:2], dim, lists, scale, tokens, panels)
        own_gate = None if gate is None else gate[:, :, part]
        _combine(out[:, :, part], o, oc, own_gate, order, sizes)
        found.append((lse, oc, lse_c, idx, num, qm, km, vm))
    others = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*found, strict=True))
    return RasterForward(out, kept, *others)


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
    dout, q, k, v = (rows_of(x) for x in (dout_BSHD, q_BSHD, k_BSHD, v_BSHD))
    gate = None if gate_BSHD is None else rows_of(gate_BSHD)
    dgate = None if gate is None else fresh(gate.shape, gate.dtype)
    doc = fresh_like(made.oc)
    combined = (raster_of(dout, order_q), NONE, slots_of(made.oc), raster_of(gate, order_q))
    more = (raster_of(dgate, order_q), slots_of(doc))
    _glue("combine_backward", doc, queries.sizes_n, *combined, *more)
    means = coarse_backward(
        doc, made.qm, made.km, made.vm, made.oc, made.lse_c, keys.sizes_n, scale
    )
    dq, dk, dv = (fresh(x.shape, x.dtype) for x in (q, k, v))
    wanted = [raster_of(x, order) for x, order in ((dq, order_q), (dk, order_k), (dv, order_k))]
    given = [raster_of(x, order) for x, order in ((dout, order_q), (q, order_q), (k, order_k))]
    given += [raster_of(v, order_k), slots_of(made.o)]
    lists = Lists(made.idx, made.num, queries.sizes_n, keys.sizes_n)
    shares = [slots_of(x) for x in means]
    _fine_backward(given, wanted, shares, made.lse, None, lists, scale, q.size(-1))
    return dq, dk, dv, dgate


def block_mean(x_BHPD: Tensor, sizes_n: Tensor) -> Tensor:
    """Mean over the real tokens of each block, ``[B, H, n, D]``; 0 for an empty block."""
    batch, heads, _, dim = x_BHPD.shape
    mean = x_BHPD.new_empty(batch, heads, sizes_n.numel(), dim)
    _glue("block_mean", mean, sizes_n, slots_of(x_BHPD), NONE, slots_of(mean))
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
    out = fresh_like(qm_BHqD)
    lse = qm_BHqD.new_empty(qm_BHqD.shape[:-1], dtype=torch.float32)
    idx = torch.empty(batch, heads, num_q, k, dtype=torch.int32)
    num = torch.empty(batch, heads, num_q, dtype=torch.int32)
    sizes, threads = [batch, heads, num_q, num_k, dim], threads_for(qm_BHqD.numel())
    workspace = torch.empty(cpu().coarse_forward_workspace(sizes, threads), dtype=torch.float32)
    tokens = [slots_of(x) for x in (qm_BHqD, km_BHkD, vm_BHkD, out)]
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
    doc, qm, oc, km, vm = map(rows_of, (doc_BHqD, qm_BHqD, oc_BHqD, km_BHkD, vm_BHkD))
    dq, dk, dv = (torch.zeros_like(x) for x in (qm, km, vm))
    queries = as_blocks(torch.arange(qm.size(2)))
    keys = as_blocks(sizes_k.nonzero().flatten())
    num_q, num_k = queries.sizes_n.numel(), keys.sizes_n.numel()
    every = torch.arange(num_k, dtype=torch.int32)
    idx = every.expand(*doc.shape[:2], num_q, num_k).contiguous()
    num = torch.full(idx.shape[:3], num_k, dtype=torch.int32)
    lse = torch.nn.functional.pad(lse_BHq, (0, num_q * BLOCK - lse_BHq.size(-1)))
    order_q, order_k = queries.slot_to_raster_P, keys.slot_to_raster_P
    given = [slots_of(x, order_q) for x in (doc, qm)] + [slots_of(x, order_k) for x in (km, vm)]
    given.append(slots_of(oc, order_q))
    wanted = [slots_of(x, order) for x, order in ((dq, order_q), (dk, order_k), (dv, order_k))]
    lists = Lists(idx, num, queries.sizes_n, keys.sizes_n)
    _fine_backward(given, wanted, [NONE] * 3, lse, None, lists, scale, dq.size(-1))
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
    x_BSHD = rows_of(x_BSHD)
    slots = fresh((batch, heads, slot_to_raster_P.numel(), dim), x_BSHD.dtype)
    mean = x_BSHD.new_empty(batch, heads, sizes_n.numel(), dim)
    tokens = raster_of(x_BSHD, slot_to_raster_P)
    _glue("block_mean", mean, sizes_n, tokens, slots_of(slots), slots_of(mean))
    return slots, mean


def tile_pool_backward(
    dx_BHPD: Tensor, dmean_BHnD: Tensor, raster_to_slot_S: Tensor, sizes_n: Tensor
) -> Tensor:
    """A token's gradient: its slot's, and its share of its block's mean's; ``[B, S, H, D]``."""
    batch, heads, _, dim = dx_BHPD.shape
    grad = fresh((batch, raster_to_slot_S.numel(), heads, dim), dx_BHPD.dtype)
    slot_to_raster, _ = blocks_of(raster_to_slot_S, sizes_n.numel())
    tokens = (raster_of(grad, slot_to_raster), slots_of(dx_BHPD), slots_of(dmean_BHnD))
    _glue("block_mean_backward", dmean_BHnD, sizes_n, *tokens)
    return grad


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, raster_to_slot_S: Tensor
) -> Tensor:
    """``o + gate oc`` of each token, ``[B, S, H, D]``; without a gate the plain sum."""
    order, sizes = blocks_of(raster_to_slot_S, oc_BHnD.size(2))
    batch, heads, _, dim = o_BHPD.shape
    out = fresh((batch, raster_to_slot_S.numel(), heads, dim), o_BHPD.dtype)
    gate = None if gate_BSHD is None else rows_of(gate_BSHD)
    _combine(out, o_BHPD.contiguous(), oc_BHnD.contiguous(), gate, order, sizes)
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
    do = fresh((batch, heads, slot_to_raster_P.numel(), dim), do_BSHD.dtype)
    gate = None if gate_BSHD is None else rows_of(gate_BSHD)
    dgate = None if gate is None else fresh(gate.shape, gate.dtype)
    oc, given = oc_BHnD.contiguous(), rows_of(do_BSHD)
    doc = fresh_like(oc)
    _, sizes = blocks_of(raster_to_slot_S, oc.size(2))
    raster = [raster_of(x, slot_to_raster_P) for x in (given, gate, dgate)]
    tokens = (raster[0], slots_of(do), slots_of(oc), *raster[1:], slots_of(doc))
    _glue("combine_backward", oc, sizes, *tokens)
    return do, doc, dgate


def _glue(
    name: str,
    mean_BHnD: Tensor,
    sizes_n: Tensor,
    *tokens: list[int],
    panels: Tensor | None = None,
) -> None:
    """An operation on x, slots, means, gate, its gradient, the means' gradient."""
    threads = num_threads(mean_BHnD.numel() * BLOCK)
    given = [*tokens, *[NONE] * (6 - len(tokens))]
    sizes = list(mean_BHnD.shape)
    getattr(cpu(), name)(sizes, address(sizes_n), given, address(panels), threads)


def _heads_at_once(batch: int, heads: int, dim: int, queries: Blocks, keys: Blocks) -> int:
    """Heads whose panels are at most ``_PANELS``, but at least one; no number changes a bit."""
    blocks = max(queries.sizes_n.numel(), keys.sizes_n.numel())
    one = 4 * max(1, batch * blocks * cpu().block_panels(dim))
    turns = -(-heads // max(1, _PANELS // one))
    return max(1, -(-heads // max(1, turns)))


def _in_place_of(panels: Tensor, slots: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Where the output goes that is not kept: a block's queries are read by no other block."""
    shape = (*panels.shape[:2], slots, dim)
    fits = panels.numel() == math.prod(shape) and dtype == torch.float32
    return panels.view(shape) if fits else fresh(shape, dtype)


def _means_and_panels(x_BSHD: Tensor, blocks: Blocks, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Of the blocks of tokens in raster order: means, and the tokens as the fine stage has them."""
    batch, _, heads, dim = x_BSHD.shape
    num_blocks = blocks.sizes_n.numel()
    mean = x_BSHD.new_empty(batch, heads, num_blocks, dim)
    shape = (batch, heads, num_blocks, cpu().block_panels(dim))
    panels = memory[: math.prod(shape)].view(shape)
    tokens = raster_of(x_BSHD, blocks.slot_to_raster_P)
    _glue("block_mean", mean, blocks.sizes_n, tokens, NONE, slots_of(mean), panels=panels)
    return mean, panels


def _combine(
    out_BSHD: Tensor,
    o_BHPD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    order_P: Tensor,
    sizes_n: Tensor,
) -> None:
    """``out = o + gate oc`` of each token."""
    tokens = (raster_of(out_BSHD, order_P), slots_of(o_BHPD), slots_of(oc_BHnD))
    _glue("combine", oc_BHnD, sizes_n, *tokens, raster_of(gate_BSHD, order_P))


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
    threads = threads_for(lse.numel() * dim)
    workspace = fresh([cpu().fine_forward_workspace(sizes, threads)])
    given = ([address(x) for x in panels], tokens, address(lse), address(workspace), threads)
    cpu().fine_forward(sizes, scale, lists_of(lists), *given)
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
    sizes, threads = [*lse_BHQ.shape[:2], num_q, num_k, dim], threads_for(lse_BHQ.numel() * dim)
    floats = cpu().fine_backward_workspace(sizes, lists.idx_BHqM.size(-1), threads)
    workspace = fresh([floats])
    others = map(address, (lse_BHQ, dlse_BHQ, workspace))
    cpu().fine_backward(sizes, scale, lists_of(lists), given, wanted, means, *others, threads)
