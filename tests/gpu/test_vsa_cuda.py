"""The CUDA kernels of video sparse attention on a Hopper GPU: the whole list of what they must do.

The tests of tests/kernels/vsa run on this backend too; here is what only it has.
"""

from __future__ import annotations

import pytest
import torch

from megagen.core.process import device
from megagen.kernels.vsa.backends import cuda, reference
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.probe import GatherProbe
from tests.kernels.cuda.cases import (
    Case,
    check,
    check_backward,
    check_combine_backward,
    draw,
    error,
    expect,
    popular,
    rounded_reference,
    run,
)

pytestmark = pytest.mark.gpu
TINY = (1, 4, 8, 16, 60)


@pytest.fixture(autouse=True)
def hopper() -> None:
    like = torch.empty(64, dtype=torch.bfloat16, device=device())
    reason = cuda.serves(like)
    if reason is not None:
        pytest.skip(reason)


def drawn(generator: torch.Generator, **options: object) -> Case:
    return draw(generator, **options).to(device())  # type: ignore[arg-type]


@pytest.mark.parametrize("backward", [cuda.fine_backward, cuda.fine_backward_fast])
@pytest.mark.parametrize("magnitude", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dim", [64, 128])
def test_ragged_blocks_at_every_scale(  # type: ignore[no-untyped-def]
    dim: int, magnitude: float, backward, seeded: torch.Generator
) -> None:
    case = drawn(seeded, num_q=33, num_k=71, width=40, dim=dim, magnitude=magnitude, batch=2)
    found = run(case, backward)
    check_backward(case, found)
    if magnitude == 16:  # what o's rounding leaves of the gradients is not the backward's doing
        check(case, {name: found[name] for name in ("o", "lse")})
        return
    check(case, found, grad_limit=1e-2 if magnitude == 1 else 2e-2)
    for name, exact in expect(case).items():
        if name.startswith("d"):
            assert 0.99 < found[name].double().norm() / exact.norm() < 1.01, name


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("sizes", [(64,), (60,), TINY, (0, 64), (0, *TINY, 64)], ids=str)
@pytest.mark.parametrize("blocks", [(1, 1), (1, 9), (8, 1), (7, 13)], ids=str)
def test_sizes_and_numbers_of_blocks(
    dim: int, sizes: tuple[int, ...], blocks: tuple[int, int], seeded: torch.Generator
) -> None:
    num_q, num_k = blocks
    case = drawn(seeded, num_q=num_q, num_k=num_k, width=num_k, dim=dim, sizes=sizes)
    check(case, run(case, cuda.fine_backward))


@pytest.mark.parametrize("dim", [64, 128])
def test_forward_in_fp16(dim: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=33, num_k=71, width=40, dim=dim, dtype=torch.float16)
    check(case, run(case, None))


@pytest.mark.parametrize("width", [1, 24])
@pytest.mark.parametrize("dim", [64, 128])
def test_one_block_each_and_all_blocks(dim: int, width: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=24, num_k=24, width=width, dim=dim, sizes=(64,), full=True)
    found = run(case, cuda.fine_backward)
    check(case, found)
    if width == 24:
        tensors = (x.float() for x in (case.q, case.k, case.v))
        dense = torch.nn.functional.scaled_dot_product_attention(*tensors)
        assert error(found["o"], dense) < 5e-3


def test_no_element_is_far_off(seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=16, num_k=16, width=16, dim=128, sizes=(64,), full=True)
    exact = expect(case)["o"]
    allowed = (rounded_reference(case).double() - exact).abs().max()
    assert (run(case, None)["o"].double() - exact).abs().max() <= 2 * allowed


@pytest.mark.parametrize("dim", [64, 128])
def test_every_run_gives_the_same_bits(dim: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=150, num_k=150, width=60, dim=dim, batch=2)
    first = run(case, cuda.fine_backward)
    for _ in range(20):
        for name, value in run(case, cuda.fine_backward).items():
            assert torch.equal(value, first[name]), name


def test_a_popular_key_block(seeded: torch.Generator) -> None:
    """Lists of very different lengths on the key side: the ring turns hundreds of times."""
    case = popular(drawn(seeded, num_q=400, num_k=40, width=3, dim=128, full=True))
    for backward in (cuda.fine_backward, cuda.fine_backward_fast):
        check(case, run(case, backward))


@pytest.mark.parametrize("num_q", [1, 75, 1440])
def test_lists_are_those_of_the_definition(num_q: int, seeded: torch.Generator) -> None:
    lists = drawn(seeded, num_q=num_q, num_k=270, width=100).lists
    found = cuda.transpose_index(lists.idx_BHqM, lists.num_BHq, 270)
    host = Lists(*(x.cpu() for x in vars(lists).values() if x is not None))
    wanted = reference.transpose_index(host.idx_BHqM, host.num_BHq, 270)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_epilogue_combines_and_untiles(dim: int, seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=21, num_k=30, width=9, dim=dim, batch=2)
    is_real = (torch.arange(64, device=device()) < case.lists.q_sizes[:, None]).flatten()
    tokens = int(is_real.sum())
    token_Q = torch.full_like(is_real, -1, dtype=torch.int32)
    token_Q[is_real] = torch.randperm(tokens, generator=seeded).int().to(device())
    gate = torch.randn(2, tokens, 2, dim, generator=seeded).bfloat16().to(device())
    coarse = torch.randn(2, 2, 21, dim, generator=seeded).bfloat16().to(device())
    given = (case.q, case.k, case.v, case.lists, case.scale, gate, coarse, token_Q)
    out, o, lse = cuda.fine_forward_combined(*given)
    assert o is not None
    check(case, {"o": o, "lse": lse})
    spread = coarse.double().repeat_interleave(64, 2)[:, :, is_real].transpose(1, 2)
    places = token_Q[is_real].long()
    wanted = torch.zeros_like(out, dtype=torch.float64)
    wanted[:, places] = expect(case)["o"][:, :, is_real].transpose(1, 2)
    wanted[:, places] += gate.double()[:, places] * spread
    assert error(out, wanted) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_gradient_of_the_epilogue(
    dim: int, dtype: torch.dtype, seeded: torch.Generator
) -> None:
    check_combine_backward(seeded, device(), dim, dtype)


def test_addresses_beyond_32_bits(seeded: torch.Generator) -> None:
    """4.3 GB of queries: the last sequence is where it should be."""
    small = drawn(seeded, num_q=4, num_k=4, width=3, dim=128)
    count = (1 << 31) // (4 * 64 * 128 * 2) + 1
    lists = small.lists
    wide = Lists(
        *(x.expand(count, *x.shape[1:]).contiguous() for x in (lists.idx_BHqM, lists.num_BHq)),
        lists.q_sizes,
        lists.kv_sizes,
    )
    q, k, v = (x.expand(count, *x.shape[1:]).contiguous() for x in (small.q, small.k, small.v))
    o, lse = cuda.fine_forward(q, k, v, wide, small.scale)
    alone, alone_lse = cuda.fine_forward(small.q, small.k, small.v, lists, small.scale)
    assert torch.equal(o[-1:], alone) and torch.equal(lse[-1:], alone_lse)


def test_it_can_be_captured(seeded: torch.Generator) -> None:
    """No host synchronisation: forward and backward go into a CUDA graph."""
    case = drawn(seeded, num_q=9, num_k=9, width=5)
    expected = run(case, cuda.fine_backward)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(case, cuda.fine_backward)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(case, cuda.fine_backward)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_probe_runs(seeded: torch.Generator) -> None:
    case = drawn(seeded, num_q=64, num_k=64, width=20, dim=128, full=True)
    probe = GatherProbe.of(case.k, case.v, case.lists)
    probe.launch()
    torch.cuda.synchronize()
    assert probe.num_bytes() > 0
