"""Video sparse attention in the extension ``megagen._cuda``: bf16 on Hopper (sm_90a), fp16 forward.

The kernels take lists of pairs of blocks; they are made on the GPU, and nothing here waits for it.
Operations that are not here are the Triton backend's. Tensors are contiguous; the callers have
checked shapes and types.

Legend: B batch, H heads, Q K query and key slots (64 a block), q k n blocks, D head dim, M places
of a list, S tokens.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from megagen.kernels.backend import address, load_cuda
from megagen.kernels.vsa.index import Lists

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
_CAPABILITY = (9, 0)
_ALIGNMENT = 16
_SCRATCH_BYTES = 64 << 20
"""Of the transpose's bit maps; sequences are taken in as many turns as that needs."""


def serves(q_BHQD: Tensor) -> str | None:
    """None where tensors like ``q`` are served, the reason in words where not."""
    module, reason = load_cuda()
    if module is None:
        return reason
    if not q_BHQD.is_cuda:
        return f"it computes on NVIDIA GPUs, not on {q_BHQD.device.type}"
    found = torch.cuda.get_device_capability(q_BHQD.device)
    if found != _CAPABILITY:
        return f"it is built for compute capability 9.0, not {found[0]}.{found[1]}"
    if q_BHQD.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, not {q_BHQD.dtype}"
    if q_BHQD.size(-1) not in _HEAD_DIMS:
        return f"it takes head dims 64 and 128, not {q_BHQD.size(-1)}"
    return None


