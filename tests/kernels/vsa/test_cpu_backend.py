"""The CPU backend against fp64 torch written here, on every instruction set of this processor.

Legend: B batch, H heads, q k blocks of 64 slots, D head dim.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megagen.kernels import status
from megagen.kernels.backend import cpu
from megagen.kernels.vsa.backends import cpu as backend
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import VSALayout

pytestmark = pytest.mark.skipif(
    not status()["cpu"].available, reason="the CPU extension is not built"
)

ISAS = cpu().isas() if status()["cpu"].available else ["generic"]
RAGGED = torch.tensor([64, 60, 0, 16, 8, 4, 1], dtype=torch.int32)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu().isa()
    cpu().use_isa(request.param)
    yield request.param
    cpu().use_isa(before)


@dataclass(frozen=True)
class Case:
    """Inputs of the fine stage, and the gradients that come back to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    lists: Lists

    @property
    def scale(self) -> float:
        return self.q.size(-1) ** -0.5

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, **{n: getattr(self, n).to(dtype) for n in ("q", "k", "v", "do")})


def real_slots(sizes: Tensor) -> Tensor:
    return (torch.arange(64) < sizes[:, None]).flatten()


def make(
    generator: torch.Generator,
    *,
    dim: int = 64,
    q_sizes: Tensor = RAGGED,
    kv_sizes: Tensor = RAGGED,
    width: int = 4,
    magnitude: float = 1.0,
    batch: int = 2,
    heads: int = 2,
) -> Case:
    """Random lists with 0 to ``width`` entries; huge numbers in empty slots."""

    def normal(sizes: Tensor) -> Tensor:
        x = magnitude * torch.randn(batch, heads, 64 * len(sizes), dim, generator=generator)
        x[:, :, ~real_slots(sizes)] = 1e30
        return x

    num_q, num_k = len(q_sizes), len(kv_sizes)
    width = min(width, num_k)
    keys = torch.rand(batch, heads, num_q, num_k, generator=generator).topk(width).indices
    num = torch.randint(0, width + 1, (batch, heads, num_q), generator=generator).int()
    num[:, :, 0] = width
    listed = torch.arange(width) < num[..., None]
    idx = torch.where(listed, torch.where(listed, keys, num_k).sort(-1).values, 0).int()
    q, do = normal(q_sizes), normal(q_sizes) / magnitude
    dlse = torch.randn(q.shape[:-1], generator=generator)
    return Case(q, normal(kv_sizes), normal(kv_sizes), do, dlse, Lists(idx, num, q_sizes, kv_sizes))


