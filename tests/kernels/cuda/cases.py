"""Random inputs of the CUDA kernels, and what the definition makes of them.

Legend: B batch, H heads, Q K query and key slots (64 a block), D head dim, M places of a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagen.kernels.vsa.backends import cuda, reference
from megagen.kernels.vsa.index import Lists

EVERY_SIZE = (0, 1, 4, 16, 17, 33, 48, 49, 60, 63, 64, 64, 64)
"""Of blocks: at and beside each length that the kernels treat apart."""


@dataclass(frozen=True)
class Case:
    """Inputs with garbage in their empty slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    lists: Lists
    scale: float

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Case:
        """On another device, or in another type."""
        lists = Lists(*(x.to(device) for x in vars(self.lists).values() if x is not None))
        tensors = (x.to(device, dtype) for x in (self.q, self.k, self.v, self.do))
        return Case(*tensors, self.dlse.to(device), lists, self.scale)


def draw(
    generator: torch.Generator,
    *,
    num_q: int = 5,
    num_k: int = 9,
    width: int = 6,
    dim: int = 64,
    sizes: tuple[int, ...] = EVERY_SIZE,
    magnitude: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    full: bool = False,
) -> Case:
    """A case of two heads; ``full``: every list has ``width`` entries, else 0 to ``width``."""

    def normal(blocks: int, factor: float, block_sizes: Tensor) -> Tensor:
        x = factor * torch.randn(batch, 2, 64 * blocks, dim, generator=generator)
        pads = (torch.arange(64) >= block_sizes[:, None]).flatten()
        x[:, :, pads] = 1e3 * torch.randn(batch, 2, int(pads.sum()), dim, generator=generator)
        return x.to(dtype)

    def pick(blocks: int) -> Tensor:
        chosen = torch.randint(0, len(sizes), (blocks,), generator=generator)
        return torch.tensor(sizes, dtype=torch.int32)[chosen]

    q_sizes, kv_sizes = pick(num_q), pick(num_k)
    scores = torch.rand(batch, 2, num_q, num_k, generator=generator)
    num = torch.randint(width if full else 0, width + 1, (batch, 2, num_q), generator=generator)
    idx = torch.zeros(batch, 2, num_q, width, dtype=torch.int32)
    for place in torch.cartesian_prod(*map(torch.arange, num.shape)).tolist():
        b, h, i = place
        n = int(num[b, h, i])
        idx[b, h, i, :n] = scores[b, h, i].topk(n).indices.sort().values.int()
    lists = Lists(idx, num.int(), q_sizes, kv_sizes)
    q, do = normal(num_q, magnitude, q_sizes), normal(num_q, 1.0, q_sizes)
    k, v = normal(num_k, magnitude, kv_sizes), normal(num_k, magnitude, kv_sizes)
    dlse = torch.randn(q.shape[:-1], generator=generator)
    return Case(q, k, v, do, dlse, lists, 1 / math.sqrt(dim))


def popular(case: Case) -> Case:
    """The same where every query block lists the first key block, whose own list is long."""
    idx, num = case.lists.idx_BHqM.clone(), case.lists.num_BHq
    assert (num > 0).all()
    idx[..., 0] = 0
    return replace(case, lists=replace(case.lists, idx_BHqM=idx))


def run(
    case: Case,
    backward: Callable[..., tuple[Tensor, ...]] | None,
    forward: Callable[..., tuple[Tensor, Tensor]] = cuda.fine_forward,
) -> dict[str, Tensor]:
    """Outputs of the CUDA kernels, or of others, and gradients where there is a backward."""
    o, lse = forward(case.q, case.k, case.v, case.lists, case.scale)
    found = {"o": o, "lse": lse}
    if backward is not None:
        given = (case.do, case.dlse, case.q, case.k, case.v, o, lse, case.lists, case.scale)
        found |= dict(zip(("dq", "dk", "dv"), backward(*given), strict=True))
    return found


