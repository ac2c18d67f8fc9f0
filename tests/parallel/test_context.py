"""Context-parallel attention of every kind against dense attention in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagen.parallel import ring
from megagen.parallel.context import context_attention
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)


def make(num_tokens: int, seed: int) -> list[Tensor]:
    """q, k, v and the output's gradient, ``[S, 2, 4, 6]`` in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_tokens, 2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(4)
    ]


def errors(dims: ParallelDims, num_tokens: int, seed: int) -> list[float]:
    """Largest relative error of output and gradients over this rank's valid tokens."""
    mesh = Mesh.build(dims)
    *inputs, grad = make(num_tokens, seed)
    whole = [x.requires_grad_() for x in inputs]
    expected = dense(*whole)
    expected.backward(grad)
    size = -(-num_tokens // dims.cp_size)
    padding = (0, 0, 0, 0, 0, 0, 0, dims.cp_size * size - num_tokens)
    part = slice(mesh.cp_rank * size, (mesh.cp_rank + 1) * size)

    def own(x: Tensor, fill: float = 0.0) -> Tensor:
        return F.pad(x.detach(), padding, value=fill)[part]

    # what stands in the padding must not matter
    shards = [own(x, fill=50.0).float().requires_grad_() for x in inputs]
    a2a_group, ring_group = mesh.pg.hcp or (None, None)
    out = context_attention(
        *shards,
        num_tokens=num_tokens,
        group_cp=mesh.pg.cp,
        comm_type=dims.cp_comm_type,
        a2a_group=a2a_group,
        ring_group=ring_group,
        attend=dense,
    )
    assert out.shape == shards[0].shape and out.isfinite().all()
    out.backward(own(grad).float())
    valid = max(0, min(size, num_tokens - part.start))
    pairs = [(out, own(expected))] + [
        (s.grad, own(w.grad)) for s, w in zip(shards, whole, strict=True)
    ]
    for shard in shards:
        assert not shard.grad[valid:].any(), "padding got a gradient"
    return [
        ((a[:valid].double() - b[:valid]).abs().max() / b.abs().max()).item() if valid else 0.0
        for a, b in pairs
    ]


@pytest.mark.parametrize("num_tokens", [12, 13, 5])
@pytest.mark.parametrize(
    ("size", "kind", "a2a"),
    [
        (1, "a2a", None),
        (2, "a2a", None),
        (4, "a2a", None),
        (2, "all_gather", None),
        (2, "p2p", None),
        (4, "p2p", None),
        (4, "a2a+p2p", 2),
    ],
)
def test_equals_dense_attention(size: int, kind: Any, a2a: int | None, num_tokens: int) -> None:
    dims = ParallelDims(cp_size=size, cp_comm_type=kind, cp_a2a_size=a2a)
    found = run_ranks(size, errors, dims, num_tokens, seeds.fresh())
    assert max(max(rank) for rank in found) < 5e-6


def test_ring_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "MAX_SCORES", 8 * 7 * 2)  # two queries at a time
    dims = ParallelDims(cp_size=2, cp_comm_type="p2p")
    found = run_ranks(2, errors, dims, 13, seeds.fresh())
    assert max(max(rank) for rank in found) < 5e-6


def large_scores() -> float:
    """Scores of several hundred neither overflow nor vanish in the ring."""
    q, k, v, _ = (100 * x.float() for x in make(8, 3))
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    group = dist.group.WORLD
    out = ring.ring_attention(q[part], k[part], v[part], 8, group)
    return (out - dense(q, k, v)[part]).abs().max().item() / 100


def test_ring_of_large_scores() -> None:
    assert max(run_ranks(2, large_scores)) < 1e-4
