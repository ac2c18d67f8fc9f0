"""The repaired interpreter rounds and multiplies bf16 as a GPU does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def round_kernel(X, Y, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(Y + places, tl.load(X + places).to(tl.bfloat16))


@triton.jit
def product(A, B, C, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    places = rows * SIZE + columns
    tl.store(C + places, tl.dot(tl.load(A + places), tl.load(B + places)))


def test_rounds_to_nearest_even(device: str, seeded: torch.Generator) -> None:
    x = torch.randn(1024, generator=seeded)
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, -0.0])
    x = x.to(device)
    y = torch.empty(1024, dtype=torch.bfloat16, device=device)
    round_kernel[(1,)](x, y, 1024)
    assert torch.equal(y.nan_to_num(7), x.to(torch.bfloat16).nan_to_num(7))


def test_multiplies(device: str, seeded: torch.Generator) -> None:
    a, b = (torch.randn(32, 32, generator=seeded).to(device, torch.bfloat16) for _ in range(2))
    c = torch.empty(32, 32, device=device)
    product[(1,)](a, b, c, 32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
