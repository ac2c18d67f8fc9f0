"""Wan with sparse self-attention: against diffusers under masks, under layouts, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.core.vsa import VSAOptions
from megagen.layers.attention import SelfAttention
from megagen.layers.sparse import frames_layout, sparse_attention
from megagen.layers.tokens import TokenShard
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests.models import vsa_cases, wan_cases
from tests.models.vsa_cases import VSA, SparseModel
from tests.models.wan_cases import CASES, megagen_run, relative, together, worst

SP = {"tp_size": 2, "sequence_parallel": True}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
GRID = (3, 3, 5)


def saved(
    path: Path, case: str, generator: torch.Generator, timestep: str = "frame", **vsa: Any
) -> tuple[SparseModel, Request]:
    model = wan_cases.reference_model(CASES[case], generator)
    model.save_pretrained(path)
    gates = vsa_cases.make_gates(CASES[case], generator)
    options = {**VSA, **vsa}
    vsa_cases.add_to_directory(path, gates, options)
    request = wan_cases.make_request(CASES[case], generator, batch=2, timestep=timestep)
    return SparseModel(model, gates, GRID, options["sparsity"]), request


def one_rank(path: Path, request: Request, **overrides: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return run_ranks(1, megagen_run, path, ParallelDims(), request, overrides)[0]


@pytest.mark.parametrize(
    ("case", "timestep", "sparsity"),
    [("t2v", "frame", 0.6), ("i2v", "sample", 0.9), ("ti2v", "token", 0.0)],
)
def test_equals_diffusers_under_masks(
    case: str, timestep: str, sparsity: float, tmp_path: Path, generator: torch.Generator
) -> None:
    model, request = saved(tmp_path, case, generator, timestep, sparsity=sparsity)
    expected, gradients = wan_cases.reference_run(model, request)
    found, own = one_rank(tmp_path, request)
    assert relative(found, expected) <= 1e-5
    assert together(own, gradients) <= 1e-5
    error, name = worst(own, gradients)
    assert error <= 1e-4, name


LAYOUTS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("t2v", {"tp_size": 2}, "frame", {}),
    ("t2v", {"cp_size": 2}, "sample", SELECTIVE),
    ("i2v", {"tp_size": 2, "cp_size": 2}, "sample", FULL),
    ("ti2v", {**SP, "cp_size": 2}, "token", SELECTIVE),
    ("t2v", {"pp_size": 2}, "frame", FULL),
]


@pytest.mark.parametrize(("case", "layout", "timestep", "recompute"), LAYOUTS)
def test_layout_equals_one_rank(
    tmp_path: Path,
    generator: torch.Generator,
    case: str,
    layout: dict[str, Any],
    timestep: str,
    recompute: dict[str, Any],
) -> None:
    _, request = saved(tmp_path, case, generator, timestep)
    expected, gradients = one_rank(tmp_path, request)
    dims = ParallelDims(**layout)
    results = run_ranks(dims.model_parallel_size, megagen_run, tmp_path, dims, request, recompute)
    found: dict[str, Tensor] = {}
    for prediction, own in results:
        assert prediction is None or relative(prediction, expected) <= 1e-5
        found |= own
    assert any("to_gate_compress" in name for name in found)
    assert together(found, gradients) <= 1e-5
    error, name = worst(found, gradients)
    assert error <= 1e-4, name


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE])
def test_recompute_changes_no_bit(
    tmp_path: Path, generator: torch.Generator, recompute: dict[str, Any]
) -> None:
    _, request = saved(tmp_path, "t2v", generator)
    plain, again = one_rank(tmp_path, request), one_rank(tmp_path, request, **recompute)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in plain[1].items())


def test_without_gate_and_sparsity_it_is_the_dense_network(
    tmp_path: Path, generator: torch.Generator
) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    model = wan_cases.reference_model(CASES["t2v"], generator)
    for path in (dense, sparse):
        model.save_pretrained(path)
    gates = {n: g.zero_() for n, g in vsa_cases.make_gates(CASES["t2v"], generator).items()}
    vsa_cases.add_to_directory(sparse, gates, {**VSA, "sparsity": 0.0})
    request = wan_cases.make_request(CASES["t2v"], generator, batch=2, timestep="frame")
    expected, gradients = one_rank(dense, request)
    found, own = one_rank(sparse, request)
    assert relative(found, expected) <= 1e-5
    assert together({n: own[n] for n in gradients}, gradients) <= 1e-5
    assert own.keys() - gradients.keys() == gates.keys()
    assert all(own[name].norm() > 0 for name in gates), "a zero gate would never learn"


# -- figures and parts -----------------------------------------------------------------------------
def test_flops_count_what_is_scored() -> None:
    def plugin(vsa: dict[str, Any] | None) -> WanModel:
        return WanModel(WanModel.Options(architecture=CASES["t2v"], vsa=vsa))

    shape, size, layers = (4, 3, 6, 10), 56, 3
    tokens, tiles = 45, 12
    dense = plugin(None).flops(shape, 7)
    for sparsity, selected in ((None, 5), (0.0, 12), (0.9, 2)):
        pairs = tokens**2 * selected / tiles + tiles**2
        more = tokens * size**2 + 2 * (pairs - tokens**2) * size
        found = plugin(VSA).flops(shape, 7, sparsity)
        assert found == pytest.approx(dense + 2 * layers * more)


def test_rises_of_the_sparsity() -> None:
    vsa = VSAOptions(sparsity=0.9, decay_rate=0.03, decay_interval_steps=30)
    assert [vsa.at(step) for step in (0, 29, 30, 899, 900, 10**6, None)] == [
        *(0.0, 0.0, 0.03, 0.87),
        *(0.9, 0.9, 0.9),
    ]
    assert VSAOptions(sparsity=0.8, decay_rate=0.03, decay_interval_steps=1).at(None) == 0.78


def test_text_before_the_video(generator: torch.Generator) -> None:
    """Of a joint model: text is seen by all, and sees all, whatever is left out of the video."""
    prefix, grid = 70, (2, 4, 6)
    options = VSAOptions(sparsity=0.5, tile=(2, 2, 2), kernels="reference")
    given = [torch.randn(prefix + 48, 2, 3, 8, generator=generator) for _ in range(4)]
    layout = frames_layout(options, [grid[0]], *grid[1:], prefix=prefix)
    found = sparse_attention(*given, options=options, sparsity=0.75, layout=layout)
    q, k, v, gate = (x.permute(1, 2, 0, 3).double() for x in given)
    numbers = vsa_cases.tiles([grid[0]], *grid[1:])
    blocks = torch.cat([torch.arange(prefix) // 64, numbers + 2])  # of text: 64 tokens and 6
    one_hot = F.one_hot(blocks).to(q)
    means = [torch.einsum("bnsk,st->bntk", x, one_hot / one_hot.sum(0)) for x in (q, k, v)]
    scores = means[0][:, :, 2:] @ means[1].transpose(-1, -2) * q.size(-1) ** -0.5
    coarse = (scores.softmax(-1) @ means[2])[:, :, numbers]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, 2 + scores[..., 2:].topk(2, dim=-1).indices, True)
    chosen[..., :2] = True
    mask = chosen[..., numbers, :][..., blocks]
    fine = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask)
    video = fine + gate[:, :, prefix:] * coarse
    text = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
    assert relative(found.permute(1, 2, 0, 3), torch.cat([text, video], 2)) <= 1e-5


def test_the_layer_hands_the_prefix_on() -> None:
    attention = SelfAttention.__new__(SelfAttention)
    torch.nn.Module.__init__(attention)
    attention.vsa = VSAOptions(sparsity=0.5, tile=(2, 2, 2))
    shard = TokenShard(118, grid=(2, 4, 6), prefix=70, sparsity=0.75)
    given = attention._whole(shard).keywords  # type: ignore[attr-defined]
    assert given["layout"].num_tokens == shard.num_tokens and given["layout"].prefix == 70
    assert given["sparsity"] == 0.75 and given["kv_layout"] is None
