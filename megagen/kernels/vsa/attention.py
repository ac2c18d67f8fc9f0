"""Video sparse attention: a coarse stage over block means, a fine one over the blocks it chose.

Zhang et al. 2025 (arXiv 2505.13389), section 3: ``O = O_fine + G * O_coarse``, where every token of
a block has the coarse output of its block, and G is the gate.

Legend: B batch, S tokens in raster order, H heads, D head dim, P slots (64 a block), n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.coarse import block_mean, coarse_attention
from megagen.kernels.vsa.combined import fine_combined
from megagen.kernels.vsa.fine import block_sparse_attention
from megagen.kernels.vsa.index import BlockIndex
from megagen.kernels.vsa.layout import BLOCK, VSALayout
from megagen.kernels.vsa.raster import attend_raster
from megagen.kernels.vsa.tile import tile, tile_pool, untile_combine


@dataclass(frozen=True)
class Pooled:
    """Tokens as blocks with their means, as ``norm_rope_tile_pool`` makes them.

    Args:
        slots: ``[B, H, P, D]``, zeros in empty ones.
        mean: ``[B, H, n, D]``, over the tokens of each block.
    """

    slots: Tensor
    mean: Tensor

    def blocks(self, first: int, end: int | None = None) -> Pooled:
        """Some of the blocks."""
        last = None if end is None else BLOCK * end
        return Pooled(self.slots[:, :, BLOCK * first : last], self.mean[:, :, first:end])


@dataclass(frozen=True)
class VSAAux:
    """What a call found on the way, without gradient.

    Args:
        lse: of the fine stage, ``[B, H, P_video]``; None where attention was dense.
        index: key blocks of each video query block.
        o_coarse: ``[B, H, n_video, D]``.
    """

    lse: Tensor | None
    index: BlockIndex
    o_coarse: Tensor


def vsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    layout: VSALayout,
    topk: int,
    kv_layout: VSALayout | None = None,
    input: Literal["raster_bshd", "tiled_bhsd"] = "raster_bshd",
    backend: str = "auto",
    deterministic: bool = True,
    score_dtype: str = "fp32",
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, VSAAux]:
    """Attention of video tokens to the key blocks that their block means choose; differentiable.

    Where the layout has a prefix (text of a joint model), video queries attend to all prefix blocks
    besides their ``topk`` video blocks, and prefix queries to everything, without coarse output.

    Args:
        q: ``[B, S, H, D]`` in raster order (any strides), or ``[B, H, P, D]`` tiled by ``layout``.
        k: keys likewise, by ``kv_layout``.
        v: values likewise.
        gate: like ``q``, of the coarse output; None: 1.
        layout: of the queries.
        topk: video key blocks of each query block; more than there are means all.
        kv_layout: of keys and values; None: ``layout``.
        input: order of the arguments and of the result.
        backend: ``auto`` | ``cuda`` | ``triton`` | ``cpu`` | ``reference``.
        deterministic: see ``block_sparse_attention``.
        score_dtype: ``fp32``, or ``bf16`` to choose blocks as a bf16 product of means would.
        return_aux: also return what was chosen.

    Returns:
        Output like ``q``; with ``return_aux`` also ``VSAAux``.

    Raises:
        ValueError: shapes, types or options do not fit together; the message says what would.
    """
    plan = _Plan(
        layout,
        kv_layout or layout,
        topk,
        dispatch.choose(backend, q),
        deterministic,
        score_dtype,
    )
    if input not in ("raster_bshd", "tiled_bhsd"):
        raise ValueError(f"input must be raster_bshd or tiled_bhsd, found {input!r}")
    _check(q, k, v, gate, plan, is_tiled=input == "tiled_bhsd")
    attend = _attend_tiled if input == "tiled_bhsd" else _attend_raster
    out, aux = attend(q, k, v, gate, plan)
    return (out, aux) if return_aux else out


@dataclass(frozen=True)
class _Plan:
    """The options of a call; ``backend`` is chosen."""

    queries: VSALayout
    keys: VSALayout
    topk: int
    backend: str
    deterministic: bool
    score_dtype: str


def vsa_attention_pooled(
    q: Pooled,
    k: Pooled,
    v: Pooled,
    gate_BSHD: Tensor | None = None,
    *,
    layout: VSALayout,
    topk: int,
    kv_layout: VSALayout | None = None,
    backend: str = "auto",
    deterministic: bool = True,
    score_dtype: str = "fp32",
) -> Tensor:
    """``vsa_attention`` of tokens that are blocks with means already; differentiable.

    For whoever makes them in a pass that is needed anyway (``norm_rope_tile_pool``);
    ``wants_pooled`` says whether that is of use. Attention to all blocks stays sparse attention.

    Args:
        q: queries by ``layout``.
        k: keys by ``kv_layout``.
        v: values likewise.
        gate_BSHD: of the coarse output, in raster order; None: 1.
        layout, topk, kv_layout, backend, deterministic, score_dtype: as of ``vsa_attention``.

    Returns:
        ``[B, S, H, D]`` in raster order.

    Raises:
        ValueError: shapes, types or options do not fit together; the message says what would.
    """
    chosen = dispatch.choose(backend, q.slots)
    plan = _Plan(layout, kv_layout or layout, topk, chosen, deterministic, score_dtype)
    _check(q.slots, k.slots, v.slots, None, plan, is_tiled=True)
    for name, x, blocks in (("q", q, plan.queries), ("k", k, plan.keys), ("v", v, plan.keys)):
        wanted = (*x.slots.shape[:2], blocks.num_blocks, x.slots.size(-1))
        if x.mean.shape != wanted:
            raise ValueError(f"means of {name} must be {wanted}, found {tuple(x.mean.shape)}")
    batch, heads, _, dim = q.slots.shape
    tokens = (batch, layout.num_tokens, heads, dim)
    if gate_BSHD is not None and gate_BSHD.shape != tokens:
        raise ValueError(f"gate must be {tokens}, found {tuple(gate_BSHD.shape)}")
    _alike(q.slots, gate=gate_BSHD)
    return _attend_pooled(q, k, v, gate_BSHD, plan)[0]


def wants_pooled(like: Tensor, keys: VSALayout, topk: int, backend: str = "auto") -> bool:
    """Whether ``vsa_attention`` of tensors like ``like`` would make blocks and means itself.

    It does not where its backend reads raster order, nor where it takes dense attention; the
    reference is left as it is.
    """
    chosen = dispatch.choose(backend, like)
    if chosen == "reference" or dispatch.has(chosen, "raster_forward"):
        return False
    return not dispatch.is_dense(like.device.type, topk, keys.num_video_blocks)


def _check(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, plan: _Plan, *, is_tiled: bool
) -> None:
    axis, names = (2, "[B, H, P, D]") if is_tiled else (1, "[B, S, H, D]")
    for name, x, layout in (("q", q, plan.queries), ("k", k, plan.keys), ("v", v, plan.keys)):
        wanted = layout.padded if is_tiled else layout.num_tokens
        if x.dim() != 4 or x.size(axis) != wanted:
            raise ValueError(
                f"{name} must be {names} with {wanted} tokens or slots as its layout "
                f"{layout.grid} has, found {tuple(x.shape)}"
            )
    if gate is not None and gate.shape != q.shape:
        raise ValueError(f"gate must be like q {tuple(q.shape)}, found {tuple(gate.shape)}")
    heads = 1 if is_tiled else 2
    if k.shape != v.shape or any(q.size(i) != k.size(i) for i in (0, heads, 3)):
        raise ValueError(
            "q, k and v must have one batch, one number of heads and one head dim, found "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    _alike(q, k=k, v=v, gate=gate)
    if plan.topk < 1:
        raise ValueError(f"topk must be at least 1, found {plan.topk}")


def _alike(q: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(
                f"{name} must be like q, {q.dtype} on {q.device}, found {x.dtype} on {x.device}"
            )


def _attend_raster(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, plan: _Plan
) -> tuple[Tensor, VSAAux]:
    is_dense = dispatch.is_dense(q.device.type, plan.topk, plan.keys.num_video_blocks)
    has_prefix = bool(plan.queries.prefix or plan.keys.prefix)
    if dispatch.has(plan.backend, "raster_forward") and not is_dense and not has_prefix:
        return _attend_in_place(q, k, v, gate, plan)
    pooled_q, pooled_k, pooled_v = (
        Pooled(*tile_pool(x, layout, plan.backend))
        for x, layout in ((q, plan.queries), (k, plan.keys), (v, plan.keys))
    )
    dense = tile(_dense_attention(q, k, v), plan.queries) if is_dense else None
    return _attend_pooled(pooled_q, pooled_k, pooled_v, gate, plan, dense)


def _attend_pooled(
    q: Pooled,
    k: Pooled,
    v: Pooled,
    gate_BSHD: Tensor | None,
    plan: _Plan,
    dense_BHPD: Tensor | None = None,
) -> tuple[Tensor, VSAAux]:
    """Tokens in raster order; by the fine stage itself where the backend can."""
    has_prefix = bool(plan.queries.prefix or plan.keys.prefix)
    in_one = dispatch.has(plan.backend, "fine_forward_combined")
    if in_one and gate_BSHD is not None and dense_BHPD is None and not has_prefix:
        oc_BHnD, index = _choose_blocks(q, k, v, plan)
        out, lse = fine_combined(
            q.slots,
            k.slots,
            v.slots,
            oc_BHnD,
            gate_BSHD,
            index,
            plan.queries.tables(gate_BSHD.device),
            plan.keys.tables(gate_BSHD.device).sizes_n,
            backend=plan.backend,
            deterministic=plan.deterministic,
        )
        return out, VSAAux(lse, index, oc_BHnD.detach())
    o_BHPD, oc_BHnD, aux = _attend_blocks(q, k, v, plan, dense_BHPD)
    return untile_combine(o_BHPD, oc_BHnD, gate_BSHD, plan.queries, plan.backend), aux


def _attend_in_place(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, plan: _Plan
) -> tuple[Tensor, VSAAux]:
    """One operator, which reads and writes raster order."""
    made = attend_raster(
        q,
        k,
        v,
        gate,
        *(x.tables(q.device).blocks for x in (plan.queries, plan.keys)),
        topk=plan.topk,
        scale=q.size(-1) ** -0.5,
        score_dtype=plan.score_dtype,
        backend=plan.backend,
    )
    return made.out, VSAAux(made.lse, BlockIndex(made.idx, made.num), made.oc)


def _attend_tiled(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, plan: _Plan
) -> tuple[Tensor, VSAAux]:
    q_sizes, k_sizes = (x.tables(q.device).sizes_n for x in (plan.queries, plan.keys))
    pooled_q, pooled_k, pooled_v = (
        Pooled(x, block_mean(x, sizes, backend=plan.backend))
        for x, sizes in ((q, q_sizes), (k, k_sizes), (v, k_sizes))
    )
    o_BHPD, oc_BHnD, aux = _attend_blocks(pooled_q, pooled_k, pooled_v, plan, None)
    coarse = oc_BHnD[..., None, :].expand(*oc_BHnD.shape[:3], BLOCK, -1).flatten(2, 3)
    if gate is not None:
        coarse = coarse * gate
    is_real = plan.queries.tables(q.device).slot_to_raster_P >= 0
    return o_BHPD + torch.where(is_real[:, None], coarse, 0), aux


def _attend_blocks(
    q: Pooled, k: Pooled, v: Pooled, plan: _Plan, dense_BHPD: Tensor | None
) -> tuple[Tensor, Tensor, VSAAux]:
    """Fine output of all slots, coarse output of all blocks (0 for the prefix's)."""
    count = plan.queries.num_prefix_blocks
    video = q.blocks(count) if count else q
    oc_BHnD, index = _choose_blocks(video, k, v, plan)
    lse = None
    if dense_BHPD is None:
        o_BHPD, lse = _fine(video, k, v, index, range(count, plan.queries.num_blocks), plan)
        if count:
            every = _every_block(q.slots, count, plan.keys.num_blocks)
            o_prefix, _ = _fine(q.blocks(0, count), k, v, every, range(count), plan)
            o_BHPD = torch.cat([o_prefix, o_BHPD], 2)
        lse = lse.detach()
    else:
        o_BHPD = dense_BHPD
    aux = VSAAux(lse, index, oc_BHnD.detach())
    return o_BHPD, F.pad(oc_BHnD, (0, 0, count, 0)) if count else oc_BHnD, aux


def _choose_blocks(q: Pooled, k: Pooled, v: Pooled, plan: _Plan) -> tuple[Tensor, BlockIndex]:
    """Coarse output of the video's query blocks, and what they choose with the prefix before it."""
    sizes, count = plan.keys.tables(q.mean.device).sizes_n, plan.keys.num_prefix_blocks

    def coarse(first: int, topk: int) -> tuple[Tensor, BlockIndex]:
        out, _, index = coarse_attention(
            q.mean,
            k.mean[:, :, first:],
            v.mean[:, :, first:],
            sizes[first:],
            topk=topk,
            score_dtype=plan.score_dtype,
            backend=plan.backend,
        )
        return out, index

    if not count:
        return coarse(0, plan.topk)
    out, _ = coarse(0, 1)
    with torch.no_grad():
        _, index = coarse(count, plan.topk)
    prefix = torch.arange(count, dtype=torch.int32, device=sizes.device)
    idx = index.idx_BHqM
    idx = torch.cat([prefix.expand(*idx.shape[:-1], -1), idx + count], -1)
    return out, BlockIndex(idx, index.num_BHq + count)


def _fine(
    q: Pooled, k: Pooled, v: Pooled, index: BlockIndex, blocks: range, plan: _Plan
) -> tuple[Tensor, Tensor]:
    device = q.slots.device
    return block_sparse_attention(
        q.slots,
        k.slots,
        v.slots,
        index,
        plan.queries.tables(device).sizes_n[blocks.start : blocks.stop],
        plan.keys.tables(device).sizes_n,
        backend=plan.backend,
        deterministic=plan.deterministic,
    )


def _every_block(like: Tensor, num_q: int, num_k: int) -> BlockIndex:
    shape = (*like.shape[:2], num_q)
    every = torch.arange(num_k, dtype=torch.int32, device=like.device)
    num = torch.full(shape, num_k, dtype=torch.int32, device=like.device)
    return BlockIndex(every.expand(*shape, -1), num)


def _dense_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """torch's attention, by cuDNN where it can."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
