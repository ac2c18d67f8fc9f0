"""Video sparse attention on the CPU against torch's dense attention and FlexAttention.

Arms take turns; ours is held to the definition in fp64 before it is timed, and every row has the
rate of a matrix product measured between them.

Legend: B batch, H heads, S slots, D head dim, n blocks.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import Timing, time_once
from megagen.kernels.vsa.backends import cpu, reference
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK

HEAD_DIM, TOLERANCE = 128, 2e-5
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One shape: a name, heads, and real tokens of each block."""

    name: str
    heads: int
    sizes: Tensor
    selected: int


def measure(row: Row, repeats: int, *, with_flex: bool) -> dict[str, Any]:
    """Best seconds of every arm, and what follows from them."""
    generator = torch.Generator().manual_seed(0)
    n = row.sizes.numel()
    q, k, v, do = (
        torch.randn(1, row.heads, n * BLOCK, HEAD_DIM, generator=generator) for _ in range(4)
    )
    lists = random_lists(row, generator)
    scale = HEAD_DIM**-0.5
    out, lse = cpu.fine_forward(q, k, v, lists, scale)
    error = relative_error(q, k, v, lists, scale, out)
    if error > TOLERANCE:
        raise SystemExit(f"{row.name}: relative error {error:.1e} against fp64: not timed")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dense = scaled_dot_product_attention(*leaves)
    a = torch.randn(1024, 1024, generator=generator)
    arms: dict[str, Callable[[], Any]] = {
        "ours_forward": lambda: cpu.fine_forward(q, k, v, lists, scale),
        "dense_forward": lambda: scaled_dot_product_attention(q, k, v),
        "ours_backward": lambda: cpu.fine_backward(do, None, q, k, v, out, lse, lists, scale),
        "dense_backward": lambda: torch.autograd.grad(dense, leaves, do, retain_graph=True),
        "product": lambda: a @ a,
    }
    if with_flex:
        arms["flex_forward"] = flex_arm(q, k, v, lists, out)
    best = interleaved(arms, repeats)
    return {"selected": row.selected, "blocks": n, "error": error, **figures(row, lists, best)}


def random_lists(row: Row, generator: torch.Generator) -> Lists:
    """``selected`` key blocks for each query block, and their transpose."""
    n = row.sizes.numel()
    scores = torch.rand(1, row.heads, n, n, generator=generator)
    idx, num = cpu.select_topk(scores, row.sizes, row.selected)
    return Lists(idx, num, row.sizes, row.sizes, *cpu.transpose_index(idx, num, n))


def relative_error(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, out: Tensor
) -> float:
    """Of the first head, against the definition in fp64."""
    head = Lists(
        lists.idx_BHqM[:, :1].contiguous(), lists.num_BHq[:, :1], lists.q_sizes, lists.kv_sizes
    )
    exact, _ = reference.fine_forward(*(x[:, :1].double() for x in (q, k, v)), head, scale)
    return float((out[:, :1] - exact).norm() / exact.norm())


def flex_arm(q: Tensor, k: Tensor, v: Tensor, lists: Lists, wanted: Tensor) -> Callable[[], Any]:
    """FlexAttention's compiled forward over the same full blocks; compiled and checked here."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    n = lists.kv_sizes.numel()
    idx = torch.zeros(*lists.num_BHq.shape, n, dtype=torch.int32)
    idx[..., : lists.idx_BHqM.size(-1)] = lists.idx_BHqM
    none = torch.zeros_like(lists.num_BHq)
    mask = BlockMask.from_kv_blocks(none, idx, lists.num_BHq, idx, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention)
    found = compiled(q, k, v, block_mask=mask)
    assert float((found - wanted).norm() / wanted.norm()) < TOLERANCE
    return lambda: compiled(q, k, v, block_mask=mask)


def interleaved(arms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """The best of each arm over rounds in which every arm runs once."""
    rounds = [{name: time_once(run) for name, run in arms.items()} for _ in range(repeats)]
    return {
        name: Timing(min(r[name].process for r in rounds), min(r[name].wall for r in rounds))
        for name in arms
    }


def figures(row: Row, lists: Lists, best: dict[str, Timing]) -> dict[str, Any]:
    """Milliseconds, ratios by process time and wall, GFLOP/s on selected blocks and real tokens."""
    pairs = int(lists.num_BHq.sum())
    keys = lists.kv_sizes[lists.idx_BHqM.long()].sum(-1)
    tokens = int((keys * lists.q_sizes).sum())
    per_second = {"forward": 4 * HEAD_DIM, "backward": 10 * HEAD_DIM}
    peak = 2 * 1024**3 / best["product"].wall / 1e9
    found: dict[str, Any] = {"product_gflops": peak, "flex_over_ours": NOT_MEASURED}
    for what, flop in per_second.items():
        ours, dense = best[f"ours_{what}"], best[f"dense_{what}"]
        blocks_rate = flop * pairs * BLOCK**2 / ours.wall / 1e9
        found[what] = {
            "ms": 1e3 * ours.wall,
            "process_ms": 1e3 * ours.process,
            "dense_ms": 1e3 * dense.wall,
            "dense_over_ours_process": dense.process / ours.process,
            "dense_over_ours_wall": dense.wall / ours.wall,
            "gflops_blocks": blocks_rate,
            "gflops_tokens": flop * tokens / ours.wall / 1e9,
            "share_of_product": blocks_rate / peak,
        }
    if "flex_forward" in best:
        found["flex_over_ours"] = best["flex_forward"].process / best["ours_forward"].process
    found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found
