"""Video sparse attention in Triton: NVIDIA GPUs from sm_80 on, bf16 and fp16, head dim 64 or 128.

Under TRITON_INTERPRET=1 it serves CPU tensors, fp32 too; that is how it is tested without a GPU.
Triton is imported with the first call.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK

_HEAD_DIMS = (64, 128)
_OLDEST = (8, 0)


def serves(q: Tensor) -> str | None:
    """None where tensors like ``q`` ``[..., D]`` are served, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    types = {torch.bfloat16, torch.float16} | ({torch.float32} if interprets else set())
    if q.shape[-1] not in _HEAD_DIMS:
        return f"head dim {q.shape[-1]} is not 64 or 128"
    if q.dtype not in types:
        return f"{q.dtype} is not bf16 or fp16"
    if q.is_cuda:
        found = torch.cuda.get_device_capability(q.device)
        return None if found >= _OLDEST else f"sm_{found[0]}{found[1]} is older than sm_80"
    if q.device.type == "cpu" and interprets:
        return None
    return f"tensors are on {q.device.type}, not on a GPU"


def fine_forward(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """See ``reference.fine_forward``."""
    from megagen.kernels.triton import vsa_fine_forward, vsa_index, vsa_launch

    segments = vsa_index.key_blocks_of_queries(lists.idx_BHqM, lists.num_BHq, lists.kv_sizes)
    config = vsa_launch.config_for("fine_forward", q_BHQD)
    return vsa_fine_forward.fine_forward(
        q_BHQD, k_BHKD, v_BHKD, segments, lists.q_sizes, lists.kv_sizes, scale, config
    )


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
    """See ``reference.fine_backward``; the same bits in every run."""
    from megagen.kernels.triton import vsa_fine_backward, vsa_index
    from megagen.kernels.triton.vsa_launch import config_for

    lse2, delta = vsa_fine_backward.fine_delta(o_BHQD, do_BHQD, lse_BHQ, dlse_BHQ, lists.q_sizes)
    given = (q_BHQD, k_BHKD, v_BHKD, do_BHQD, lse2, delta)
    sizes = (lists.q_sizes, lists.kv_sizes, scale)
    keys = vsa_index.key_blocks_of_queries(lists.idx_BHqM, lists.num_BHq, lists.kv_sizes)
    dq = vsa_fine_backward.fine_dq(*given, keys, *sizes, config_for("fine_dq", q_BHQD))
    indptr, rows = lists.indptr, lists.rows
    if indptr is None or rows is None:
        indptr, rows = transpose_index(lists.idx_BHqM, lists.num_BHq, len(lists.kv_sizes))
    queries = vsa_index.query_blocks_of_keys(indptr, rows, lists.q_sizes)
    dk, dv = vsa_fine_backward.fine_dkv(*given, queries, *sizes, config_for("fine_dkv", q_BHQD))
    return dq, dk, dv


def transpose_index(
    idx_BHqM: Tensor, num_BHq: Tensor, num_key_blocks: int
) -> tuple[Tensor, Tensor]:
    """See ``index.transpose_index``; does not depend on the order in which programs run."""
    from megagen.kernels.triton import vsa_index

    return vsa_index.transpose_index(idx_BHqM, num_BHq, num_key_blocks)


def block_mean(x_BHPD: Tensor, sizes_n: Tensor) -> Tensor:
    """See ``reference.block_mean``."""
    from megagen.kernels.triton import vsa_coarse

    return vsa_coarse.block_mean(x_BHPD, sizes_n)


def select_topk(scores_BHqk: Tensor, sizes_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See ``reference.select_topk``."""
    from megagen.kernels.triton import vsa_select

    return vsa_select.select_topk(scores_BHqk, sizes_k, k)


def coarse_forward(
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    sizes_k: Tensor,
    k: int,
    scale: float,
    score_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.coarse_forward``; one kernel."""
    from megagen.kernels.triton import vsa_coarse

    return vsa_coarse.coarse_forward(qm_BHqD, km_BHkD, vm_BHkD, sizes_k, k, scale, score_dtype)


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
    """See ``reference.coarse_backward``.

    Means are tokens of a small dense attention: the fine stage's kernels with every block listed do
    it, once means of blocks that have tokens stand first. Nothing is read back by the host.
    """
    num_q, num_k = qm_BHqD.shape[2], km_BHkD.shape[2]
    has_tokens = sizes_k > 0
    order = torch.argsort(~has_tokens, stable=True)
    km, vm = (_padded(x.index_select(2, order)) for x in (km_BHkD, vm_BHkD))
    qm, oc, doc = (_padded(x) for x in (qm_BHqD, oc_BHqD, doc_BHqD))
    lse = torch.nn.functional.pad(lse_BHq, (0, qm.shape[2] - num_q), value=-torch.inf)
    lists = _everything(qm, km, has_tokens.sum())
    dq, dk, dv = fine_backward(doc, None, qm, km, vm, oc, lse, lists, scale)
    back = torch.argsort(order)
    dkm, dvm = (x[:, :, :num_k].index_select(2, back) for x in (dk, dv))
    return dq[:, :, :num_q].contiguous(), dkm, dvm


def tile_pool(x_BSHD: Tensor, slot_to_raster_P: Tensor, sizes_n: Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.tile_pool``; one pass."""
    from megagen.kernels.triton import vsa_glue

    return vsa_glue.tile_pool(x_BSHD, slot_to_raster_P, sizes_n)


def tile_pool_backward(
    dx_BHPD: Tensor, dmean_BHnD: Tensor, raster_to_slot_S: Tensor, sizes_n: Tensor
) -> Tensor:
    """See ``reference.tile_pool_backward``."""
    from megagen.kernels.triton import vsa_glue

    return vsa_glue.tile_pool_backward(dx_BHPD, dmean_BHnD, raster_to_slot_S, sizes_n)


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, raster_to_slot_S: Tensor
) -> Tensor:
    """See ``reference.untile_combine``; one pass."""
    from megagen.kernels.triton import vsa_glue

    return vsa_glue.untile_combine(o_BHPD, oc_BHnD, gate_BSHD, raster_to_slot_S)


def untile_combine_backward(
    do_BSHD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    slot_to_raster_P: Tensor,
    raster_to_slot_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``reference.untile_combine_backward``; one pass over the gradient."""
    from megagen.kernels.triton import vsa_glue

    return vsa_glue.untile_combine_backward(do_BSHD, oc_BHnD, gate_BSHD, slot_to_raster_P)


def _padded(x_BHnD: Tensor) -> Tensor:
    """Zeros up to whole blocks of 64 rows."""
    missing = -x_BHnD.shape[2] % BLOCK
    return torch.nn.functional.pad(x_BHnD, (0, 0, 0, missing)).contiguous()


def _everything(q_BHQD: Tensor, k_BHKD: Tensor, num_keys: Tensor) -> Lists:
    """Lists of every block, of which the first ``num_keys`` slots hold keys."""
    B, H, slots, _ = q_BHQD.shape
    num_q, num_k = slots // BLOCK, k_BHKD.shape[2] // BLOCK
    blocks = torch.arange(num_k, dtype=torch.int32, device=k_BHKD.device)
    idx = blocks.expand(B, H, num_q, num_k).contiguous()
    num = torch.full((B, H, num_q), num_k, dtype=torch.int32, device=idx.device)
    q_sizes = torch.full((num_q,), BLOCK, dtype=torch.int32, device=idx.device)
    kv_sizes = (num_keys - BLOCK * blocks).clamp(0, BLOCK).int()
    return Lists(idx, num, q_sizes, kv_sizes)
