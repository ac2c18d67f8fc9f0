"""A network whose norms make the blocks of sparse attention is the network it was, in all layouts.

The interpreter runs the fused operation itself in ``tests/kernels/triton/interpreted_layer.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.layers import attention
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests.models import vsa_cases, wan_cases
from tests.models.vsa_cases import VSA
from tests.models.wan_cases import CASES, megagen_run, relative, together

Result = tuple[Tensor | None, dict[str, Tensor], int]


def run(
    path: Path, dims: ParallelDims, request: Request, overrides: dict[str, Any], is_fused: bool
) -> Result:
    """In a rank: the prediction, the gradients, and how often the fused path was taken."""
    calls: list[None] = []
    fused = attention.normed_sparse_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return fused(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "makes_blocks", lambda *_: is_fused)
        patch.setattr(attention, "normed_sparse_attention", counted)
        return *megagen_run(path, dims, request, overrides), len(calls)


@pytest.mark.parametrize(
    ("layout", "recompute", "is_taken"),
    [
        ({"tp_size": 2}, {}, True),
        ({"tp_size": 2, "sequence_parallel": True}, {"recompute": "selective"}, True),
        ({"cp_size": 2}, {}, False),
    ],
)
def test_fused_is_unfused(
    layout: dict[str, Any],
    recompute: dict[str, Any],
    is_taken: bool,
    tmp_path: Path,
    generator: torch.Generator,
) -> None:
    """45 tokens: under sequence parallelism with one of padding."""
    wan_cases.reference_model(CASES["t2v"], generator).save_pretrained(tmp_path)
    vsa_cases.add_to_directory(tmp_path, vsa_cases.make_gates(CASES["t2v"], generator), VSA)
    request = wan_cases.make_request(CASES["t2v"], generator, batch=2, timestep="frame")
    one = ParallelDims()
    [(expected, gradients, count)] = run_ranks(1, run, tmp_path, one, request, {}, False)
    assert expected is not None and count == 0
    for overrides, dims in (({}, one), (recompute, ParallelDims(**layout))):
        ranks = run_ranks(dims.model_parallel_size, run, tmp_path, dims, request, overrides, True)
        for prediction, own, calls in ranks:
            assert (calls > 0) == (is_taken or dims is one)
            assert prediction is not None and relative(prediction, expected) <= 1e-5
            assert together(own, gradients) <= 1e-5
