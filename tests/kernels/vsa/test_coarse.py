"""The coarse stage, block means and the selection of every backend, held to the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megagen.kernels import block_mean, coarse_attention, select_topk
from megagen.kernels.vsa import dispatch
from tests.kernels.vsa import definition
from tests.kernels.vsa.backends import EXACT, KINDS, Kind, error, serve

kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = [64, 3, 0, 60, 16, 64, 1, 0, 8]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@kinds
def test_means_are_of_real_tokens(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    x = torch.randn(2, 2, 64 * len(SIZES), 64, generator=seeded)
    grad = torch.randn(2, 2, len(SIZES), 64, generator=seeded)
    (ours,), (sizes,) = kind.to(x), kind.to(int32(SIZES))
    exact = ours.cpu().double().requires_grad_()
    means = block_mean(ours.requires_grad_(), sizes, backend=kind.backend)
    expected = definition.mean(exact, SIZES)
    assert error(means, expected) < kind.out
    means.backward(*kind.to(grad))
    expected.backward(*(g.cpu().double() for g in kind.to(grad)))
    assert ours.grad is not None and exact.grad is not None
    assert error(ours.grad, exact.grad) < kind.grad
    assert not means.detach().cpu()[:, :, [2, 7]].any()


@kinds
@pytest.mark.parametrize("topk", [1, 3, 7, 9])
def test_attention_over_means(kind: Kind, topk: int, seeded: torch.Generator) -> None:
    serve(kind, 64)
    drawn = [torch.randn(2, 2, n, 64, generator=seeded) for n in (5, 9, 9)]
    leaves = [x.requires_grad_() for x in kind.to(*drawn)]
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    (sizes,) = kind.to(int32(SIZES))
    out, lse, index = coarse_attention(*leaves, sizes, topk=topk, backend=kind.backend)
    q, k, v = exact
    real = [j for j, size in enumerate(SIZES) if size]
    scores = q @ k.mT / 8
    expected = scores[..., real].softmax(-1) @ v[:, :, real]
    assert error(out, expected) < kind.out
    assert (lse.cpu() - scores[..., real].logsumexp(-1)).abs().max() < max(kind.lse, 1e-5)
    grad = torch.randn(out.shape, generator=seeded)
    out.backward(*kind.to(grad))
    expected.backward(*(g.cpu().double() for g in kind.to(grad)))
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert error(ours.grad, theirs.grad) < kind.grad
    count = min(topk, len(real))
    assert index.num_BHq.dtype == index.idx_BHqM.dtype == torch.int32
    assert (index.num_BHq == count).all() and index.idx_BHqM.size(-1) == topk
    assert index.idx_BHqM[..., :count].tolist() == definition.best(scores, SIZES, topk)
    assert not index.idx_BHqM[..., count:].any()


@kinds
def test_ties_go_to_the_lower_block(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    # whole numbers, so that every backend finds the very same scores
    k = torch.randint(-3, 4, (1, 2, 4, 64), generator=seeded).float()
    k = k[:, :, [0, 1, 0, 2, 1, 0, 3, 3, 0]]
    q = torch.randint(-3, 4, (1, 2, 6, 64), generator=seeded).float()
    (qm, km), (sizes,) = kind.to(q, k), kind.to(int32([64] * 9))
    *_, index = coarse_attention(qm, km, km, sizes, topk=4, backend=kind.backend)
    scores = (qm.double() @ km.double().mT).cpu()
    assert index.idx_BHqM.tolist() == definition.best(scores, [1] * 9, 4)
    *_, index = coarse_attention(qm * 0, km, km, sizes, topk=4, backend=kind.backend)
    assert (index.idx_BHqM.cpu() == torch.arange(4)).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("topk", [1, 5, 64, 200, 300])
def test_selection_is_exact(backend: str, topk: int, seeded: torch.Generator) -> None:
    if dispatch.backend(backend).serves(torch.zeros(64)) is not None:
        pytest.skip(f"no {backend} backend here")
    scores = torch.randn(1, 2, 3, 300, generator=seeded)
    scores[0, 1] = (4 * scores[0, 1]).round()  # many ties
    scores[0, 0, 0, :50] = -math.inf
    scores[0, 0, 1] = -0.0
    scores[0, 0, 1, ::3] = 0.0
    sizes = (torch.rand(300, generator=seeded) < 0.9).int() * 7
    select = dispatch.function(backend, "select_topk")
    idx, num = select(scores, sizes, topk)
    count = min(topk, int((sizes > 0).sum()))
    assert (num == count).all() and idx.shape[-1] == topk
    found = idx[..., :count].tolist()
    assert found == definition.best(scores.double(), sizes.tolist(), topk)
    assert torch.equal(select_topk(scores, sizes, topk).idx_BHqM, idx)


def test_bf16_scores_round_as_a_product_in_bf16_would(seeded: torch.Generator) -> None:
    q, k = (torch.randn(1, 1, n, 64, generator=seeded).bfloat16() for n in (128, 200))
    sizes = int32([64] * 200)
    *_, index = coarse_attention(q, k, k, sizes, topk=20, score_dtype="bf16", backend="reference")
    rounded = ((q.float() @ k.float().mT).bfloat16() * 0.125).double()
    assert index.idx_BHqM.tolist() == definition.best(rounded, [1] * 200, 20)
    *_, exact = coarse_attention(q, k, k, sizes, topk=20, backend="reference")
    assert not torch.equal(exact.idx_BHqM, index.idx_BHqM)


def test_formulas_of_the_coarse_gradient(seeded: torch.Generator) -> None:
    drawn = [
        torch.randn(1, 2, n, 3, generator=seeded, dtype=torch.float64, requires_grad=True)
        for n in (3, 4, 4)
    ]
    sizes = int32([64, 0, 1, 5])

    def attend(*means: Tensor) -> Tensor:
        return coarse_attention(*means, sizes, topk=2, backend=EXACT.backend)[0]

    assert torch.autograd.gradcheck(attend, drawn)


def test_wrong_arguments_are_refused() -> None:
    mean, sizes = torch.zeros(1, 1, 2, 8), int32([1, 1])
    with pytest.raises(ValueError, match="topk must be at least 1"):
        coarse_attention(mean, mean, mean, sizes, topk=0)
    with pytest.raises(ValueError, match="score_dtype"):
        coarse_attention(mean, mean, mean, sizes, topk=1, score_dtype="fp16")
    with pytest.raises(ValueError, match="means must be alike"):
        coarse_attention(mean, mean, mean, int32([1]), topk=1)
