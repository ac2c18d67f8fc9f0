"""The fused operations in Triton against their references in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.kernels.backend import serves_triton
from megagen.kernels.spec import Case, Spec
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


def both(
    spec: Spec, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """Triton's numbers, the exact ones, and plain torch's errors."""
    made = spec.make(case, generator, dtype)
    grad = gradients_like(spec, made, generator)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    plain = errors(run(spec.reference, spec, made, dtype, grad), exact)
    there: dict[str, Any] = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()
    }
    assert serves_triton(
        *(v for v in there.values() if isinstance(v, Tensor) and v.is_floating_point())
    )
    found = run(spec.function, spec, there, dtype, tuple(g.to(device) for g in grad))
    return {k: v.cpu() for k, v in found.items()}, exact, plain


SPECS = {**ALL, **COMPOSED}
TYPED = [(name, case, torch.float32) for name, case in [*COMPOSED_CASES, *CASES]]
TYPED += [(name, spec.cases[0], torch.bfloat16) for name, spec in SPECS.items()]


@pytest.mark.parametrize(("name", "case", "dtype"), TYPED, ids=case_id)
def test_matches_fp64(
    name: str, case: Case, dtype: torch.dtype, device: str, seeded: torch.Generator
) -> None:
    """Every output and gradient at most three times plain torch's rounding away."""
    found, exact, plain = both(SPECS[name], case, dtype, device, seeded)
    rounding = 3e-7 if dtype == torch.float32 else 2**-8
    for what, error in errors(found, exact).items():
        assert error <= 3 * plain[what] + rounding, (what, error, plain[what])
        if dtype == torch.bfloat16 and found[what].dtype == dtype:
            assert error < 2**-7, (what, error)
