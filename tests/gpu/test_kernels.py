"""The operations on a GPU, in Triton: the same numbers as fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagen.kernels.spec import Case
from tests.kernels.operations import ALL, CASES, case_id, errors, gradients_like, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("name", "case"), CASES, ids=case_id)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_matches_fp64(
    name: str, case: Case, dtype: torch.dtype, limit: float, seeded: torch.Generator
) -> None:
    spec = ALL[name]
    made = spec.make(case, seeded, dtype)
    grad = gradients_like(spec, made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    found = run(spec.function, spec, there, dtype, tuple(g.cuda() for g in grad))
    for what, error in errors({k: v.cpu() for k, v in found.items()}, exact).items():
        assert error < limit, (what, error)
