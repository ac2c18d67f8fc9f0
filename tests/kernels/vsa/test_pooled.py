"""Attention of blocks with means that are there already, and the epilogue that combines.

The CUDA kernels run on the emulated processor of ``tests/kernels/cuda``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.kernels import VSALayout, vsa_attention
from megagen.kernels.vsa import Pooled, dispatch, vsa_attention_pooled, wants_pooled
from megagen.kernels.vsa.backends import cuda
from megagen.kernels.vsa.tile import tile_pool
from tests.kernels.cuda.emulated import Emulated, built, emulated
from tests.kernels.vsa.backends import error

__all__ = ["built", "emulated"]
GRID, TILE = (3, 5, 7), (2, 4, 4)


def drawn(generator: torch.Generator, layout: VSALayout, dim: int) -> list[Tensor]:
    return list(torch.randn(4, 2, layout.num_tokens, 2, dim, generator=generator))


def pooled(x: Tensor, layout: VSALayout, backend: str) -> Pooled:
    return Pooled(*tile_pool(x, layout, backend))


@pytest.mark.parametrize("prefix", [0, 70])
@pytest.mark.parametrize("has_gate", [True, False])
def test_blocks_or_tokens_are_the_same(
    prefix: int, has_gate: bool, seeded: torch.Generator
) -> None:
    layout = VSALayout(GRID, TILE, prefix)
    given = drawn(seeded, layout, 8)[: 4 if has_gate else 3]
    do = torch.randn(given[0].shape, generator=seeded)
    found = []
    for is_pooled in (False, True):
        leaves = [x.double().requires_grad_() for x in given]
        options: dict[str, Any] = {"layout": layout, "topk": 3, "backend": "reference"}
        if is_pooled:
            qkv = (pooled(x, layout, "reference") for x in leaves[:3])
            out = vsa_attention_pooled(*qkv, *leaves[3:], **options)
        else:
            made = vsa_attention(*leaves, **options)
            assert isinstance(made, Tensor)
            out = made
        out.backward(do.double())
        found.append([out.detach(), *(x.grad for x in leaves)])
    assert all(map(torch.equal, *found))


@pytest.fixture
def cuda_serves(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The backend ``cuda`` serves CPU tensors. Of each call of its epilogue: whether o is kept."""
    forward, calls = cuda.fine_forward_combined, []

    def combined(*args: Any, keep: bool) -> Any:
        calls.append(keep)
        return forward(*args, keep=keep)

    monkeypatch.setattr(cuda, "serves", lambda q: None)
    monkeypatch.setattr(cuda, "fine_forward_combined", combined)
    dispatch._choose.cache_clear()
    yield calls
    dispatch._choose.cache_clear()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_deterministic", [True, False])
def test_the_epilogue_of_the_cuda_kernels_combines(
    is_deterministic: bool, cuda_serves: list[bool], seeded: torch.Generator
) -> None:
    layout = VSALayout(GRID, TILE)
    given = [x.bfloat16() for x in drawn(seeded, layout, 64)]
    do = torch.randn(given[0].shape, generator=seeded).bfloat16()
    options: dict[str, Any] = {"layout": layout, "topk": 8}  # all of them: no tie to decide
    exact = [x.double().requires_grad_() for x in given]
    expected = vsa_attention(*exact, **options)
    assert isinstance(expected, Tensor)
    expected.backward(do.double())
    leaves = [x.requires_grad_() for x in given]
    options |= {"backend": "cuda", "deterministic": is_deterministic}
    out, aux = vsa_attention(*leaves, **options, return_aux=True)
    out.backward(do)
    assert cuda_serves == [True] and aux.lse is not None and not aux.lse.requires_grad
    assert error(out, expected) < 5e-3
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert error(ours.grad, theirs.grad) < 2e-2
    with torch.no_grad():
        again = vsa_attention(*leaves, **options)
    assert cuda_serves == [True, False] and isinstance(again, Tensor) and torch.equal(again, out)


@pytest.mark.timeout(900)
def test_without_a_gate_it_goes_from_stage_to_stage(
    cuda_serves: list[bool], seeded: torch.Generator
) -> None:
    layout = VSALayout(GRID, TILE)
    q, k, v, _ = (x.bfloat16() for x in drawn(seeded, layout, 64))
    found = vsa_attention(q, k, v, layout=layout, topk=8, backend="cuda")
    expected = vsa_attention(*(x.double() for x in (q, k, v)), layout=layout, topk=8)
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    assert not cuda_serves and error(found, expected) < 5e-3


def test_who_wants_blocks(cuda_serves: list[bool]) -> None:
    layout = VSALayout(GRID, TILE)
    like = torch.empty(3, 64, dtype=torch.bfloat16)
    assert wants_pooled(like, layout, 2, "cuda")
    assert not wants_pooled(like, layout, 2, "reference")
    if dispatch.backend("cpu").serves(like) is None:
        assert not wants_pooled(like, layout, 2, "cpu")  # it reads raster order


def test_wrong_blocks_are_refused(seeded: torch.Generator) -> None:
    layout = VSALayout(GRID, TILE)
    q, k, v, gate = (pooled(x, layout, "reference") for x in drawn(seeded, layout, 8))
    options: dict[str, Any] = {"layout": layout, "topk": 2}
    with pytest.raises(ValueError, match=r"means of k must be \(2, 2, 8, 8\)"):
        vsa_attention_pooled(q, Pooled(k.slots, k.mean[:, :, 1:]), v, **options)
    with pytest.raises(ValueError, match=r"gate must be \(2, 105, 2, 8\)"):
        vsa_attention_pooled(q, k, v, gate.slots, **options)
    with pytest.raises(ValueError, match=r"gate must be like q, torch\.float32"):
        gate_BSHD = torch.zeros(2, 105, 2, 8, dtype=torch.float64)
        vsa_attention_pooled(q, k, v, gate_BSHD, **options)
    with pytest.raises(ValueError, match="one number of heads"):
        vsa_attention_pooled(q, *(Pooled(x.slots[:, :1], x.mean[:, :1]) for x in (k, v)), **options)