def expect(case: Case) -> dict[str, Tensor]:
    """The definition in fp64, of the same rounded inputs without their garbage."""
    q, k, v, do, dlse = exactly(case)
    o, lse = reference.fine_forward(q, k, v, case.lists, case.scale)
    grads = reference.fine_backward(do, dlse, q, k, v, o, lse, case.lists, case.scale)
    return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def exactly(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do and dlse in fp64, zeros in their empty slots."""
    pads_q, pads_k = (
        (torch.arange(64, device=sizes.device) >= sizes[:, None]).flatten()[:, None]
        for sizes in (case.lists.q_sizes, case.lists.kv_sizes)
    )
    q, do = (x.double().masked_fill(pads_q, 0) for x in (case.q, case.do))
    k, v = (x.double().masked_fill(pads_k, 0) for x in (case.k, case.v))
    return q, k, v, do, case.dlse.double().masked_fill(pads_q[:, 0], 0)


def check_backward(case: Case, found: dict[str, Tensor], limit: float = 4e-3) -> None:
    """Each gradient in fp64 of the very ``o`` and LSE that were found.

    Where one score outweighs the others, ``dP - delta`` is what is left of two large numbers: it
    shows how ``o`` was rounded, which no backward can undo. All that this one adds are the
    roundings of P, dS and its results.
    """
    q, k, v, do, dlse = exactly(case)
    given = (do, dlse, q, k, v, found["o"].double(), found["lse"].double())
    wanted = reference.fine_backward(*given, case.lists, case.scale)
    for name, gradient in zip(("dq", "dk", "dv"), wanted, strict=True):
        assert error(found[name], gradient) < limit, name


def rounded_reference(case: Case) -> Tensor:
    """What torch makes of all blocks with bf16 operands and weights: what the format allows."""
    scores = case.scale * (case.q.float() @ case.k.float().transpose(-1, -2))
    weights = scores.softmax(-1)
    return (weights.bfloat16().float() @ case.v.float()).bfloat16()


def check(case: Case, found: dict[str, Tensor], *, grad_limit: float = 1e-2) -> None:
    """The bars: outputs 5e-3, LSE 1e-3 absolute, gradients 1e-2; zeros where nothing is."""
    expected = expect(case)
    is_reached = expected["lse"].isfinite()
    assert torch.equal(found["lse"].isfinite(), is_reached)
    assert (found["lse"][~is_reached] == -torch.inf).all()
    assert (found["o"][~is_reached] == 0).all()
    gap = (found["lse"] - expected["lse"])[is_reached].abs()
    assert not gap.numel() or gap.max() < 1e-3, gap.max()
    for name in found.keys() - {"lse"}:
        limit = 5e-3 if name == "o" else grad_limit
        is_nothing = (expected[name] == 0).all(-1)
        assert (found[name][is_nothing] == 0).all(), name
        assert error(found[name], expected[name]) < limit, name


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN counts as infinite."""
    norm = expected.double().norm()
    value = (found.double() - expected.double()).norm() / norm.clamp(min=1e-300)
    return float(value.nan_to_num(nan=torch.inf)) if norm else float(found.double().norm())


def check_combine_backward(
    generator: torch.Generator, device: torch.device, dim: int, dtype: torch.dtype
) -> None:
    """The gradient of ``o + gate * coarse``, in fp64 by autograd."""
    num_q, batch = 7, 2
    sizes = torch.randint(0, 65, (num_q,), generator=generator)
    is_real = (torch.arange(64) < sizes[:, None]).flatten()
    tokens = int(is_real.sum())
    token_Q = torch.full((64 * num_q,), -1, dtype=torch.int32)
    token_Q[is_real] = torch.randperm(tokens, generator=generator).int()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    grad, gate = normal(batch, tokens, 2, dim), normal(batch, tokens, 2, dim)
    coarse = normal(batch, 2, num_q, dim)
    given = (x.to(device) for x in (grad, gate, coarse, token_Q))
    tiled, dgate, dcoarse = cuda.combine_backward(*given)

    o = torch.zeros(batch, 2, 64 * num_q, dim, dtype=torch.float64, requires_grad=True)
    leaves = [x.double().requires_grad_() for x in (gate, coarse)]
    places = token_Q[is_real].long()
    spread = leaves[1].repeat_interleave(64, 2)[:, :, is_real].transpose(1, 2)
    own = o[:, :, is_real].transpose(1, 2)
    out = own + leaves[0][:, places] * spread
    exact = torch.autograd.grad(out, [o, *leaves], grad[:, places].double())
    assert torch.equal(tiled.cpu().double(), exact[0])
    for found, expected in zip((dgate, dcoarse), exact[1:], strict=True):
        assert error(found.cpu(), expected) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
