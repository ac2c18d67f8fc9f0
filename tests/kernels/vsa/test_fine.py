"""The fine stage of every backend that this machine has, held to the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagen.kernels import BlockIndex, block_sparse_attention
from megagen.kernels.vsa.backends import reference
from megagen.kernels.vsa.index import Lists as BackendLists
from tests.kernels.vsa import definition
from tests.kernels.vsa.backends import EXACT, KINDS, Kind, error, serve

Lists = list[list[list[list[int]]]]
pytestmark = pytest.mark.parametrize("kind", KINDS)
RAGGED_Q, RAGGED_K = [64, 1, 60, 0, 16], [4, 64, 0, 8, 60, 1, 33]


class Case:
    """Random tensors and lists with rows of 0, 1, some and all key blocks.

    Args:
        kind: of the tensors.
        generator: of all draws.
        q_sizes, kv_sizes: real tokens of the blocks.
        dim: of heads.
        scale: of all inputs.
    """

    def __init__(
        self,
        kind: Kind,
        generator: torch.Generator,
        q_sizes: list[int] = RAGGED_Q,
        kv_sizes: list[int] = RAGGED_K,
        dim: int = 64,
        scale: float = 1.0,
    ) -> None:
        serve(kind, dim)
        self.kind, self.q_sizes, self.kv_sizes = kind, q_sizes, kv_sizes
        # scores grow with the square, and a softmax passes their absolute error on
        is_half = kind.dtype in (torch.bfloat16, torch.float16)
        self.slack = 1.0 if is_half else max(1.0, scale**2 / 4)

        def draw(blocks: int) -> Tensor:
            return torch.randn(2, 2, 64 * blocks, dim, generator=generator)

        num_q, num_k = len(q_sizes), len(kv_sizes)
        self.qkv = [scale * draw(n) for n in (num_q, num_k, num_k)]
        self.do = draw(num_q)
        self.dlse = torch.randn(2, 2, 64 * num_q, generator=generator)
        counts = [0, 1, num_k, *[max(1, num_k // 2)] * num_q]
        self.lists: Lists = [
            [
                [
                    sorted(torch.randperm(num_k, generator=generator)[: counts[i + b + h]].tolist())
                    for i in range(num_q)
                ]
                for h in range(2)
            ]
            for b in range(2)
        ]

    def index(self) -> BlockIndex:
        num_k = len(self.kv_sizes)
        rows = [[[r + [0] * (num_k - len(r)) for r in h] for h in b] for b in self.lists]
        nums = [[[len(r) for r in h] for h in b] for b in self.lists]
        idx, num = (torch.tensor(x, dtype=torch.int32) for x in (rows, nums))
        return BlockIndex(*self.kind.to(idx, num))

    def sizes(self) -> list[Tensor]:
        both = (self.q_sizes, self.kv_sizes)
        return self.kind.to(*(torch.tensor(x, dtype=torch.int32) for x in both))

    def real(self, sizes: list[int]) -> Tensor:
        return (torch.arange(64) < torch.tensor(sizes)[:, None]).flatten()

    def found(self, **options: Any) -> dict[str, Tensor]:
        """What our function makes of it; the LSE takes a gradient too where a row has one."""
        leaves = [x.requires_grad_() for x in self.kind.to(*self.qkv)]
        call = {"backend": self.kind.backend, **options}
        out, lse = block_sparse_attention(*leaves, self.index(), *self.sizes(), **call)
        do, dlse = self.kind.to(self.do, self.dlse)
        loss = (out * do).sum() + torch.where(lse.isfinite(), lse * dlse.to(lse.dtype), 0).sum()
        loss.backward()
        return {"out": out.detach(), "lse": lse.detach(), **grads(leaves)}

    def expected(self) -> dict[str, Tensor]:
        """The same in float64 from the same rounded inputs."""
        exact = [x.cpu().double().requires_grad_() for x in self.kind.to(*self.qkv)]
        out, lse = definition.fine(*exact, self.lists, self.q_sizes, self.kv_sizes)
        do, dlse = (x.cpu().double() for x in self.kind.to(self.do, self.dlse))
        ((out * do).sum() + torch.where(lse.isfinite(), lse * dlse, 0).sum()).backward()
        return {"out": out.detach(), "lse": lse.detach(), **grads(exact)}


def grads(leaves: list[Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True):
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def compare(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    kind = case.kind
    assert error(found["out"], expected["out"]) < kind.out * case.slack
    for name in ("dq", "dk", "dv"):
        assert error(found[name], expected[name]) < kind.grad * case.slack, name
        ratio = found[name].double().norm().cpu() / expected[name].norm()
        assert 0.99 < ratio < 1.01
    finite = expected["lse"].isfinite()
    assert torch.equal(found["lse"].isfinite().cpu(), finite)
    difference = found["lse"].cpu().double()[finite] - expected["lse"][finite]
    largest = float(expected["lse"][finite].abs().max())
    assert difference.abs().max() < min(kind.lse * max(1.0, largest), max(1e-3, 2e-6 * largest))
    # nothing lands in empty slots
    assert not found["out"].cpu()[:, :, ~case.real(case.q_sizes)].any()
    assert not found["dq"].cpu()[:, :, ~case.real(case.q_sizes)].any()
    for name in ("dk", "dv"):
        assert not found[name].cpu()[:, :, ~case.real(case.kv_sizes)].any()


def of_its_own_forward(case: Case, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients in fp64 of the very output and LSE that were found.

    Where one score outweighs the others, ``dP - delta`` is what is left of two large numbers: it
    shows how the output was rounded, which no backward can undo.
    """
    index, sizes = case.index(), case.sizes()
    lists = BackendLists(*(x.cpu() for x in (index.idx_BHqM, index.num_BHq, *sizes)))
    exact = [x.cpu().double() for x in case.kind.to(*case.qkv, case.do, case.dlse)]
    *qkv, do, dlse = exact
    made = (x.cpu().double() for x in (found["out"], found["lse"]))
    grads = reference.fine_backward(do, dlse, *qkv, *made, lists, qkv[0].size(-1) ** -0.5)
    return dict(zip(("dq", "dk", "dv"), grads, strict=True))


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_ragged_blocks_of_different_numbers(
    kind: Kind, scale: float, seeded: torch.Generator
) -> None:
    case = Case(kind, seeded, scale=scale)
    found, expected = case.found(), case.expected()
    if scale > 4 and kind.dtype == torch.bfloat16:  # see there
        expected |= of_its_own_forward(case, found)
    compare(case, found, expected)


