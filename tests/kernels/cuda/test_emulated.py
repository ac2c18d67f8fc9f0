"""The CUDA kernels' source on the emulated processor, held to the definition in fp64.

Lists, merges, transposes and both backwards run as they would on a GPU, by way of the backend.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.backends import cuda, reference
from megagen.kernels.vsa.index import BlockIndex, map_from_index, transpose_index
from megagen.kernels.vsa.probe import GatherProbe
from tests.kernels.cuda.cases import (
    Case,
    check,
    check_backward,
    check_combine_backward,
    draw,
    error,
    expect,
    rounded_reference,
    run,
)
from tests.kernels.cuda.emulated import Emulated
from tests.kernels.vsa import test_attention
from tests.kernels.vsa.backends import Kind

pytestmark = pytest.mark.timeout(900)  # the first one waits for g++


@pytest.mark.parametrize("is_eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("dim", [64, 128])
def test_ragged_blocks(
    emulated: Emulated, dim: int, is_eager: bool, seeded: torch.Generator
) -> None:
    case = draw(seeded, dim=dim)
    emulated.configure(dim, eager=is_eager)
    check(case, run(case, cuda.fine_backward))


@pytest.mark.parametrize("dim", [64, 128])
def test_one_pass_backward(emulated: Emulated, dim: int, seeded: torch.Generator) -> None:
    case = draw(seeded, dim=dim)
    found = run(case, cuda.fine_backward_fast)
    check(case, found)
    twice = run(case, cuda.fine_backward)
    assert torch.equal(found["dk"], twice["dk"]) and torch.equal(found["dv"], twice["dv"])


def test_lists_longer_than_the_ring(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded, num_q=4, num_k=37, width=30, sizes=(64, 64, 60, 16), full=True)
    check(case, run(case, cuda.fine_backward))


def test_large_scores(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded, num_q=3, num_k=6, width=5, magnitude=4.0)
    found = run(case, cuda.fine_backward)
    check(case, found, grad_limit=2e-2)
    for name, exact in expect(case).items():
        if name.startswith("d") and exact.norm() > 0:
            assert 0.99 < found[name].double().norm() / exact.norm() < 1.01, name


@pytest.mark.parametrize("backward", [cuda.fine_backward, cuda.fine_backward_fast])
@pytest.mark.parametrize("magnitude", [1.0, 16.0])
def test_backward_of_its_own_forward(  # type: ignore[no-untyped-def]
    emulated: Emulated, magnitude: float, backward, seeded: torch.Generator
) -> None:
    """At 16 a softmax has one winner as good as everywhere."""
    case = draw(seeded, num_q=3, num_k=6, width=5, magnitude=magnitude)
    found = run(case, backward)
    check(case, {name: found[name] for name in ("o", "lse")})
    check_backward(case, found)


@pytest.mark.parametrize("dim", [64, 128])
def test_forward_in_fp16(emulated: Emulated, dim: int, seeded: torch.Generator) -> None:
    case = draw(seeded, dim=dim, dtype=torch.float16)
    check(case, run(case, None))


def test_all_blocks_is_dense_attention(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded, num_q=3, num_k=3, width=3, sizes=(64,), full=True)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.float() for x in (case.q, case.k, case.v))
    )
    found = run(case, None)["o"]
    assert error(found, dense) < 5e-3
    exact = expect(case)["o"]
    allowed = (rounded_reference(case).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * allowed, "an element is far off"


def test_five_steps_follow_the_reference(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator
) -> None:
    monkeypatch.setattr(cuda, "serves", lambda like: None)
    dispatch._choose.cache_clear()
    try:
        kind = Kind("cuda", "cpu", torch.bfloat16, 5e-3, 1e-2, 1e-3)
        test_attention.test_five_steps_follow_the_reference(kind, seeded)
    finally:
        dispatch._choose.cache_clear()


@pytest.mark.parametrize(("num_q", "num_k", "width"), [(1, 1, 1), (2, 5, 0), (3, 1, 1), (1, 6, 4)])
def test_few_blocks(
    emulated: Emulated, num_q: int, num_k: int, width: int, seeded: torch.Generator
) -> None:
    case = draw(seeded, num_q=num_q, num_k=num_k, width=width, batch=2)
    check(case, run(case, cuda.fine_backward))


def test_every_schedule_gives_the_same_bits(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded, dim=64)
    results = []
    for schedule in range(4):
        emulated.configure(schedule, eager=schedule % 2 == 1, processors=1 + schedule)
        results.append(run(case, cuda.fine_backward))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_small_blocks_cost_short_products(emulated: Emulated, seeded: torch.Generator) -> None:
    """D / 16 products of scores, size / 16 of values rounded up, none for what is not owned."""
    case = draw(seeded, num_q=5, num_k=8, width=8)
    emulated.machine.emulator_products()
    run(case, None)
    sizes = case.lists.kv_sizes.tolist()
    expected = 0
    rows, counts = case.lists.idx_BHqM.flatten(0, 1), case.lists.num_BHq.flatten(0, 1)
    for row, num in zip(rows.tolist(), counts.tolist(), strict=True):
        for block, (entries, count) in enumerate(zip(row, num, strict=True)):
            owned = entries[:count] if case.lists.q_sizes[block] > 0 else []
            expected += sum(64 // 16 + -(-sizes[j] // 16) for j in owned if sizes[j] > 0)
    assert emulated.machine.emulator_products() == expected


@pytest.mark.parametrize("dim", [64, 128])
def test_the_epilogue_combines_and_untiles(
    emulated: Emulated, dim: int, seeded: torch.Generator
) -> None:
    case = draw(seeded, dim=dim)
    slots = torch.arange(64)
    is_real = (slots < case.lists.q_sizes[:, None]).flatten()
    tokens = int(is_real.sum())
    token_Q = torch.full((is_real.numel(),), -1, dtype=torch.int32)
    token_Q[is_real] = torch.randperm(tokens, generator=seeded).int()
    gate = torch.randn(1, tokens, 2, dim, generator=seeded).bfloat16()
    coarse = torch.randn(1, 2, case.lists.q_sizes.numel(), dim, generator=seeded).bfloat16()
    given = (case.q, case.k, case.v, case.lists, case.scale, gate, coarse, token_Q)
    out, o, lse = cuda.fine_forward_combined(*given)
    assert o is not None
    check(case, {"o": o, "lse": lse})
    spread = coarse.double().repeat_interleave(64, 2)
    wanted = torch.zeros_like(out, dtype=torch.float64)
    exact = expect(case)["o"][:, :, is_real].transpose(1, 2)
    wanted[:, token_Q[is_real].long()] = exact
    combined = torch.zeros_like(wanted)
    combined[:, token_Q[is_real].long()] = spread[:, :, is_real].transpose(1, 2)
    assert error(out, wanted + gate.double() * combined) < 5e-3
    again, none, _ = cuda.fine_forward_combined(*given, keep=False)
    assert none is None and torch.equal(again, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_gradient_of_the_epilogue(
    emulated: Emulated, dim: int, dtype: torch.dtype, seeded: torch.Generator
) -> None:
    check_combine_backward(seeded, torch.device("cpu"), dim, dtype)


def entries_of(row: Tensor, count: int) -> list[tuple[int, int, int]]:
    numbers = [int(x) & 0xFFFFFFFF for x in row[:count]]
    return [(e & ((1 << 23) - 1), e >> 23 & 127, e >> 30) for e in numbers]


@pytest.mark.parametrize("num_q", [1, 6, 75])
def test_merged_and_transposed_lists(
    emulated: Emulated, num_q: int, seeded: torch.Generator
) -> None:
    case = draw(seeded, num_q=num_q, num_k=70, width=45, batch=2)
    lists = case.lists
    index = BlockIndex(lists.idx_BHqM, lists.num_BHq)
    listed = map_from_index(index, 70)
    found = cuda.transpose_index(lists.idx_BHqM, lists.num_BHq, 70)
    wanted = transpose_index(index, 70)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    entries, counts = cuda.merge_queries(lists)
    key_entries, key_counts, order, indptr = cuda.merge_keys(lists)
    q_sizes, kv_sizes = lists.q_sizes.tolist(), lists.kv_sizes.tolist()
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        rows = pairs_of(listed[b, h], q_sizes, kv_sizes)
        for p, row in enumerate(rows):
            assert entries_of(entries[b, h, p], int(counts[b, h, p])) == row
        rows = pairs_of(listed[b, h].T, kv_sizes, q_sizes)
        for p, row in enumerate(rows):
            start = int(indptr[b, h, 2 * p])
            assert entries_of(key_entries[b, h, start:], int(key_counts[b, h, p])) == row
        lengths = [len(row) for row in rows]
        by_length = sorted(range(len(rows)), key=lambda p: (-lengths[p], p))
        assert order[b, h].tolist() == by_length


def pairs_of(
    listed: Tensor, owner_sizes: list[int], item_sizes: list[int]
) -> list[list[tuple[int, int, int]]]:
    """The union of two neighbours' lists; blocks without tokens own nothing, nobody owns them."""
    rows = []
    for first in range(0, len(owner_sizes), 2):
        row = []
        pair = [i for i in (first, first + 1) if i < len(owner_sizes) and owner_sizes[i] > 0]
        for item, size in enumerate(item_sizes):
            owners = sum(1 << (i - first) for i in pair if listed[i, item])
            if owners:
                row.append((item, size, owners if size > 0 else 0))
        rows.append(row)
    return rows