def exact(case: Case) -> dict[str, Tensor]:
    """Dense attention under a mask in fp64, and autograd through it."""
    lists = case.lists
    blocks = torch.zeros(*lists.num_BHq.shape, len(lists.kv_sizes), dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in lists.num_BHq.shape)).tolist():
        blocks[b, h, i, lists.idx_BHqM[b, h, i, : lists.num_BHq[b, h, i]].long()] = True
    seen = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)
    is_query, is_key = real_slots(lists.q_sizes), real_slots(lists.kv_sizes)
    seen = seen & is_query[:, None] & is_key
    live = seen.any(-1)
    q = case.q.double().masked_fill(~is_query[:, None], 0).requires_grad_()
    k, v = (x.double().masked_fill(~is_key[:, None], 0).requires_grad_() for x in (case.k, case.v))
    scores = (case.scale * q @ k.mT).masked_fill(~seen, -1e300)
    lse = scores.logsumexp(-1)
    out = torch.where(live[..., None], (scores - lse[..., None]).exp() @ v, 0)
    do = case.do.double().masked_fill(~live[..., None], 0)
    total = (out * do).sum() + (torch.where(live, lse, 0) * case.dlse.double()).sum()
    dq, dk, dv = torch.autograd.grad(total, (q, k, v))
    lse = torch.where(live, lse, -torch.inf).detach()
    return {"o": out.detach(), "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def run(case: Case) -> dict[str, Tensor]:
    out, lse = backend.fine_forward(case.q, case.k, case.v, case.lists, case.scale)
    grads = backend.fine_backward(
        case.do, case.dlse, case.q, case.k, case.v, out, lse, case.lists, case.scale
    )
    return {"o": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(case: Case, tolerance: float, lse_tolerance: float = 2e-5) -> None:
    found, wanted = run(case), exact(case)
    live = wanted["lse"].isfinite()
    assert torch.equal(found["lse"].isfinite(), live)
    assert (found["lse"][live] == -torch.inf).sum() == 0
    assert (found["lse"][live] - wanted["lse"][live]).abs().max() <= lse_tolerance
    assert (found["o"][~live] == 0).all()
    for name in ("dq", "dk", "dv"):
        assert (found[name][wanted[name] == 0] == 0).all(), name  # empty slots, unlisted blocks
    for name in ("o", "dq", "dk", "dv"):
        assert error(found[name], wanted[name]) <= tolerance, (name, case.q.shape)


@pytest.mark.parametrize("dim", [24, 64, 128])
def test_matches_fp64(dim: int, isa: str, seeded: torch.Generator) -> None:
    """Ragged blocks, rows with nothing, more keys than queries, an odd number of blocks, B = 2."""
    check(make(seeded, dim=dim, kv_sizes=torch.cat([RAGGED, RAGGED])), 1e-5)


@pytest.mark.parametrize("dim", [8, 40, 56, 72, 136])
def test_other_head_dims(dim: int, isa: str, seeded: torch.Generator) -> None:
    check(make(seeded, dim=dim, q_sizes=RAGGED[:3], batch=1, heads=1), 1e-5)


@pytest.mark.parametrize("magnitude", [4.0, 16.0])
def test_large_scores(magnitude: float, seeded: torch.Generator) -> None:
    """Scores of thousands: as near as fp32 products of the same inputs are, not further."""
    case = make(seeded, dim=128, magnitude=magnitude)
    wanted = exact(case)
    scores = magnitude**2 * 128**0.5
    lse_tolerance = 4e-6 * scores
    check(case, max(1e-5, 1e-6 * scores), lse_tolerance)
    found = run(case)
    for name in ("dq", "dk", "dv"):
        assert 0.99 < found[name].double().norm() / wanted[name].norm() < 1.01


def test_all_blocks_are_dense_attention(isa: str, seeded: torch.Generator) -> None:
    sizes = torch.full((5,), 64, dtype=torch.int32)
    case = make(seeded, q_sizes=sizes, kv_sizes=sizes)
    every = torch.arange(5, dtype=torch.int32).expand(2, 2, 5, 5).contiguous()
    lists = Lists(every, torch.full((2, 2, 5), 5, dtype=torch.int32), sizes, sizes)
    found = run(replace(case, lists=lists))["o"]
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double()
    )
    assert error(found, dense) <= 1e-5


def test_one_block_each(isa: str, seeded: torch.Generator) -> None:
    check(make(seeded, width=1), 1e-5)


def test_blocks_of_sixty(seeded: torch.Generator) -> None:
    sizes = torch.full((6,), 60, dtype=torch.int32)
    check(make(seeded, dim=128, q_sizes=sizes, kv_sizes=sizes), 1e-5)


@pytest.mark.parametrize("dim", [24, 128])
def test_bf16_is_computed_in_fp32(dim: int, isa: str, seeded: torch.Generator) -> None:
    """Against fp64 of the same bf16 inputs: what is left is one rounding of the result.

    The backward sees the rounded output, which moves delta a little.
    """
    case = make(seeded, dim=dim).to(torch.bfloat16)
    found, wanted = run(case), exact(case)
    assert error(found["o"], wanted["o"]) < 2**-8
    for name in ("dq", "dk", "dv"):
        assert found[name].dtype == torch.bfloat16
        assert error(found[name], wanted[name]) < 2**-7, name


def test_rounds_bf16_to_even(isa: str) -> None:
    """Attention to a single token gives its value back: 1 + 2^-8 ties to 1, 1 + 3 2^-8 up."""
    sizes = torch.tensor([1], dtype=torch.int32)
    lists = Lists(
        torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1).int(), sizes, sizes
    )
    x = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16)
    values = torch.tensor([1.0, -2.5, 3e38, 1e-30, 0.0, 2**-126, 1e-40, -1.0]).bfloat16()
    x[0, 0, 0] = values
    out, _ = backend.fine_forward(torch.zeros_like(x), x, x, lists, 1.0)
    assert torch.equal(out[0, 0, 0], values)


def test_a_nan_stays_one(isa: str, seeded: torch.Generator) -> None:
    case = make(seeded, q_sizes=RAGGED[:1], kv_sizes=RAGGED[:1])
    case.q[0, 0, 3, 5] = torch.nan
    out = run(case)["o"]
    assert out[0, 0, 3].isnan().all()
    assert not out[0, 0, 4].isnan().any()
    assert not out[1].isnan().any()


def on_threads(threads: int, case: Case) -> dict[str, Tensor]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("heads", [1, 5])
def test_same_bits_on_any_number_of_threads(heads: int, seeded: torch.Generator) -> None:
    case = make(seeded, dim=64, heads=heads, kv_sizes=RAGGED.repeat(3), q_sizes=RAGGED.repeat(2))
    expected = on_threads(1, case)
    for other in (on_threads(2, case), on_threads(3, case)):
        for name, wanted in expected.items():
            assert torch.equal(other[name], wanted), name


