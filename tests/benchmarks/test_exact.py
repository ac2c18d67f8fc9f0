"""What arms are held to, against autograd through dense masked attention in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import exact, lists
from benchmarks.kernels.problem import Problem, make, smooth_field
from benchmarks.kernels.rows import HEAD_DIM, Row
from megagen.kernels.vsa import BLOCK, BlockIndex

ROW = Row("ragged", (5, 6, 10), 2, 3)


def drawn(generator: torch.Generator) -> Problem:
    q, k, v, gate, grad = (torch.randn(1, 300, 2, HEAD_DIM, generator=generator) for _ in range(5))
    index = lists.random_lists(ROW.layout, 2, 3, generator)
    return Problem(ROW, "random", index, q, k, v, gate, grad)


def block_of() -> Tensor:
    return ROW.layout.tables().raster_to_slot_S // BLOCK


def by_autograd(
    problem: Problem, index: BlockIndex, grad: Tensor, head: int, *, is_layer: bool
) -> dict[str, Tensor]:
    """The formulas token by token in raster order."""
    given = (problem.q, problem.k, problem.v, problem.gate)
    q, k, v, gate = leaves = [x[0, :, head].double().requires_grad_() for x in given]
    block, listed = block_of(), index.idx_BHqM[0, head].long()
    is_seen = (listed[block][:, None, :] == block[None, :, None]).any(-1)
    scale = HEAD_DIM**-0.5
    out = (scale * q @ k.T).masked_fill(~is_seen, -torch.inf).softmax(-1) @ v
    if is_layer:
        mean = torch.nn.functional.one_hot(block).double()
        mean = (mean / mean.sum(0)).T
        coarse = (scale * (mean @ q) @ (mean @ k).T).softmax(-1) @ (mean @ v)
        out = out + gate * coarse[block]
    used = leaves if is_layer else leaves[:3]
    grads = torch.autograd.grad(out, used, grad[0, :, head].double())
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=False))}


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-10 * wanted.norm())


@pytest.mark.parametrize("is_layer", [False, True])
@pytest.mark.parametrize("most", [1 << 26, 4 * BLOCK * 3 * BLOCK], ids=["whole", "sampled"])
def test_it_is_attention(
    most: int, is_layer: bool, seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exact.MOST_PAIRS, "cpu", most)
    monkeypatch.setattr(exact, "_MOST_NUMBERS", 1 << 18)  # several turns
    problem = drawn(seeded)
    some = exact.sample(problem, BLOCK * 3)
    assert (len(some.blocks) == ROW.layout.num_blocks) == (most == 1 << 26)
    for head in some.heads:
        compute = exact.layer if is_layer else exact.fine
        found = compute(problem, problem.index, some, head)
        wanted = by_autograd(problem, problem.index, some.grad, head, is_layer=is_layer)
        assert close(found["out"][some.tokens], wanted.pop("out")[some.tokens])
        for name, grad in wanted.items():
            assert close(found[name], grad), name


def test_all_blocks_are_dense_attention(seeded: torch.Generator) -> None:
    problem = drawn(seeded)
    some = exact.sample(problem, ROW.layout.padded)
    found = exact.fine(problem, problem.every, some, 1)
    q, k, v = (x[:, :, 1:].transpose(1, 2).double() for x in (problem.q, problem.k, problem.v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]
    assert close(found["out"][some.tokens], wanted[some.tokens])


def test_a_wrong_result_is_named(seeded: torch.Generator) -> None:
    problem = drawn(seeded)
    some = exact.sample(problem, BLOCK * 3)
    wanted = exact.fine(problem, problem.index, some, 0)
    right = {name: x[None, None].expand(1, 2, -1, -1) for name, x in wanted.items()}
    seen = exact.errors(problem, "bhsd", right, wanted, some, 0)
    assert exact.complaint(seen, torch.float32) is None
    for name in right:
        for bad in (1.001 * right[name], right[name] * torch.nan):
            one = exact.errors(problem, "bhsd", {**right, name: bad}, wanted, some, 0)
            said = exact.complaint(one, torch.float32)
            assert said is not None and name in said


def test_the_best_blocks_and_no_others(seeded: torch.Generator) -> None:
    problem = make(ROW, "smooth", torch.device("cpu"), torch.float32)
    assert exact.selection_error(problem, problem.index, 0) < 1e-5
    other = lists.random_lists(ROW.layout, 2, 3, seeded)
    assert exact.selection_error(problem, other, 0) > 1e-2


def test_smooth_inputs_are_alike_nearby(seeded: torch.Generator) -> None:
    row = Row("field", (8, 16, 16), 1, 4)
    field = smooth_field(row, seeded)[0, :, 0].view(8, 16, 16, HEAD_DIM)
    assert field.std() == pytest.approx(1, rel=1e-3)
    near = (field[:, :, 1:] * field[:, :, :-1]).mean() / field.square().mean()
    far = (field[:, :, -1:] * field[:, :, :1]).mean() / field.square().mean()
    assert near > 0.8
    assert far < 0.5


def test_an_unknown_kind_of_list_is_refused() -> None:
    with pytest.raises(ValueError, match="random, local, smooth"):
        make(ROW, "global", torch.device("cpu"), torch.float32)