def test_the_transpose_takes_turns(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator
) -> None:
    lists = draw(seeded, num_q=40, num_k=20, width=9, batch=2).lists
    wanted = cuda.transpose_index(lists.idx_BHqM, lists.num_BHq, 20)
    monkeypatch.setattr(cuda, "_SCRATCH_BYTES", 1)
    found = cuda.transpose_index(lists.idx_BHqM, lists.num_BHq, 20)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_probe_walks_every_list(emulated: Emulated, seeded: torch.Generator) -> None:
    case: Case = draw(seeded, dim=128)
    entries, counts = cuda.merge_queries(case.lists)
    probe = GatherProbe(case.k, case.v, entries, counts)
    probe.launch()
    assert probe.num_bytes() == int(counts.sum()) * 2 * 64 * 128 * 2
    with pytest.raises(ValueError, match="does not run here"):
        GatherProbe.of(case.k, case.v, case.lists)


def test_the_scale_must_be_positive(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded)
    with pytest.raises(ValueError, match="positive"):
        cuda.fine_forward(case.q, case.k, case.v, case.lists, 0.0)


@pytest.mark.parametrize(("num_q", "num_k"), [(0, 3), (3, 0), (0, 0)])
def test_no_blocks_at_all(
    emulated: Emulated, num_q: int, num_k: int, seeded: torch.Generator
) -> None:
    """Nothing attends to anything: zeros, not what the memory held."""
    case = draw(seeded, num_q=num_q, num_k=num_k, width=0)
    for backward in (cuda.fine_backward, cuda.fine_backward_fast):
        for name, value in run(case, backward).items():
            assert value.shape == getattr(case, name.removeprefix("d"), value).shape
            assert (value == (-torch.inf if name == "lse" else 0)).all(), name


