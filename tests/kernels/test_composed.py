"""Operations that only a GPU has in one kernel: their formulas, and what a CPU runs instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagen import kernels
from megagen.fastgen import losses as fastgen
from megagen.kernels.spec import Case
from tests.kernels.operations import (
    COMPOSED,
    COMPOSED_CASES,
    case_id,
    errors,
    gradients_like,
    outputs_of,
    run,
)


@pytest.mark.parametrize(("name", "case"), COMPOSED_CASES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matches_fp64(name: str, case: Case, dtype: torch.dtype, seeded: torch.Generator) -> None:
    spec = COMPOSED[name]
    made = spec.make(case, seeded, dtype)
    grad = gradients_like(spec, made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    found = run(spec.function, spec, made, dtype, grad)
    limit = 2e-6 if dtype == torch.float32 else 2**-6
    for what, error in errors(found, exact).items():
        assert error < limit, (what, error)


@pytest.mark.parametrize("name", [name for name in COMPOSED if name != "vsd_loss"])
def test_gradients_by_finite_differences(name: str, seeded: torch.Generator) -> None:
    """All but ``vsd_loss``, whose gradient is not that of its value."""
    spec = COMPOSED[name]
    small = {**spec.cases[0], **{k: min(v, 4) for k, v in spec.cases[0].items()}}
    made = spec.make(small, seeded, torch.float64)
    names = [n for n in spec.differentiable if isinstance(made.get(n), Tensor)]
    fixed = {k: v for k, v in made.items() if k not in names}

    def call(*values: Tensor) -> Any:
        return outputs_of(spec.reference(**fixed, **dict(zip(names, values, strict=True))))

    leaves = [made[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("per_sample", [True, False])
def test_vsd_is_that_of_the_loss_library(per_sample: bool, seeded: torch.Generator) -> None:
    x, real, fake = (torch.randn(3, 4, 2, 5, 5, generator=seeded) for _ in range(3))
    scale = torch.rand(3, generator=seeded)
    normalizer = "sample" if per_sample else "global"
    x.requires_grad_()
    expected = fastgen.vsd_loss(x, real, fake, scale, normalizer=normalizer, fp32=True)
    found = kernels.vsd_loss(x, real, fake, scale, per_sample=per_sample)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)


def test_flow_matching_is_that_of_the_loss_library(seeded: torch.Generator) -> None:
    v, x0, eps = (torch.randn(3, 4, 2, 5, 5, generator=seeded) for _ in range(3))
    expected = fastgen.dsm_loss("flow", v, x0=x0, eps=eps, fp32=True)
    torch.testing.assert_close(kernels.flow_matching_loss(v, x0, eps), expected)
    weight = torch.rand(3, generator=seeded)
    by_frame = weight.view(3, 1, 1, 1, 1).expand(3, 1, 2, 1, 1)
    torch.testing.assert_close(
        kernels.flow_matching_loss(v, x0, eps, weight),
        kernels.flow_matching_loss(v, x0, eps, by_frame),
    )


def test_residual_and_affine_norm(seeded: torch.Generator) -> None:
    """Exactly the two operations that it is made of."""
    x, y = (torch.randn(6, 2, 8, generator=seeded) for _ in range(2))
    gate, weight, bias = (torch.randn(n, generator=seeded) for n in ((3, 2, 8), 8, 8))
    rows = torch.tensor([0, 1, 2, 2, 1, 0])
    out, h = kernels.gated_residual_layernorm_affine(x, y, gate, weight, bias, rows)
    assert torch.equal(out, kernels.gated_residual(x, y, gate, rows))
    assert torch.equal(h, kernels.layernorm_affine(out, weight, bias))


def test_wrong_shapes_are_refused() -> None:
    x = torch.zeros(6, 2, 8)
    one, two = torch.zeros(1, 2, 8), torch.zeros(2, 2, 8)
    with pytest.raises(ValueError, match="gate must be"):
        kernels.gated_residual_layernorm_modulate(x, x, two, one, one)
    with pytest.raises(ValueError, match="y is"):
        kernels.gated_residual_layernorm_modulate(x, x[:3], None, one, one)
    with pytest.raises(ValueError, match="x0 must be"):
        kernels.flow_matching_loss(x, x[:3], x)
    with pytest.raises(ValueError, match="weight must be"):
        kernels.flow_matching_loss(x, x, x, torch.zeros(5))
    with pytest.raises(ValueError, match="scale must be"):
        kernels.vsd_loss(x, x, x, torch.zeros(5))
    layout = kernels.VSALayout((1, 2, 4))
    with pytest.raises(ValueError, match="the layout 8"):
        kernels.norm_rope_tile_pool(x[..., None], None, layout=layout)
