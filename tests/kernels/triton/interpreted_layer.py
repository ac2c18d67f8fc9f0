"""A layer's norm and sparse attention with blocks made by the norm, interpreted or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.vsa import VSAOptions
from megagen.layers.norm import norm_heads
from megagen.layers.sparse import (
    frames_layout,
    makes_blocks,
    normed_sparse_attention,
    sparse_attention,
)
from tests.kernels.vsa.backends import error


class OneRank:
    """A group of one."""

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("padding", [0, 3])
def test_one_pass_is_norm_and_attention(device: str, padding: int, seeded: torch.Generator) -> None:
    """Tokens in a fused projection; with padding behind them, of which nothing comes."""
    options = VSAOptions(sparsity=0.0, tile=(2, 4, 4), kernels="triton")
    layout = frames_layout(options, [2], 5, 6)
    count, total = layout.num_tokens, layout.num_tokens + padding
    projected = torch.randn(total, 1, 2, 4, 64, generator=seeded).bfloat16().to(device)
    angle = 7 * torch.randn(total, 32, generator=seeded).double()
    tables = [t.float().to(device) for t in (angle.cos(), angle.sin())]
    weights = [(1 + 0.3 * torch.randn(128, generator=seeded)).to(device) for _ in range(2)]
    do = torch.randn(total, 1, 2, 64, generator=seeded).bfloat16().to(device)
    attention: dict[str, Any] = {"options": options, "sparsity": None, "layout": layout}
    norm: dict[str, Any] = {"eps": 1e-6, "tp_group": OneRank()}
    found: list[list[Tensor]] = []
    for is_fused in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in (projected, *weights)]
        q, k, v, gate = leaves[0].unbind(3)
        assert makes_blocks(q, options, None, layout)
        if is_fused:
            out = normed_sparse_attention(q, k, v, gate, leaves[1:], *tables, **norm, **attention)
            assert out.shape == do.shape and not out[count:].any()
        else:
            cos, sin = tables
            q, k = norm_heads([q, k], leaves[1:], cos=cos, sin=sin, **norm)
            out = sparse_attention(*(x[:count] for x in (q, k, v, gate)), **attention)
        out[:count].backward(do[:count])
        grads = [x.grad for x in leaves if x.grad is not None]
        found.append([out[:count].detach(), *grads])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs.double().cpu()) < 1e-2
