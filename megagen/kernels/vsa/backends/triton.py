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
