"""The fused operations in Triton against their references in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagen import kernels
from megagen.kernels.backend import serves_triton
from megagen.kernels.bias_gelu import _bias_gelu
from megagen.kernels.layernorm import _layernorm
from megagen.kernels.losses import _flow_matching, _vsd
from megagen.kernels.norm_rope import _norm_rope, _sum_squares
from megagen.kernels.norm_rope_tile import _norm_rope_tile
from megagen.kernels.residual import _residual
from megagen.kernels.residual_norm import _residual_layernorm
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


def test_takes_any_strides(device: str, seeded: torch.Generator) -> None:
    """Heads before tokens, as attention hands gradients over; a modulation cut out of a table."""
    spec = SPECS["rmsnorm_rope"]
    made = {k: v.to(device) for k, v in spec.make(spec.cases[0], seeded, torch.float32).items()}
    (grad,) = (g.to(device) for g in gradients_like(spec, made, seeded))
    permuted = grad.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    expected = run(spec.function, spec, made, torch.float32, (grad,))
    found = run(spec.function, spec, made, torch.float32, (permuted,))
    for what in expected:
        assert torch.equal(expected[what], found[what]), what


def test_affine(device: str, seeded: torch.Generator) -> None:
    """Alone and behind a residual, where the weight's gradient is summed over rows and samples."""
    made = [
        torch.randn(s, generator=seeded) for s in ((70, 2, 24), (70, 2, 24), (5, 2, 24), 24, 24)
    ]
    rows = torch.randint(5, (70,), generator=seeded)
    grads = [torch.randn(70, 2, 24, generator=seeded) for _ in range(2)]
    results = []
    for dtype, where in ((torch.float64, "cpu"), (torch.float32, device)):
        x, y, gate, weight, bias = leaves = [t.to(where, dtype).requires_grad_() for t in made]
        if dtype == torch.float64:
            out = x + gate[rows] * y
            h = torch.nn.functional.layer_norm(out, (24,), weight, bias, 1e-6)
        else:
            out, h = kernels.gated_residual_layernorm_affine(
                x, y, gate, weight, bias, rows.to(where)
            )
            assert torch.equal(kernels.layernorm_affine(out, weight, bias), h)
        found = torch.autograd.grad((out, h), leaves, [g.to(where, dtype) for g in grads])
        results.append([t.detach().cpu().double() for t in (out, h, *found)])
    for exact, found_one in zip(*results, strict=True):
        torch.testing.assert_close(found_one, exact, rtol=2e-5, atol=2e-5)


def test_rows_that_do_not_exist_give_nan(device: str) -> None:
    """A GPU cannot refuse them without waiting for it: nothing is read out of bounds."""
    x = torch.ones(3, 1, 16, device=device)
    gate = torch.ones(2, 1, 16, device=device)
    out = kernels.gated_residual(x, x, gate, torch.tensor([0, 2, 1], device=device))
    assert out[1].isnan().all() and (out[0::2] == 2).all()


def test_no_tokens(device: str) -> None:
    """A rank may hold none."""
    x = torch.zeros(0, 2, 16, device=device, requires_grad=True)
    row = torch.zeros(1, 2, 16, device=device, requires_grad=True)
    out, h = kernels.gated_residual_layernorm_modulate(x, x, row, row, row)
    y = kernels.bias_gelu_tanh(kernels.gated_residual(out, h, row))
    heads = kernels.rmsnorm_rope(y.unflatten(-1, (2, 8)), row[0, 0])
    (grad,) = torch.autograd.grad(heads.sum(), row)
    assert heads.shape == (0, 2, 2, 8)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_opcheck(device: str, seeded: torch.Generator) -> None:
    """Schemas, fake tensors and autograd registration of every operation are consistent."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded).to(device, torch.bfloat16).requires_grad_()

    def table(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded).to(device).requires_grad_()

    rows = torch.tensor([0, 0, 1, 1, 1], device=device)
    x, row, latent = normal(5, 2, 16), table(2, 2, 16), normal(2, 3, 2, 4)
    tokens = torch.arange(64, device=device)
    tokens = torch.where(tokens < 5, tokens, -1)
    weight = table(2, 8)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (_layernorm, (x, row, table(2, 2, 16), rows, 1e-6, 1.0)),
        (_residual_layernorm, (x, normal(5, 2, 16), row, row, table(2, 2, 16), rows, 1e-6, 1.0)),
        (_residual_layernorm, (x, normal(5, 2, 16), None, row, row, rows, 1e-6, 1.0)),
        (_residual, (x, normal(5, 2, 16), row, rows)),
        (_norm_rope, (normal(5, 2, 2, 8), weight, None, None, table(5, 2, 1).square(), 1e-6, 24)),
        (_norm_rope_tile, (normal(5, 2, 2, 8), weight, None, None, None, tokens, 1e-6, 16)),
        (_norm_rope_tile, (normal(5, 2, 2, 8), None, None, None, None, tokens, 1e-6, 16)),
        (_sum_squares, (normal(5, 2, 2, 8),)),
        (_bias_gelu, (x, normal(16))),
        (_flow_matching, (latent, normal(2, 3, 2, 4), normal(2, 3, 2, 4), table(2))),
        (_vsd, (latent, normal(2, 3, 2, 4), normal(2, 3, 2, 4), None, True)),
    ]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for op, arguments in checks:
        torch.library.opcheck(op, arguments, test_utils=tests)


def test_compiles_as_one_graph_and_recomputes(device: str, seeded: torch.Generator) -> None:
    x, y = (torch.randn(9, 2, 16, generator=seeded).to(device) for _ in range(2))
    row = torch.randn(1, 2, 16, generator=seeded).to(device)

    def block(x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        out, h = kernels.gated_residual_layernorm_modulate(x, y, row, row, row)
        heads = kernels.rmsnorm_rope(kernels.bias_gelu_tanh(h).unflatten(-1, (2, 8)), row[0, 0])
        return kernels.gated_residual(out, heads.flatten(2), row)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, y, row)]
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    plain = gradients(block)
    compiled = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"))
    again = gradients(lambda *inputs: checkpoint(block, *inputs, use_reentrant=False))
    for first, second, third in zip(plain, compiled, again, strict=True):
        torch.testing.assert_close(second, first)
        assert torch.equal(third, first)
