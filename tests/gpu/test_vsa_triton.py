"""Video sparse attention in compiled Triton at sizes that fill a GPU.

tests/kernels/vsa and tests/kernels/triton run on this backend too, with a few blocks.
"""

from __future__ import annotations

import pytest
import torch

from megagen.core.process import device
from megagen.kernels.vsa.backends import triton as backend
from tests.kernels.cuda.cases import (
    Case,
    check,
    check_backward,
    draw,
    expect,
    popular,
    rounded_reference,
    run,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def served() -> None:
    reason = backend.serves(torch.empty(64, dtype=torch.bfloat16, device=device()))
    if reason is not None:
        pytest.skip(reason)


def drawn(generator: torch.Generator, **options: object) -> Case:
    return draw(generator, **options).to(device())  # type: ignore[arg-type]


def both(case: Case) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the backend."""
    return run(case, backend.fine_backward, backend.fine_forward)


@pytest.mark.parametrize("magnitude", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_ragged_blocks_at_every_scale(dim: int, magnitude: float, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=33, num_k=71, width=40, dim=dim, magnitude=magnitude, batch=2)
    found = both(case)
    check_backward(case, found)
    if magnitude == 16:  # what o's rounding leaves of the gradients is not the backward's doing
        check(case, {name: found[name] for name in ("o", "lse")})
        return
    check(case, found, grad_limit=1e-2 if magnitude == 1 else 2e-2)
    for name, exact in expect(case).items():
        if name.startswith("d"):
            assert 0.99 < found[name].double().norm() / exact.norm() < 1.01, name


@pytest.mark.parametrize("width", [1, 24])
@pytest.mark.parametrize("dim", [64, 128])
def test_one_block_each_and_all_blocks(dim: int, width: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=24, num_k=24, width=width, dim=dim, sizes=(64,), full=True)
    found = both(case)
    check(case, found)
    if width == 24:
        exact = expect(case)["o"]
        allowed = (rounded_reference(case).double() - exact).abs().max()
        assert (found["o"].double() - exact).abs().max() <= 2 * allowed


@pytest.mark.parametrize("dim", [64, 128])
def test_every_run_gives_the_same_bits(dim: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=150, num_k=150, width=60, dim=dim, batch=2)
    first = both(case)
    for _ in range(20):
        for name, value in both(case).items():
            assert torch.equal(value, first[name]), name


def test_a_popular_key_block(seeded: torch.Generator) -> None:
    case = popular(drawn(seeded, num_q=400, num_k=40, width=3, dim=128, full=True))
    check(case, both(case))


def test_it_can_be_captured(seeded: torch.Generator) -> None:
    """No host synchronisation: forward and backward go into a CUDA graph."""
    case = drawn(seeded, num_q=9, num_k=9, width=5)
    expected = both(case)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both(case)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(case)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
