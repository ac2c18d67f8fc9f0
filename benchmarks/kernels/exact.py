"""What every arm is held to: the formulas in float64, for some heads of a row.

Where a whole head is too much, the output's gradient is zero but for some query blocks, spread over
the video; then outputs and dq count in these alone, and dk and dv everywhere. Written from the
formulas on its own, not from the backends.

Legend: S tokens in raster order, P slots (64 a block), D head dim, n blocks, M places of a list,
C query blocks at a time, K keys of a list (64 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.problem import Problem
from megagen.kernels.vsa import BLOCK, BlockIndex

MOST_PAIRS = {"cpu": 1 << 26, "cuda": 1 << 31}
"""Pairs of a query and a key that one head may come to."""
_MOST_NUMBERS = 1 << 24
TOLERANCE = {
    torch.float32: {"out": 2e-5, "d": 5e-5, "selection": 1e-4},
    torch.bfloat16: {"out": 8e-3, "d": 2e-2, "selection": 5e-2},
}
"""Largest relative L2 error of outputs and of gradients, and how far below the right one a chosen
block's score may lie, by the spread of the scores."""

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """Which part of a row is compared.

    Args:
        heads: numbers of heads.
        blocks: numbers of query blocks, ascending.
        tokens: of these blocks, in raster order.
        grad: the problem's gradient, zero at other tokens.
    """

    heads: tuple[int, ...]
    blocks: Tensor
    tokens: Tensor
    grad: Tensor


def sample(problem: Problem, keys_per_query: int) -> Sample:
    """First and last head, and as many query blocks as ``MOST_PAIRS`` leaves."""
    row, device = problem.row, problem.device
    most = max(1, MOST_PAIRS[device.type] // (BLOCK * keys_per_query))
    n = row.layout.num_blocks
    blocks = torch.linspace(0, n - 1, min(most, n)).round().long().unique().to(device)
    block_of = row.layout.tables(device).raster_to_slot_S // BLOCK
    tokens = torch.isin(block_of, blocks).nonzero().flatten()
    grad = torch.zeros_like(problem.grad)
    grad[:, tokens] = problem.grad[:, tokens]
    return Sample(tuple(sorted({0, row.heads - 1})), blocks, tokens, grad)


def fine(problem: Problem, index: BlockIndex, some: Sample, head: int) -> Result:
    """``out``, ``dq``, ``dk`` and ``dv`` of the fine stage, ``[S, D]`` each."""
    given = [
        problem.ordered(x[:, :, head : head + 1], "slots")[0, 0].double()
        for x in (problem.q, problem.k, problem.v, some.grad)
    ]
    found = [torch.zeros_like(given[0]) for _ in range(4)]
    width = index.idx_BHqM.size(-1)
    at_a_time = max(1, _MOST_NUMBERS // (BLOCK * width * (BLOCK + 4 * given[0].size(-1))))
    for blocks in some.blocks.split(at_a_time):
        _attend(blocks, index.idx_BHqM[0, head], index.num_BHq[0, head], problem, given, found)
    order = problem.row.layout.tables(problem.device).raster_to_slot_S
    return {
        name: x.index_select(0, order)
        for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True)
    }


def _attend(
    blocks_C: Tensor,
    idx_nM: Tensor,
    num_n: Tensor,
    problem: Problem,
    given: list[Tensor],
    found: list[Tensor],
) -> None:
    """Adds what these query blocks contribute."""
    q, k, v, do = (x.view(-1, BLOCK, x.size(-1)) for x in given)
    out, dq, dk, dv = (x.view_as(q) for x in found)
    scale = q.size(-1) ** -0.5
    idx = idx_nM[blocks_C].long()
    slots = torch.arange(BLOCK, device=idx.device) < problem.sizes_n[idx][..., None]
    places = torch.arange(idx.size(1), device=idx.device) < num_n[blocks_C][:, None]
    is_seen = (slots & places[..., None]).flatten(1)[:, None]
    q_C, do_C = q[blocks_C], do[blocks_C]
    k_CKD, v_CKD = k[idx].flatten(1, 2), v[idx].flatten(1, 2)
    scores = (scale * q_C @ k_CKD.mT).masked_fill_(~is_seen, -torch.inf)
    weights = scores.softmax(-1)
    out[blocks_C] = weights @ v_CKD
    delta = (out[blocks_C] * do_C).sum(-1, keepdim=True)
    dscores = scale * weights * (do_C @ v_CKD.mT - delta)
    dq[blocks_C] = dscores @ k_CKD
    each = (-1, BLOCK, q.size(-1))
    dk.index_add_(0, idx.flatten(), (dscores.mT @ q_C).view(each))
    dv.index_add_(0, idx.flatten(), (weights.mT @ do_C).view(each))


def layer(problem: Problem, index: BlockIndex, some: Sample, head: int) -> Result:
    """The whole layer with these lists: ``fine`` and the gated coarse output; also ``dgate``."""
    found = fine(problem, index, some, head)
    tensors = (problem.q, problem.k, problem.v, problem.gate)
    leaves = [x[0, :, head].double().requires_grad_() for x in tensors]
    q, k, v = (_means(problem, x) for x in leaves[:3])
    weights = (q @ k.T * q.size(-1) ** -0.5).softmax(-1)
    out = leaves[3] * (weights @ v)[_block_of(problem)]
    grads = torch.autograd.grad(out, leaves, some.grad[0, :, head].double())
    for name, grad in zip(("dq", "dk", "dv"), grads[:3], strict=True):
        found[name] = found[name] + grad
    return {**found, "out": found["out"] + out.detach(), "dgate": grads[3]}


def selection_error(problem: Problem, index: BlockIndex, head: int) -> float:
    """How far the worst chosen score lies below the k-th best, by the scores' spread."""
    q, k = (_means(problem, x[0, :, head].double()) for x in (problem.q, problem.k))
    scores = q @ k.T * q.size(-1) ** -0.5
    kth = scores.topk(index.idx_BHqM.size(-1)).values[:, -1]
    worst = scores.gather(-1, index.idx_BHqM[0, head].long()).amin(-1)
    return float(((kth - worst).clamp(min=0).max() / scores.std()).detach())


def errors(
    problem: Problem,
    order: str,
    found: Mapping[str, Tensor],
    exact: Result,
    some: Sample,
    head: int,
) -> dict[str, float]:
    """Relative L2 error of each result of an arm; ``out`` where it was computed."""
    seen = {}
    for name, x in found.items():
        one, wanted = problem.head(x, order, head).double(), exact[name]
        if name == "out":
            one, wanted = one[some.tokens], wanted[some.tokens]
        seen[name] = float(((one - wanted).norm() / wanted.norm()).detach())
    return seen


def complaint(found: Mapping[str, float], dtype: torch.dtype) -> str | None:
    """What is beyond ``TOLERANCE``, in words; None: nothing."""
    limits = TOLERANCE[dtype]
    bad = [
        f"{name} {error:.1e} > {limit:g}"
        for name, error in found.items()
        if not error <= (limit := limits.get(name, limits["d"]))  # nan too
    ]
    return ", ".join(bad) or None


def _block_of(problem: Problem) -> Tensor:
    return problem.row.layout.tables(problem.device).raster_to_slot_S // BLOCK


def _means(problem: Problem, x_SD: Tensor) -> Tensor:
    sums = x_SD.new_zeros(problem.sizes_n.numel(), x_SD.size(-1))
    return sums.index_add(0, _block_of(problem), x_SD) / problem.sizes_n[:, None]