def test_tensors_may_begin_anywhere(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded)

    def moved(x: Tensor) -> Tensor:
        longer = torch.empty(x.numel() + 1, dtype=x.dtype)
        return longer[1:].view_as(x).copy_(x)

    names = ("q", "k", "v", "do")
    shifted = replace(case, **{name: moved(getattr(case, name)) for name in names})
    assert all(getattr(shifted, name).data_ptr() % 16 for name in names)
    expected = run(case, cuda.fine_backward)
    for name, value in run(shifted, cuda.fine_backward).items():
        assert torch.equal(value, expected[name]), name


def test_the_epilogue_refuses_other_types(emulated: Emulated, seeded: torch.Generator) -> None:
    case = draw(seeded)
    num_q = case.lists.q_sizes.numel()
    gate = torch.randn(1, 64, 2, 64, generator=seeded)
    coarse = torch.randn(1, 2, num_q, 64, generator=seeded).bfloat16()
    token_Q = torch.full((64 * num_q,), -1, dtype=torch.int32)
    given = (case.q, case.k, case.v, case.lists, case.scale)
    with pytest.raises(ValueError, match=r"gate must be torch.bfloat16 .* torch.float32"):
        cuda.fine_forward_combined(*given, gate, coarse, token_Q)
    with pytest.raises(ValueError, match=r"coarse must be torch.float32 .* torch.bfloat16"):
        cuda.combine_backward(gate, gate, coarse, token_Q)
    order, places = token_Q.long(), torch.zeros(64, dtype=torch.long)
    order[:64] = places.copy_(torch.arange(64))
    given = (gate.bfloat16(), coarse, gate, order, places)
    found = cuda.untile_combine_backward(*given)
    expected = reference.untile_combine_backward(*given)
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)