def fine_forward(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """Output like ``q`` and natural-log LSE ``[B, H, Q]`` fp32; 0 and -inf in empty rows.

    Raises:
        ValueError: the scale is not positive.
    """
    if k_BHKD.numel() == 0:  # no tensor map describes nothing
        nothing = q_BHQD.new_full(q_BHQD.shape[:-1], -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q_BHQD), nothing
    out = torch.empty_like(q_BHQD)
    return out, _forward(q_BHQD, k_BHKD, v_BHKD, lists, scale, o=out)


def fine_forward_combined(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    lists: Lists,
    scale: float,
    gate_BSHD: Tensor,
    coarse_BHqD: Tensor,
    token_Q: Tensor,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``o + gate * coarse`` written in token order by the forward itself.

    Args:
        gate_BSHD: in token order.
        coarse_BHqD: one row per query block.
        token_Q: int32, the token of each query slot, -1 for a pad.
        keep: also return ``o``, which the backward needs.

    Returns:
        The sum ``[B, S, H, D]``; ``o`` like ``q`` or None; natural-log LSE ``[B, H, Q]``.

    Raises:
        ValueError: gate or coarse is of another type than ``q``; the scale is not positive.
    """
    _check_types(q_BHQD.dtype, gate=gate_BSHD, coarse=coarse_BHqD)
    gate_BSHD, coarse_BHqD = _aligned(gate_BSHD), _aligned(coarse_BHqD)
    out = torch.empty_like(gate_BSHD)
    kept = torch.empty_like(q_BHQD) if keep else None
    epilogue = {
        "gate": gate_BSHD,
        "coarse": coarse_BHqD,
        "out": out,
        "token": token_Q,
        "tokens": gate_BSHD.size(1),
    }
    return out, kept, _forward(q_BHQD, k_BHKD, v_BHKD, lists, scale, o=kept, **epilogue)


def combine_backward(
    grad_BSHD: Tensor, gate_BSHD: Tensor, coarse_BHqD: Tensor, token_Q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what ``fine_forward_combined`` adds up, with the tiling undone in one pass.

    Args:
        grad_BSHD: of its first result.
        gate_BSHD: as given to it; so are ``coarse`` and ``token``.

    Returns:
        That of ``o``, ``[B, H, Q, D]`` with zeros in empty slots, for ``fine_backward``; of the
        gate; of ``coarse``, summed in a fixed order.

    Raises:
        ValueError: gate or coarse is of another type than the gradient.
    """
    _check_types(grad_BSHD.dtype, gate=gate_BSHD, coarse=coarse_BHqD)
    grad_BSHD, gate_BSHD, coarse_BHqD = map(_aligned, (grad_BSHD, gate_BSHD, coarse_BHqD))
    batch, heads, num_q, dim = coarse_BHqD.shape
    tiled = grad_BSHD.new_empty(batch, heads, token_Q.numel(), dim)
    dgate, dcoarse = torch.empty_like(gate_BSHD), torch.empty_like(coarse_BHqD)
    args = _module().Combine()
    _fill(args, grad=grad_BSHD, gate=gate_BSHD, coarse=coarse_BHqD, token=token_Q)
    _fill(args, tiled=tiled, dgate=dgate, dcoarse=dcoarse, sequences=batch * heads)
    _fill(args, tokens=gate_BSHD.size(1), heads=heads, num_q=num_q, dim=dim)
    _fill(args, fp16=int(grad_BSHD.dtype == torch.float16))
    _run("combine_backward", args, grad_BSHD)
    return tiled, dgate, dcoarse


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
    """dq, dk, dv in two passes, no atomics: the same bits in every run; zeros in empty slots."""
    given = (do_BHQD, dlse_BHQ, q_BHQD, k_BHKD, v_BHKD, o_BHQD, lse_BHQ, lists, scale)
    if q_BHQD.dtype != torch.bfloat16:
        return cast("tuple[Tensor, Tensor, Tensor]", _elsewhere(q_BHQD, "fine_backward")(*given))
    return _backward(*given)


def fine_backward_fast(
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
    """The same in one pass, dq by atomic additions in fp32: its last bits differ between runs."""
    given = (do_BHQD, dlse_BHQ, q_BHQD, k_BHKD, v_BHKD, o_BHQD, lse_BHQ, lists, scale)
    if q_BHQD.dtype != torch.bfloat16:
        return fine_backward(*given)
    return _backward(*given, fast=True)


def transpose_index(idx_BHqM: Tensor, num_BHq: Tensor, num_k: int) -> tuple[Tensor, Tensor]:
    """``indptr [B, H, n_k + 1]`` and ``rows [B, H, n_q M]``: the query blocks of each key block."""
    batch, heads, num_q, width = idx_BHqM.shape
    indptr = idx_BHqM.new_empty(batch, heads, num_k + 1)
    rows = idx_BHqM.new_zeros(batch, heads, num_q * width)
    each = _module().transpose_bytes(num_q, num_k)
    sequences = batch * heads
    scratch = max(each, min(_SCRATCH_BYTES, each * sequences))
    bits = torch.empty(scratch, dtype=torch.uint8, device=idx_BHqM.device)
    args = _module().Transpose()
    sizes = {"sequences": sequences, "num_q": num_q, "num_k": num_k, "width": width}
    _fill(args, idx=idx_BHqM, num=num_BHq, indptr=indptr, rows=rows, bits=bits, **sizes)
    args.scratch_bytes = scratch
    _run("transpose", args, idx_BHqM)
    return indptr, rows


def block_mean(x_BHPD: Tensor, sizes_n: Tensor) -> Tensor:
    """Mean over the real tokens of each block."""
    return cast(Tensor, _elsewhere(x_BHPD, "block_mean")(x_BHPD, sizes_n))


def select_topk(scores_BHqk: Tensor, sizes_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties by the lower index, ascending."""
    like = scores_BHqk.new_empty(_HEAD_DIMS[0], dtype=torch.bfloat16)
    found = _elsewhere(like, "select_topk")(scores_BHqk, sizes_k, k)
    return cast("tuple[Tensor, Tensor]", found)


def coarse_forward(
    qm_BHqD: Tensor, km_BHkD: Tensor, vm_BHkD: Tensor, sizes_k: Tensor, k: int, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over block means and the selection."""
    given = (qm_BHqD, km_BHkD, vm_BHkD, sizes_k, k, *others)
    found = _elsewhere(qm_BHqD, "coarse_forward")(*given)
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", found)


def coarse_backward(doc_BHqD: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the means."""
    found = _elsewhere(doc_BHqD, "coarse_backward")(doc_BHqD, *others)
    return cast("tuple[Tensor, Tensor, Tensor]", found)


def tile_pool(x_BSHD: Tensor, slot_to_raster_P: Tensor, sizes_n: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to slots, and the means of the blocks."""
    found = _elsewhere(x_BSHD, "tile_pool")(x_BSHD, slot_to_raster_P, sizes_n)
    return cast("tuple[Tensor, Tensor]", found)


def tile_pool_backward(dx_BHPD: Tensor, *others: Any) -> Tensor:
    """A token's gradient: its slot's, and its share of its block's mean's."""
    return cast(Tensor, _elsewhere(dx_BHPD, "tile_pool_backward")(dx_BHPD, *others))


def untile_combine(o_BHPD: Tensor, *others: Any) -> Tensor:
    """``o + gate oc`` of each token, where the forward has not written it."""
    return cast(Tensor, _elsewhere(o_BHPD, "untile_combine")(o_BHPD, *others))


def untile_combine_backward(
    do_BSHD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    slot_to_raster_P: Tensor,
    raster_to_slot_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``o``, ``oc`` and the gate: of ``fine_forward_combined`` too."""
    if gate_BSHD is not None and gate_BSHD.dtype == oc_BHnD.dtype == do_BSHD.dtype:
        grad, gate, coarse = (x.contiguous() for x in (do_BSHD, gate_BSHD, oc_BHnD))
        do, dgate, doc = combine_backward(grad, gate, coarse, slot_to_raster_P.int())
        return do, doc, dgate
    others = (oc_BHnD, gate_BSHD, slot_to_raster_P, raster_to_slot_S)
    found = _elsewhere(do_BSHD, "untile_combine_backward")(do_BSHD, *others)
    return cast("tuple[Tensor, Tensor, Tensor | None]", found)


def merge_queries(lists: Lists) -> tuple[Tensor, Tensor]:
    """Lists of pairs of query blocks: ``entries [B, H, pairs, 2 M]`` and their counts.

    An entry has the key block in bits 0-22, its real tokens in bits 23-29, and in bits 30 and 31
    whether the pair's first and second query block list it.
    """
    batch, heads, num_q, width = lists.idx_BHqM.shape
    pairs = (num_q + 1) // 2
    entries = lists.idx_BHqM.new_empty(batch, heads, pairs, 2 * width)
    counts = lists.idx_BHqM.new_empty(batch, heads, pairs)
    args = _module().Merge()
    _fill(args, items=lists.idx_BHqM, num=lists.num_BHq, entries=entries, counts=counts)
    _fill(args, owner_sizes=lists.q_sizes, item_sizes=lists.kv_sizes)
    _fill(args, sequences=batch * heads, stride=width, owners=num_q)
    _run("merge_lists", args, entries)
    return entries, counts


def merge_keys(lists: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of pairs of key blocks, whose entries are query blocks.

    Returns:
        ``entries [B, H, n_q M]``, where a pair's list starts where its first block's does;
        counts ``[B, H, pairs]``; pairs by descending count ``[B, H, pairs]``; indptr.
    """
    batch, heads, num_q, width = lists.idx_BHqM.shape
    num_k = lists.kv_sizes.numel()
    indptr, rows = lists.indptr, lists.rows
    if indptr is None or rows is None:
        indptr, rows = transpose_index(lists.idx_BHqM, lists.num_BHq, num_k)
    entries = torch.empty_like(rows)
    counts = rows.new_empty(batch, heads, (num_k + 1) // 2)
    order = torch.empty_like(counts)
    args = _module().Merge()
    _fill(args, items=rows, indptr=indptr, entries=entries, counts=counts, order=order)
    _fill(args, owner_sizes=lists.kv_sizes, item_sizes=lists.q_sizes)
    _fill(args, sequences=batch * heads, stride=num_q * width, owners=num_k)
    _run("merge_lists", args, entries)
    return entries, counts, order, indptr


def gather(k_BHKD: Tensor, v_BHKD: Tensor, entries: Tensor, counts: Tensor) -> None:
    """Loads every tile of K and V that ``merge_queries``'s lists name, and does nothing with it."""
    args = _module().Probe()
    _fill(args, k=k_BHKD, v=v_BHKD, entries=entries, counts=counts)
    sizes = {"pairs": entries.size(2), "num_k": k_BHKD.size(2) // 64, "width": entries.size(3)}
    _fill(args, sequences=k_BHKD.size(0) * k_BHKD.size(1), dim=k_BHKD.size(3), **sizes)
    _run("gather_probe", args, k_BHKD)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, **epilogue: Any
) -> Tensor:
    if scale <= 0:
        raise ValueError(f"the scale must be positive, found {scale}")
    q, k, v = map(_aligned, (q, k, v))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    entries, counts = merge_queries(lists)
    args = _module().Forward()
    _fill(args, q=q, k=k, v=v, lse=lse, entries=entries, counts=counts, q_sizes=lists.q_sizes)
    _fill(args, **_sizes(q, lists), heads=q.size(1), fp16=int(q.dtype == torch.float16))
    _fill(args, scale=scale, **epilogue)
    _run("vsa_forward", args, q)
    return lse


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lists: Lists,
    scale: float,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:  # nothing attends to anything
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    do, q, k, v, o = map(_aligned, (do, q, k, v, o))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    stats = q.new_empty(*q.shape[:2], lists.q_sizes.numel(), 128, dtype=torch.float32)
    sums = torch.empty_like(q, dtype=torch.float32) if fast else None
    entries, counts = (None, None) if fast else merge_queries(lists)
    key_entries, key_counts, key_order, key_indptr = merge_keys(lists)
    args = _module().Backward()
    _fill(args, q=q, k=k, v=v, o=o, grad=do, lse=lse, dlse=dlse, stats=stats, dq=dq, dk=dk, dv=dv)
    _fill(args, fast=int(fast), dq32=sums, entries=entries, counts=counts)
    _fill(args, key_entries=key_entries, key_counts=key_counts, key_width=key_entries.size(-1))
    _fill(args, key_order=key_order, key_indptr=key_indptr)
    _fill(args, q_sizes=lists.q_sizes, k_sizes=lists.kv_sizes, scale=scale, **_sizes(q, lists))
    _run("vsa_backward", args, q)
    return dq, dk, dv


def _check_types(dtype: torch.dtype, **tensors: Tensor) -> None:
    """The kernels read every tensor of numbers as one type."""
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} as what it is combined with, found {x.dtype}")


def _aligned(x: Tensor) -> Tensor:
    """The tensor, copied where it does not begin where bulk copies and 16-byte loads can."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def _sizes(q: Tensor, lists: Lists) -> dict[str, int]:
    return {
        "sequences": q.size(0) * q.size(1),
        "num_q": lists.q_sizes.numel(),
        "num_k": lists.kv_sizes.numel(),
        "width": 2 * lists.idx_BHqM.size(-1),
        "dim": q.size(-1),
    }


def _fill(args: Any, **values: Tensor | float | None) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float)
        setattr(args, name, value if is_number else address(cast("Tensor | None", value)))


def _run(name: str, args: Any, like: Tensor) -> None:
    with torch.cuda.device(like.device):
        args.stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_module(), name)(args)


def _module() -> Any:
    module, reason = load_cuda()
    assert module is not None, reason
    return module


def _elsewhere(like: Tensor, operation: str) -> Any:
    """The operation of the Triton backend, or where that does not serve, of the reference."""
    home = "megagen.kernels.vsa.backends"
    triton = importlib.import_module(f"{home}.triton")
    function = getattr(triton, operation, None) if triton.serves(like) is None else None
    return function or getattr(importlib.import_module(f"{home}.reference"), operation)
