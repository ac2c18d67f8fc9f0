"""Video sparse attention in Triton: the acceptance cases, interpreted or compiled.

What all backends share is in ``tests/kernels/vsa``, which also runs the compiled kernels on a GPU.
The cases here are few and dense, and go through every path of the kernels.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megagen.kernels import BlockIndex, VSALayout, vsa_attention
from megagen.kernels.triton import vsa_launch, vsa_tune
from megagen.kernels.triton.vsa_launch import Config
from megagen.kernels.vsa.backends import reference
from megagen.kernels.vsa.backends import triton as backend
from megagen.kernels.vsa.index import transpose_index
from tests.kernels.vsa import definition, test_attention
from tests.kernels.vsa.backends import Kind, error
from tests.kernels.vsa.test_fine import Case, compare, of_its_own_forward


def kind(device: str, dtype: torch.dtype = torch.bfloat16) -> Kind:
    """fp32 exists under the interpreter alone; there it shows formulas, bf16 shows roundings."""
    if dtype == torch.float32:
        if device != "cpu":
            pytest.skip("compiled kernels serve bf16 and fp16")
        return Kind("triton", device, dtype, 1e-5, 1e-5, 1e-5)
    return Kind("triton", device, dtype, 5e-3, 1e-2, 1e-3)


@pytest.mark.parametrize(
    ("dtype", "dim", "scale"),
    [(torch.float32, 64, 1.0), (torch.bfloat16, 64, 4.0), (torch.bfloat16, 128, 16.0)],
)
def test_fine_stage(
    device: str, dtype: torch.dtype, dim: int, scale: float, seeded: torch.Generator
) -> None:
    """Rows of 0, 1, some and all blocks; sizes 0 to 64; q and k of other lengths; B 2, n odd."""
    case = Case(kind(device, dtype), seeded, dim=dim, scale=scale)
    found, expected = case.found(), case.expected()
    if scale > 4:
        expected |= of_its_own_forward(case, found)
    compare(case, found, expected)


@pytest.mark.parametrize("is_bulk", [True, False])
def test_what_stands_in_empty_slots(
    device: str, is_bulk: bool, seeded: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bulk loads, and by the pointers of GPUs without: other numbers in pads, the same bits."""
    for key, config in list(vsa_launch.CONFIGS.items()):
        plain = Config(config.num_warps, 2, tma=False)
        monkeypatch.setitem(vsa_launch.CONFIGS, key, config if is_bulk else plain)
    case = Case(kind(device), seeded, [64, 60, 0], [4, 64, 0, 60])
    clean = case.found()
    compare(case, clean, case.expected())
    for x, sizes in zip(case.qkv, (case.q_sizes, case.kv_sizes, case.kv_sizes), strict=True):
        x[:, :, ~case.real(sizes)] = 1e30
    case.do[:, :, ~case.real(case.q_sizes)] = -1e30
    for name, value in case.found().items():
        assert torch.equal(value, clean[name]), name


def test_all_blocks_are_dense_attention(device: str, seeded: torch.Generator) -> None:
    """As near as the type allows; no element further off than two roundings of torch's own."""
    case = Case(kind(device), seeded, [64] * 2, [64] * 3)
    case.lists = [[[list(range(3))] * 2] * 2] * 2
    exact = [x.cpu().double() for x in case.kind.to(*case.qkv)]
    dense = torch.nn.functional.scaled_dot_product_attention(*exact)
    found = case.found()["out"]
    assert error(found, dense) < case.kind.out
    q, k, v = (x.float() for x in exact)
    weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
    rounded = (weights.bfloat16().float() @ v).bfloat16()
    allowed = (rounded.double() - dense).abs().max()
    assert (found.cpu().double() - dense).abs().max() <= 2 * allowed


def test_fp16_forward(device: str, seeded: torch.Generator) -> None:
    case = Case(kind(device, torch.float16), seeded, [64, 60], [64, 16, 64])
    found, expected = case.found(), case.expected()
    assert error(found["out"], expected["out"]) < 1e-3