@pytest.mark.parametrize("dim", [24, 128])
def test_other_head_dims(kind: Kind, dim: int, seeded: torch.Generator) -> None:
    case = Case(kind, seeded, dim=dim)
    compare(case, case.found(), case.expected())


def test_all_blocks_is_dense_attention(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded, [64] * 3, [64] * 5)
    case.lists = [[[list(range(5))] * 3] * 2] * 2
    found = case.found()["out"]
    exact = [x.cpu().double() for x in kind.to(*case.qkv)]
    dense = torch.nn.functional.scaled_dot_product_attention(*exact)
    assert error(found, dense) < kind.out
    if kind.dtype == torch.bfloat16:
        q, k, v = (x.float() for x in exact)
        weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
        rounded = (weights.bfloat16().float() @ v).bfloat16()
        allowed = (rounded.double() - dense).abs().max()
        assert (found.cpu().double() - dense).abs().max() <= 2 * allowed, "an element is far off"


def test_one_block_each(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded, [64, 60, 64], [60, 64, 16])
    case.lists = [[[[2], [0], [0]], [[1], [1], [1]]], [[[0], [1], [2]], [[2], [2], [2]]]]
    compare(case, case.found(), case.expected())


def test_what_stands_in_empty_slots_changes_nothing(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded)
    clean = case.found()
    for x, sizes in zip(case.qkv, (case.q_sizes, case.kv_sizes, case.kv_sizes), strict=True):
        x[:, :, ~case.real(sizes)] = 1e4
    case.do[:, :, ~case.real(case.q_sizes)] = -1e4
    for name, value in case.found().items():
        assert torch.equal(value, clean[name]), name


def test_every_run_gives_the_same_bits(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded)
    first, second = case.found(), case.found()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputation_gives_the_same_bits(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded)
    plain = case.found()
    leaves = [x.requires_grad_() for x in kind.to(*case.qkv)]
    do, dlse = kind.to(case.do, case.dlse)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(q, k, v, case.index(), *case.sizes(), backend=kind.backend)

    out, lse = checkpoint(attend, *leaves, use_reentrant=False)
    loss = (out * do).sum() + torch.where(lse.isfinite(), lse * dlse.to(lse.dtype), 0).sum()
    loss.backward()
    for name, grad in grads(leaves).items():
        assert torch.equal(grad, plain[name])


def test_the_scale_is_an_argument(kind: Kind, seeded: torch.Generator) -> None:
    case = Case(kind, seeded)
    found = case.found(scale=0.3)["out"]
    exact = [x.cpu().double() for x in kind.to(*case.qkv)]
    expected, _ = definition.fine(*exact, case.lists, case.q_sizes, case.kv_sizes, 0.3)
    assert error(found, expected) < kind.out


def test_torch_agrees_that_it_is_an_operator(kind: Kind, seeded: torch.Generator) -> None:
    if kind is not EXACT:
        pytest.skip("once is enough")
    case = Case(kind, seeded, [3], [2, 4], dim=4)
    leaves = [x.requires_grad_() for x in kind.to(*case.qkv)]
    index, sizes = case.index(), case.sizes()
    given = (*leaves, index.idx_BHqM, index.num_BHq, *sizes, 0.5, kind.backend, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megagen.vsa_fine.default, given, test_utils=tests)


def test_wrong_arguments_are_refused(kind: Kind) -> None:
    if kind is not EXACT:
        pytest.skip("once is enough")
    q = torch.zeros(1, 1, 64, 8)
    one = torch.ones(1, dtype=torch.int32)
    index = BlockIndex(one.view(1, 1, 1, 1) * 0, one.view(1, 1, 1))

    def call(**changed: Any) -> None:
        given = {"q_BHQD": q, "k_BHKD": q, "v_BHKD": q, "index": index}
        block_sparse_attention(**{**given, "q_sizes": one, "kv_sizes": one, **changed})

    call()
    for match, changed in {
        "one B and H": {"k_BHKD": torch.zeros(1, 2, 64, 8), "v_BHKD": torch.zeros(1, 2, 64, 8)},
        "types must agree": {"k_BHKD": q.double(), "v_BHKD": q.double()},
        "64 slots need": {"q_BHQD": torch.zeros(1, 1, 63, 8)},
        "the index must be": {"index": BlockIndex(index.idx_BHqM, index.num_BHq[0])},
        "q_sizes must be int32": {"q_sizes": one.long()},
        "backend must be": {"backend": "tensorrt"},
    }.items():
        with pytest.raises(ValueError, match=match):
            call(**changed)
