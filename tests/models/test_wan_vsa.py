"""Wan with sparse self-attention: against diffusers under masks, under layouts, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.models.base import Request
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
