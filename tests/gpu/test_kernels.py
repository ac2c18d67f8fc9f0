"""The operations on a GPU, in Triton: the same numbers as fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagen.kernels.spec import Case
from tests.kernels.operations import (
    ALL,
    CASES,
    COMPOSED,
    COMPOSED_CASES,
    case_id,
    errors,
    gradients_like,
    run,
)

pytestmark = pytest.mark.gpu
SPECS = {**ALL, **COMPOSED}


@pytest.mark.parametrize(("name", "case"), [*CASES, *COMPOSED_CASES], ids=case_id)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_matches_fp64(
    name: str, case: Case, dtype: torch.dtype, limit: float, seeded: torch.Generator
) -> None:
    spec = SPECS[name]
    made = spec.make(case, seeded, dtype)
    grad = gradients_like(spec, made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    found = run(spec.function, spec, there, dtype, tuple(g.cuda() for g in grad))
    for what, error in errors({k: v.cpu() for k, v in found.items()}, exact).items():
        assert error < limit, (what, error)


@pytest.mark.parametrize("name", SPECS)
def test_same_bits_again(name: str, seeded: torch.Generator) -> None:
    """At the sizes that are timed, where many programs share a sum."""
    spec = SPECS[name]
    made = spec.make(spec.bench_case, seeded, torch.bfloat16)
    grad = tuple(g.cuda() for g in gradients_like(spec, made, seeded))
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    first, second = (run(spec.function, spec, there, torch.bfloat16, grad) for _ in range(2))
    for what in first:
        assert torch.equal(first[what], second[what]), what


@pytest.mark.parametrize("dim", [1536, 3072, 5120])
def test_lines_of_large_models(dim: int, seeded: torch.Generator) -> None:
    """Gated residual and norm at Wan's widths; the widest takes two kernels in the backward."""
    spec = SPECS["gated_residual_layernorm_modulate"]
    made = spec.make({**spec.cases[2], "D": dim, "S": 999}, seeded, torch.bfloat16)
    grad = gradients_like(spec, made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in made.items()}
    found = run(spec.function, spec, there, torch.bfloat16, tuple(g.cuda() for g in grad))
    for what, error in errors({k: v.cpu() for k, v in found.items()}, exact).items():
        assert error < 2**-7, (what, error)
