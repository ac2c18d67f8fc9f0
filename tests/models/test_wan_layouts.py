"""Forward and every gradient under layouts equal one rank's; recompute changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests.models.wan_cases import (
    CASES,
    make_request,
    megagen_run,
    reference_model,
    relative,
    together,
    worst,
)

SP = {"tp_size": 2, "sequence_parallel": True}
HYBRID = {"cp_size": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 2}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
LAYOUTS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    # 45 tokens: no layout's shards come out even
    ("t2v", {"tp_size": 2}, "sample", {}),
    ("i2v", SP, "sample", FULL),
    ("t2v", SP, "frame", SELECTIVE),
    ("ti2v", SP, "token", FULL),
    ("t2v", {"cp_size": 2}, "frame", {}),
    ("flf2v", {"cp_size": 2, "cp_comm_type": "all_gather"}, "sample", FULL),
    ("ti2v", {"cp_size": 2, "cp_comm_type": "p2p"}, "token", SELECTIVE),
    ("t2v", {"cp_size": 4}, "sample", {}),
    ("t2v", HYBRID, "frame", FULL),
    ("i2v", {"tp_size": 2, "cp_size": 2}, "sample", SELECTIVE),
    ("ti2v", {**SP, "cp_size": 2}, "token", FULL),
    ("t2v", {**SP, "cp_size": 2, "cp_comm_type": "p2p"}, "frame", {}),
    ("i2v", {"pp_size": 2}, "sample", FULL),
    ("t2v", {"pp_size": 3, "pipeline_layers": (1, 1, 1)}, "frame", {}),
    ("t2v", {**SP, "pp_size": 2, "pipeline_layers": (1, 2)}, "frame", SELECTIVE),
    ("ti2v", {"cp_size": 2, "pp_size": 2}, "token", {}),
]


def _saved(path: Path, case: str, generator: torch.Generator, timestep: str) -> Request:
    reference_model(CASES[case], generator).save_pretrained(path)
    return make_request(CASES[case], generator, batch=2, timestep=timestep)


@pytest.mark.parametrize(("case", "layout", "timestep", "recompute"), LAYOUTS)
def test_layout_equals_one_rank(
    tmp_path: Path,
    generator: torch.Generator,
    case: str,
    layout: dict[str, Any],
    timestep: str,
    recompute: dict[str, Any],
) -> None:
    request = _saved(tmp_path, case, generator, timestep)
    ((expected, gradients),) = run_ranks(1, megagen_run, tmp_path, ParallelDims(), request, {})
    dims = ParallelDims(**layout)
    results = run_ranks(dims.model_parallel_size, megagen_run, tmp_path, dims, request, recompute)
    found: dict[str, Tensor] = {}
    for prediction, own in results:
        if prediction is not None:
            assert relative(prediction, expected) <= 1e-5
        for name in own.keys() & found.keys():
            assert relative(own[name], found[name]) <= 1e-4, name
        found |= own
    assert together(found, gradients) <= 1e-5
    error, name = worst(found, gradients)
    assert error <= 1e-4, name


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE])
def test_recompute_changes_no_bit(
    tmp_path: Path, generator: torch.Generator, recompute: dict[str, Any]
) -> None:
    request = _saved(tmp_path, "i2v", generator, "frame")
    runs = [
        run_ranks(1, megagen_run, tmp_path, ParallelDims(), request, choice)[0]
        for choice in ({}, recompute)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name
