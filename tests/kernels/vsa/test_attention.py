"""The whole of video sparse attention, from tokens to tokens, held to the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagen.kernels import BlockIndex, VSALayout, tile, untile, vsa_attention
from megagen.kernels.vsa import VSAAux, dispatch
from tests.kernels.vsa import definition
from tests.kernels.vsa.backends import EXACT, KINDS, Kind, error, serve

kinds = pytest.mark.parametrize("kind", KINDS)
GRID, TILE = (5, 6, 7), (4, 4, 4)
PREFIX = torch.tensor([0, 1])


def drawn(
    generator: torch.Generator, layout: VSALayout, count: int = 4, dim: int = 64, heads: int = 2
) -> list[Tensor]:
    """Tensors ``[2, S, H, D]`` that are views with the tokens outermost, as a network has them."""
    shape = (count, layout.num_tokens, 2, heads, dim)
    return list(torch.randn(shape, generator=generator).transpose(1, 2))


def choice(index: BlockIndex, scores: Tensor, topk: int, kind: Kind) -> list[Any]:
    """The listed blocks, after a check that none better was left out.

    Means of bf16 tokens are rounded before they are compared, so that of two blocks which nearly
    tie either may be taken; with the other types the lists are the exact ones.
    """
    chosen = index.idx_BHqM.cpu()
    assert (index.num_BHq == topk).all() and (chosen.diff(dim=-1) > 0).all()
    bound = scores.topk(topk).values[..., -1:]
    slack = 4 * torch.finfo(torch.bfloat16).eps * float(scores.std())
    slack = slack if kind.dtype == torch.bfloat16 else 1e-6
    assert (scores.gather(-1, chosen.long()) >= bound - slack).all()
    return chosen.tolist()


def with_grads(tensors: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors]


@kinds
@pytest.mark.parametrize("has_gate", [True, False])
def test_it_is_its_definition(kind: Kind, has_gate: bool, seeded: torch.Generator) -> None:
    serve(kind, 64)
    layout = VSALayout(GRID, TILE)
    leaves = with_grads(kind.to(*drawn(seeded, layout, 4 if has_gate else 3)))
    exact = with_grads([x.detach().cpu().double() for x in leaves])
    options: dict[str, Any] = {"layout": layout, "topk": 3, "backend": kind.backend}
    out, aux = vsa_attention(*leaves, **options, return_aux=True)
    blocks = definition.tokens_of_blocks(GRID, TILE)
    scores = definition.block_scores(*exact[:2], blocks, blocks).detach()
    chosen = choice(aux.index, scores, 3, kind)
    gate = exact[3] if has_gate else None
    expected = definition.attention(*exact[:3], gate, blocks, blocks, chosen)
    assert error(out, expected) < kind.out
    grad = torch.randn(out.shape, generator=seeded)
    out.backward(*kind.to(grad))
    expected.backward(*(g.cpu().double() for g in kind.to(grad)))
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # bf16 rounds the means before anything is made of them
        assert error(ours.grad, theirs.grad) < 2 * kind.grad


@kinds
def test_queries_and_keys_may_have_grids_of_their_own(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    queries, keys = VSALayout((1, 6, 7), (1, 8, 8)), VSALayout((3, 6, 7), (1, 8, 8))
    q, gate = kind.to(*drawn(seeded, queries, 2))
    k, v = kind.to(*drawn(seeded, keys, 2))
    call = {"layout": queries, "kv_layout": keys, "topk": 2, "backend": kind.backend}
    out, aux = vsa_attention(q, k, v, gate, **call, return_aux=True)
    both = [definition.tokens_of_blocks(x.grid, x.tile) for x in (queries, keys)]
    exact = [x.cpu().double() for x in (q, k, v, gate)]
    chosen = choice(aux.index, definition.block_scores(*exact[:2], *both), 2, kind)
    assert error(out, definition.attention(*exact, *both, chosen)) < kind.out


@kinds
def test_all_blocks_with_a_gate_of_zero_is_dense(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    layout = VSALayout(GRID, TILE)
    q, k, v = kind.to(*drawn(seeded, layout, 3))
    out = vsa_attention(q, k, v, torch.zeros_like(q), layout=layout, topk=99, backend=kind.backend)
    assert isinstance(out, Tensor)
    dense = F.scaled_dot_product_attention(*(x.cpu().double().transpose(1, 2) for x in (q, k, v)))
    assert error(out, dense.transpose(1, 2)) < kind.out


def test_the_dense_route_has_the_same_numbers(
    seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = VSALayout(GRID, TILE)
    found = []
    for routes in ((), ("cpu",)):
        monkeypatch.setattr(dispatch, "_DENSE_IS_FASTER", routes)
        leaves = with_grads(drawn(torch.Generator().manual_seed(1), layout))
        out, aux = vsa_attention(*leaves, layout=layout, topk=8, return_aux=True)
        assert (aux.lse is None) == bool(routes)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves if x.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@kinds
def test_tiled_input_gives_tiled_output(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    layout = VSALayout(GRID, TILE, prefix=70)
    tensors = kind.to(*drawn(seeded, layout))
    call = {"layout": layout, "topk": 3, "backend": kind.backend}
    raster = vsa_attention(*tensors, **call)
    slots = [tile(x, layout) for x in tensors]
    is_real = (layout.tables().slot_to_raster_P >= 0).to(slots[0].device)
    slots[3][:, :, ~is_real] = 5.0  # of the gate: nothing may come of it
    tiled = vsa_attention(*slots, input="tiled_bhsd", **call)
    assert isinstance(raster, Tensor) and isinstance(tiled, Tensor)
    assert error(untile(tiled, layout), raster.double().cpu()) < kind.out
    assert not tiled[:, :, ~is_real].any()


@kinds
def test_a_prefix_sees_all_and_is_seen_by_all(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    prefix, layout = 70, VSALayout(GRID, TILE, prefix=70)
    tensors = kind.to(*drawn(seeded, layout))
    out, aux = vsa_attention(*tensors, layout=layout, topk=2, return_aux=True, backend=kind.backend)
    q, k, v, gate = (x.cpu().double().transpose(1, 2) for x in tensors)
    dense = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    assert error(out[:, :prefix], dense.transpose(1, 2)) < kind.out
    blocks = definition.tokens_of_blocks(GRID, TILE, prefix)
    means = [torch.stack([x[:, :, b].mean(2) for b in blocks], 2) for x in (q, k, v)]
    scores = means[0] @ means[1].mT / 8
    coarse = (scores.softmax(-1) @ means[2])[:, :, 2:]
    assert (aux.index.num_BHq == 4).all() and (aux.index.idx_BHqM[..., :2].cpu() == PREFIX).all()
    video = BlockIndex(aux.index.idx_BHqM[..., 2:] - 2, aux.index.num_BHq - 2)
    chosen = choice(video, scores[:, :, 2:, 2:], 2, kind)
    expected = torch.zeros_like(q)
    for b in range(2):
        for h in range(2):
            for i, rows in enumerate(blocks[2:]):
                picked = [0, 1, *(2 + j for j in chosen[b][h][i])]
                keys = [token for j in picked for token in blocks[j]]
                fine = F.scaled_dot_product_attention(
                    q[b, h, rows][None], k[b, h, keys][None], v[b, h, keys][None]
                )[0]
                expected[b, h, rows] = fine + coarse[b, h, i] * gate[b, h, rows]
    assert error(out[:, prefix:], expected[:, :, prefix:].transpose(1, 2)) < kind.out


def test_formulas_of_every_gradient(seeded: torch.Generator) -> None:
    layout = VSALayout((1, 2, 3), (1, 2, 2), prefix=1)
    leaves = with_grads([x.double().detach() for x in drawn(seeded, layout, dim=2, heads=1)])

    def attend(*tensors: Tensor) -> Tensor:
        out = vsa_attention(*tensors, layout=layout, topk=1, backend=EXACT.backend)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


class FiveSteps:
    """Query, key, value and gate projections trained through it, in fp32 beside the backend."""

    def __init__(self, generator: torch.Generator) -> None:
        self.layout = VSALayout((4, 4, 8), (4, 4, 4))
        tokens = self.layout.num_tokens
        self.x = torch.randn(1, tokens, 64, generator=generator)
        self.target = torch.randn(1, tokens, 1, 64, generator=generator)
        self.start = 0.1 * torch.randn(4, 64, 64, generator=generator)

    def losses(self, like: Kind) -> tuple[list[float], float]:
        """The losses, and the smallest lead of a chosen block, in deviations of the scores."""
        weight = self.start.to(like.device, copy=True).requires_grad_()
        (hidden,), (goal,) = like.to(self.x), like.to(self.target)
        optimizer = torch.optim.SGD([weight], lr=20.0)
        blocks = definition.tokens_of_blocks(self.layout.grid, self.layout.tile)
        found, lead = [], math.inf
        for _ in range(5):
            projected = (hidden @ weight[n].to(like.dtype) for n in range(4))
            q, k, v, gate = (y.unflatten(-1, (1, 64)) for y in projected)
            scores = definition.block_scores(
                q.detach().double(), k.detach().double(), blocks, blocks
            )
            lead = min(lead, float(scores.diff(dim=-1).abs().min() / scores.std()))
            options: dict[str, Any] = {"layout": self.layout, "topk": 1, "backend": like.backend}
            out = vsa_attention(q, k, v, gate, **options)
            assert isinstance(out, Tensor)
            loss = (out.float() - goal.float()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found, lead


@kinds
def test_five_steps_follow_the_reference(kind: Kind, seeded: torch.Generator) -> None:
    serve(kind, 64)
    reference = Kind("reference", kind.device, torch.float32, 0, 0, 0)
    steps = FiveSteps(seeded)
    expected, lead = steps.losses(reference)
    while lead < 0.1:  # of blocks that nearly tie bf16 may choose the other, and the losses part
        steps = FiveSteps(seeded)
        expected, lead = steps.losses(reference)
    assert expected[-1] < 0.99 * expected[0]
    tolerance = 2e-2 if kind.dtype == torch.bfloat16 else 1e-4
    assert steps.losses(kind)[0] == pytest.approx(expected, rel=tolerance)


def test_recomputation_gives_the_same_bits(seeded: torch.Generator) -> None:
    layout = VSALayout(GRID, TILE)
    given = drawn(seeded, layout)
    found = []
    for is_recomputed in (False, True):
        leaves = with_grads([x.detach().clone() for x in given])

        def attend(*tensors: Tensor) -> Tensor:
            out = vsa_attention(*tensors, layout=layout, topk=3)
            assert isinstance(out, Tensor)
            return out

        out = checkpoint(attend, *leaves, use_reentrant=False) if is_recomputed else attend(*leaves)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    assert all(map(torch.equal, *found))


def test_torch_compiles_it_whole(seeded: torch.Generator) -> None:
    layout = VSALayout((4, 4, 8), (4, 4, 4))
    layout.tables("cpu")
    given = drawn(seeded, layout, dim=8, heads=1)

    def attend(*tensors: Tensor) -> Tensor:
        out = vsa_attention(*tensors, layout=layout, topk=1, backend="reference")
        assert isinstance(out, Tensor)
        return out.sin()

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = with_grads([x.detach().clone() for x in given])
        out = function(*leaves)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shapes_are_known_without_data() -> None:
    layout = VSALayout(GRID, TILE)
    q = torch.empty(2, layout.num_tokens, 3, 16, device="meta")
    out, aux = vsa_attention(q, q, q, q, layout=layout, topk=3, return_aux=True)
    assert out.shape == q.shape and isinstance(aux, VSAAux)
    assert aux.index.idx_BHqM.shape == (2, 3, layout.num_blocks, 3)


def test_wrong_arguments_are_refused() -> None:
    layout = VSALayout(GRID, TILE)
    q = torch.zeros(1, layout.num_tokens, 1, 8)
    with pytest.raises(ValueError, match="210 tokens or slots"):
        vsa_attention(q, q[:, 1:], q, layout=layout, topk=1)
    with pytest.raises(ValueError, match="gate must be like q"):
        vsa_attention(q, q, q, q[..., :4], layout=layout, topk=1)
    with pytest.raises(ValueError, match="topk must be at least 1"):
        vsa_attention(q, q, q, layout=layout, topk=0)
    with pytest.raises(ValueError, match="input must be"):
        vsa_attention(q, q, q, layout=layout, topk=1, input="bshd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not serve"):
        vsa_attention(q, q, q, layout=layout, topk=1, backend="triton")