def test_the_way_of_the_backward_changes_nothing(seeded: torch.Generator) -> None:
    """Whole heads on one thread; on two, more pairs than are kept at once, and turns that end
    elsewhere when a head is alone: the same bits."""
    sizes = torch.full((24,), 4, dtype=torch.int32)
    case = make(seeded, dim=8, q_sizes=sizes, kv_sizes=sizes, width=24, batch=1, heads=3)
    together, alone = on_threads(2, case), [on_threads(2, of_head(case, h)) for h in range(3)]
    for name, wanted in on_threads(1, case).items():
        assert torch.equal(together[name], wanted), name
        assert torch.equal(torch.cat([one[name] for one in alone], 1), wanted), name


def of_head(case: Case, head: int) -> Case:
    part = slice(head, head + 1)
    idx, num = (x[:, part].contiguous() for x in (case.lists.idx_BHqM, case.lists.num_BHq))
    lists = replace(case.lists, idx_BHqM=idx, num_BHq=num)
    names = ("q", "k", "v", "do", "dlse")
    return replace(case, lists=lists, **{n: getattr(case, n)[:, part].contiguous() for n in names})


def test_what_is_served() -> None:
    assert backend.serves(torch.zeros(1, 1, 64, 24)) is None
    assert backend.serves(torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)) is None
    assert "multiples of 8" in (backend.serves(torch.zeros(1, 1, 64, 20)) or "")
    assert "float64" in (backend.serves(torch.zeros(1, 1, 64, 64).double()) or "")
    assert "meta" in (backend.serves(torch.zeros(1, 1, 64, 64, device="meta")) or "")


def means(generator: torch.Generator, num: int, dim: int) -> Tensor:
    return torch.randn(2, 3, num, dim, generator=generator)


@pytest.mark.parametrize(("num_q", "num_k", "dim"), [(3, 5, 24), (70, 131, 64)])
def test_coarse_stage(num_q: int, num_k: int, dim: int, isa: str, seeded: torch.Generator) -> None:
    """Output and log-sum against fp64; the lists are the largest of the scores it found them by."""
    q, k, v = means(seeded, num_q, dim), means(seeded, num_k, dim), means(seeded, num_k, dim)
    sizes = torch.randint(1, 65, (num_k,), generator=seeded).int()
    sizes[1], k[:, :, 1], v[:, :, 1] = 0, 100.0, 1e30  # an empty block would win every row
    out, lse, idx, num = backend.coarse_forward(q, k, v, sizes, 4, dim**-0.5, torch.float32)
    scores = (q.double() @ k.double().mT * dim**-0.5).masked_fill(sizes == 0, -torch.inf)
    assert error(out, scores.softmax(-1)[..., sizes > 0] @ v.double()[:, :, sizes > 0]) <= 1e-6
    assert (lse - scores.logsumexp(-1)).abs().max() <= 2e-6
    assert (num == min(4, num_k - 1)).all()
    assert torch.equal(idx, idx.sort(-1).values)
    found, best = scores.gather(-1, idx.long()).sort(-1).values, scores.topk(4).values.flip(-1)
    assert (found - best).abs().max() <= 2e-6


def test_coarse_scores_in_bf16(isa: str, seeded: torch.Generator) -> None:
    """Rounded as a bf16 product and its scaling would be: what many ties then decide by index."""
    q, k = means(seeded, 9, 24).bfloat16(), means(seeded, 90, 24).bfloat16()
    sizes = torch.ones(90, dtype=torch.int32)
    found = backend.coarse_forward(q, k, k, sizes, 30, 0.3, torch.bfloat16)
    scores = ((q.double() @ k.double().mT).bfloat16() * 0.3).float()
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :30]
    none = torch.zeros(scores.shape, dtype=torch.bool)
    chosen, wanted = (none.scatter(-1, idx.long(), True) for idx in (found[2], order))
    assert (chosen != wanted).float().mean() < 0.01  # fp64 sums round elsewhere now and then


def test_selection(isa: str) -> None:
    """Ties to the lower index, 0 and -0 alike, infinities, empty blocks never, zeros at the end."""
    inf = torch.inf
    scores = torch.tensor(
        [[1.0, 2, 2, 2, 9, 0], [0, -0.0, 0, -0.0, 9, 0], [-inf, inf, -3, -inf, inf, -4]]
    )
    sizes = torch.tensor([64, 1, 3, 4, 0, 60], dtype=torch.int32)
    idx, num = backend.select_topk(scores[None, None], sizes, 3)
    assert idx[0, 0].tolist() == [[1, 2, 3], [0, 1, 2], [1, 2, 5]]
    assert num.flatten().tolist() == [3, 3, 3]
    idx, num = backend.select_topk(scores[None, None], (sizes > 3).int(), 9)
    assert idx[0, 0].tolist() == [[0, 3, 5, 0, 0, 0]] * 3
    assert num.flatten().tolist() == [3, 3, 3]
    idx, num = backend.select_topk(scores[None, None], 0 * sizes, 2)
    assert not idx.any()
    assert not num.any()