def lists(index: BlockIndex) -> list[list[list[list[int]]]]:
    idx, num = index.idx_BHqM.tolist(), index.num_BHq.tolist()
    for b, h, i in itertools.product(*(range(n) for n in index.num_BHq.shape)):
        count = num[b][h][i]
        assert not any(idx[b][h][i][count:]), "entries after the last are 0"
        del idx[b][h][i][count:]
    return idx


@pytest.mark.parametrize("k", [1, 7, 200])
def test_selection(device: str, k: int, seeded: torch.Generator) -> None:
    """Ties, both zeros, -inf, empty blocks; k beyond the blocks that there are."""
    sizes = torch.randint(0, 65, (90,), generator=seeded, dtype=torch.int32)
    sizes[[3, 89]] = 0
    scores = torch.randn(1, 2, 6, 90, generator=seeded)
    scores[..., 10:20] = scores.amax(-1, keepdim=True)
    scores[0, 0, :3] = scores[0, 0, :3].round()
    scores[0, 1, 0], scores[0, 1, 0, 5:30] = 0.0, -0.0
    scores[0, 1, 1:3, 20:] = -torch.inf
    idx, num = backend.select_topk(scores.to(device), sizes.to(device), k)
    assert idx.shape[-1] == min(k, 90)
    assert lists(BlockIndex(idx, num)) == definition.best(scores, sizes.tolist(), k)


def means(seeded: torch.Generator, *numbers: int) -> list[Tensor]:
    """Small multiples of 1/2: scores are exact, so that the same ones are equal everywhere."""
    draws = [torch.randn(1, 2, n, 64, generator=seeded) for n in numbers]
    return [(2 * x).round() / 2 for x in draws]


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
def test_coarse_stage(device: str, score_dtype: torch.dtype, seeded: torch.Generator) -> None:
    """Two tiles of queries, a ragged last one, many equal scores, empty blocks."""
    q, k, v, do = means(seeded, 70, 90, 90, 70)
    k[:, :, 50:60] = k[:, :, 5:6]
    sizes = torch.randint(0, 65, (90,), generator=seeded, dtype=torch.int32)
    sizes[:64] = sizes[:64] * (torch.arange(64) > 20)
    there = kind(device).to(q, k, v, sizes)
    out, lse, idx, num = backend.coarse_forward(*there, 7, 0.125, score_dtype)
    scores = 0.125 * q.double() @ k.double().mT
    if score_dtype == torch.bfloat16:
        scores = ((q @ k.mT).bfloat16() * 0.125).double()
    assert lists(BlockIndex(idx, num)) == definition.best(scores, sizes.tolist(), 7)
    scores = scores.masked_fill(sizes == 0, -torch.inf)
    assert error(out, scores.softmax(-1) @ v.double()) < 5e-3
    assert (lse.cpu() - scores.logsumexp(-1)).abs().max() < 1e-4
    if score_dtype == torch.float32:
        grads = backend.coarse_backward(*kind(device).to(do), *there[:3], out, lse, there[3], 0.125)
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        weights = (0.125 * exact[0] @ exact[1].mT).masked_fill(sizes == 0, -torch.inf).softmax(-1)
        (weights @ exact[2] * do).sum().backward()
        for found, leaf in zip(grads, exact, strict=True):
            assert leaf.grad is not None
            assert found.shape == leaf.shape and error(found, leaf.grad) < 1e-2


def test_no_block_with_tokens(device: str, seeded: torch.Generator) -> None:
    there = kind(device).to(*means(seeded, 2, 3, 3), torch.zeros(3, dtype=torch.int32))
    out, lse, idx, num = backend.coarse_forward(*there, 2, 1.0, torch.float32)
    assert not out.any() and not idx.any() and not num.any()
    assert (lse == -torch.inf).all()


def test_means(device: str, seeded: torch.Generator) -> None:
    x = torch.randn(2, 2, 4 * 64, 64, generator=seeded).bfloat16()
    sizes = [64, 0, 3, 60]
    found = backend.block_mean(x.to(device), torch.tensor(sizes, dtype=torch.int32, device=device))
    assert error(found, definition.mean(x.double(), sizes)) < 3e-3


def test_transposed_lists(device: str, seeded: torch.Generator) -> None:
    """Longer than a word of the bitmap; against the sort of the definition."""
    case = torch.rand(1, 2, 40, 70, generator=seeded) < 0.2
    case[0, 0, :, 3], case[0, 0, 5], case[0, 1, 7] = True, False, True
    num = case.sum(-1, dtype=torch.int32)
    idx = torch.argsort(~case, dim=-1, stable=True).int()
    idx = torch.where(torch.arange(70) < num[..., None], idx, 0)
    indptr, rows = backend.transpose_index(idx.to(device), num.to(device), 70)
    expected = transpose_index(BlockIndex(idx, num), 70)
    assert torch.equal(indptr.cpu(), expected[0]) and torch.equal(rows.cpu(), expected[1])


@pytest.mark.parametrize("has_gate", [True, False])
def test_the_whole_of_it(device: str, has_gate: bool, seeded: torch.Generator) -> None:
    """From tokens in raster order, which lie in a fused projection, to tokens, and back."""
    layout = VSALayout((3, 5, 7), (2, 4, 4))
    fused = torch.randn(2, 105, 1, 4, 64, generator=seeded).bfloat16()
    exact = fused.double().requires_grad_()
    blocks = definition.tokens_of_blocks(layout.grid, layout.tile)
    *qkv, gate = exact.unbind(3)
    every = [[[list(range(8))] * 8]] * 2
    expected = definition.attention(*qkv, gate if has_gate else None, blocks, blocks, every)
    do = torch.randn(expected.shape, generator=seeded).bfloat16()
    expected.backward(do.double())
    leaf = fused.to(device).requires_grad_()
    *qkv, gate = leaf.unbind(3)
    options = {"layout": layout, "topk": 8, "backend": "triton"}
    out = vsa_attention(*qkv, gate if has_gate else None, **options)
    out.backward(do.to(device))
    assert leaf.grad is not None and exact.grad is not None
    assert error(out, expected) < 5e-3
    for i in range(4 if has_gate else 3):
        assert error(leaf.grad[:, :, :, i], exact.grad[:, :, :, i]) < 1e-2, i


def test_five_steps_follow_the_reference(device: str, seeded: torch.Generator) -> None:
    test_attention.test_five_steps_follow_the_reference(kind(device), seeded)


def test_other_shapes_are_tried(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape computes the same; only the clock is left out."""
    monkeypatch.setattr(vsa_tune, "do_bench", lambda function, **_: 2.0)
    problem = vsa_tune.Problem(head_dim=64, heads=1, blocks=3, topk=2, ragged=0.5)
    functions = vsa_tune.runs(problem, torch.device(device))
    assert functions.keys() == vsa_tune.PRODUCTS.keys() == set(vsa_launch.KERNELS)
    for kernel, function in functions.items():
        expected = function(Config(4, 2, tma=True))
        other = Config(4, 2, tma=False)
        trial = vsa_tune.attempt(kernel, other, function, expected, problem)
        assert trial is not None and trial.error < 5e-3
        products = 3 * 2 * vsa_tune.PRODUCTS[kernel]
        assert trial.tflops == pytest.approx(products * 2 * 64**3 / 2e-3 / 1e12)


def test_what_it_serves(device: str) -> None:
    assert backend.serves(torch.empty(64, dtype=torch.bfloat16, device=device)) is None
    assert "head dim 24" in str(backend.serves(torch.empty(24, device=device)))
    assert "bf16" in str(backend.serves(torch.empty(64, dtype=torch.float64, device=device)))
    assert {name for name in vars(backend) if hasattr(reference, name)} >= {
        *("fine_forward", "fine_backward", "block_mean", "select_topk"),
        *("coarse_forward", "coarse_backward", "transpose_index"),
        *("tile_pool", "tile_pool_backward", "untile_combine", "untile_combine_backward"),
    }