def test_transposed_lists(isa: str, seeded: torch.Generator) -> None:
    lists = make(seeded, q_sizes=RAGGED.repeat(4)).lists
    indptr, rows = backend.transpose_index(lists.idx_BHqM, lists.num_BHq, 7)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        listing: list[list[int]] = [[] for _ in range(7)]
        for i, (row, count) in enumerate(
            zip(lists.idx_BHqM[b, h].tolist(), lists.num_BHq[b, h].tolist(), strict=True)
        ):
            for key in row[:count]:
                listing[key].append(i)
        ends = indptr[b, h].tolist()
        assert [rows[b, h, i:j].tolist() for i, j in itertools.pairwise(ends)] == listing
        assert not rows[b, h, ends[-1] :].any()


@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.float32), (136, torch.bfloat16)])
def test_tiles_and_means(dim: int, dtype: torch.dtype, isa: str, seeded: torch.Generator) -> None:
    """Tokens to blocks with means, and the gated sum back: values and gradients by autograd."""
    layout = VSALayout((5, 6, 9))
    order = layout.tables()
    slots, sizes = order.raster_to_slot_S, order.sizes_n

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, dim, generator=seeded).to(dtype)

    x, gate = normal(3, layout.num_tokens).transpose(1, 2), normal(layout.num_tokens, 3)
    blocks, coarse = normal(3, layout.padded), normal(3, layout.num_blocks)
    tolerance = 2e-7 if dtype == torch.float32 else 2**-8

    wide = x.double().requires_grad_()
    empty = torch.zeros(2, 3, layout.padded, dim, dtype=torch.float64)
    tiled = empty.index_copy(2, slots, wide.transpose(1, 2))
    mean = tiled.unflatten(2, (-1, 64)).sum(3) / sizes[:, None]
    found = backend.tile_pool(x, order.slot_to_raster_P, sizes)
    assert torch.equal(found[0].double(), tiled)
    assert error(found[1], mean) <= tolerance
    assert torch.equal(backend.block_mean(found[0], sizes), found[1])
    (dx,) = torch.autograd.grad((tiled, mean), wide, (blocks.double(), coarse.double()))
    assert error(backend.tile_pool_backward(blocks, coarse, slots, sizes), dx) <= tolerance

    leaves = [t.double().requires_grad_() for t in (blocks, coarse, gate)]
    spread = leaves[1][:, :, slots // 64].transpose(1, 2)
    out = leaves[0][:, :, slots].transpose(1, 2) + leaves[2] * spread
    assert error(backend.untile_combine(blocks, coarse, gate, slots), out) <= tolerance
    plain = leaves[0][:, :, slots].transpose(1, 2) + spread
    assert error(backend.untile_combine(blocks, coarse, None, slots), plain) <= tolerance
    wanted = torch.autograd.grad(out, leaves, x.double())
    grads = backend.untile_combine_backward(x, coarse, gate, order.slot_to_raster_P, slots)
    for one, two in zip(grads, wanted, strict=True):
        assert one is not None
        assert error(one, two) <= tolerance


PROCESS = """
import os, torch
from megagen.kernels.vsa.backends import cpu as backend
from megagen.kernels.vsa.index import Lists
torch.set_num_threads(2)
sizes = torch.full((4,), 64, dtype=torch.int32)
idx = torch.arange(2, dtype=torch.int32).expand(1, 2, 4, 2).contiguous()
lists = Lists(idx, torch.full((1, 2, 4), 2, dtype=torch.int32), sizes, sizes)
x = torch.linspace(-1, 1, 2 * 256 * 64).view(1, 2, 256, 64)
def call():
    out, lse = backend.fine_forward(x, x, x, lists, 0.1)
    grads = backend.fine_backward(x, None, x, x, x, out, lse, lists, 0.1)
    return [t.numpy().tobytes() for t in grads]
wanted = call()
print((torch.tensor([1e-40]) * 1).item() > 0)
pid = os.fork()
if pid == 0:
    os._exit(0 if call() == wanted else 3)
print(os.waitpid(pid, 0)[1])
"""


def test_leaves_the_process_as_it_was() -> None:
    """No flush to zero; a forked child, which has lost the threads, neither hangs nor differs."""
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "0"]
