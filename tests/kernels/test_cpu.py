"""The fused operations on the CPU: right to fp32 rounding, deterministic, without side effects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen import kernels
from megagen.kernels import backend
from megagen.kernels.bias_gelu import _bias_gelu
from megagen.kernels.layernorm import _layernorm
from megagen.kernels.norm_rope import _norm_rope, _sum_squares
from megagen.kernels.residual import _residual
from megagen.kernels.spec import Case
from tests.kernels.operations import ALL, CASES, case_id, errors, gradients_like, run

pytestmark = pytest.mark.skipif(
    not kernels.status()["cpu"].available, reason="the CPU extension is not built"
)


@pytest.fixture(params=["best", "generic"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The build for this processor, and the one for any."""
    backend.cpu().use_generic(request.param == "generic")
    yield request.param
    backend.cpu().use_generic(False)


@pytest.mark.parametrize(("name", "case"), CASES, ids=case_id)
def test_matches_fp64(name: str, case: Case, isa: str, seeded: torch.Generator) -> None:
    """No worse than twice plain torch in fp32 (plus a rounding), outputs and gradients alike."""
    spec = ALL[name]
    made = spec.make(case, seeded, torch.float32)
    grad = gradients_like(ALL[name], made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    plain = errors(run(spec.reference, spec, made, torch.float32, grad), exact)
    fused = errors(run(spec.function, spec, made, torch.float32, grad), exact)
    for what, error in fused.items():
        assert error <= 3 * plain[what] + 3e-7, (what, error, plain[what])


@pytest.mark.parametrize("name", ALL)
def test_same_bits_on_any_number_of_threads(name: str, seeded: torch.Generator) -> None:
    spec = ALL[name]
    sizes = {"S": 301, "B": 3, "D": 80, "F": 80, "N": 4, "K": 20}  # enough for threads to start
    made = spec.make({**spec.cases[0], **sizes, "Bm": 3}, seeded, torch.float32)
    grad = gradients_like(ALL[name], made, seeded)
    assert grad[0].numel() >= backend._SERIAL_BELOW
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(spec.function, spec, made, torch.float32, grad)
        torch.set_num_threads(2)
        two = run(spec.function, spec, made, torch.float32, grad)
    finally:
        torch.set_num_threads(before)
    for what in one:
        assert torch.equal(one[what], two[what]), what


@pytest.mark.parametrize(("name", "case"), [(n, s.cases[0]) for n, s in ALL.items()], ids=case_id)
def test_gradients_by_finite_differences(name: str, case: Case, seeded: torch.Generator) -> None:
    """The reference's formula is itself checked against differences in fp64."""
    spec = ALL[name]
    small = {**case, **{k: min(v, 4) for k, v in case.items()}}
    made = spec.make(small, seeded, torch.float64)
    names = [n for n in spec.differentiable if isinstance(made.get(n), Tensor)]
    fixed = {k: v for k, v in made.items() if k not in names}
    leaves = [made[n].clone().requires_grad_() for n in names]

    def call(*values: Tensor) -> Any:
        return spec.reference(**fixed, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_opcheck(seeded: torch.Generator) -> None:
    """Schemas, fake tensors and autograd registration of every operation are consistent."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded).requires_grad_()

    rows = torch.tensor([0, 0, 1, 1, 1])
    x, modulation = normal(5, 2, 12), normal(2, 2, 12)
    heads, angle = normal(5, 2, 3, 4), torch.randn(5, 2, generator=seeded)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (_layernorm, (x, modulation, normal(2, 2, 12), rows, 1e-6, 1.0)),
        (_layernorm, (x, normal(1, 1, 12), normal(1, 1, 12), None, 1e-6, 0.0)),
        (_residual, (x, normal(5, 2, 12), modulation, rows)),
        (_norm_rope, (heads, normal(3, 4), angle.cos(), angle.sin(), None, 1e-6, 12)),
        (_norm_rope, (heads, normal(3, 4), None, None, normal(5, 2, 1).square(), 1e-6, 24)),
        (_sum_squares, (heads,)),
        (_bias_gelu, (x, normal(12))),
        (_bias_gelu, (x, None)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(
            op,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("name", ALL)
def test_takes_any_strides(name: str, seeded: torch.Generator) -> None:
    """Permuted and sliced inputs give what their contiguous copies give."""
    spec = ALL[name]
    made = spec.make(spec.cases[0], seeded, torch.float32)

    def scattered(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        wide = torch.full((*reversed(value.shape), 2), torch.nan)[..., 0].permute(
            *reversed(range(value.dim()))
        )
        return wide.copy_(value)

    plain = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in made.items()}
    odd = {k: scattered(v) for k, v in made.items()}
    grad = gradients_like(ALL[name], made, seeded)
    expected = run(spec.function, spec, plain, torch.float32, grad)
    found = run(spec.function, spec, odd, torch.float32, tuple(map(scattered, grad)))
    for what in expected:
        assert torch.equal(expected[what], found[what]), what


def test_gradient_in_the_layout_of_attention(seeded: torch.Generator) -> None:
    """Heads before tokens, as ``scaled_dot_product_attention`` hands gradients over."""
    spec = ALL["rmsnorm_rope"]
    made = spec.make(spec.cases[0], seeded, torch.float32)
    grad = gradients_like(spec, made, seeded)
    permuted = grad[0].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert not permuted.is_contiguous()
    expected = run(spec.function, spec, made, torch.float32, grad)
    found = run(spec.function, spec, made, torch.float32, (permuted,))
    for what in expected:
        assert torch.equal(expected[what], found[what]), what


def test_layernorm_affine(seeded: torch.Generator) -> None:
    x, weight, bias = (
        torch.randn(shape, generator=seeded, dtype=torch.float64).requires_grad_()
        for shape in ((70, 2, 45), (45,), (45,))
    )
    exact = torch.nn.functional.layer_norm(x, (45,), weight, bias, 1e-6)
    single = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    found = kernels.layernorm_affine(single[0], single[1], single[2], eps=1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    grad = torch.randn(exact.shape, generator=seeded, dtype=torch.float64)
    expected = torch.autograd.grad(exact, (x, weight, bias), grad)
    for one, two in zip(torch.autograd.grad(found, single, grad.float()), expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2e-5, atol=2e-5)


def test_heads_split_over_ranks_give_the_whole(seeded: torch.Generator) -> None:
    """Two halves of the heads with the sum of squares of both, as tensor parallelism does."""
    x = torch.randn(40, 2, 4, 6, generator=seeded, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 6, generator=seeded, dtype=torch.float64)
    exact = ALL["rmsnorm_rope"].reference(x, weight)
    grad = torch.randn(exact.shape, generator=seeded, dtype=torch.float64)
    (expected,) = torch.autograd.grad(exact, x, grad)
    single = x.detach().float().requires_grad_()
    halves = single.split(2, dim=2)
    total = kernels.sum_squares(halves[0]) + kernels.sum_squares(halves[1])
    found = torch.cat(
        [
            kernels.rmsnorm_rope(half, part.float(), sum_squares_SB1=total, num_features=24)
            for half, part in zip(halves, weight.split(2), strict=True)
        ],
        dim=2,
    )
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    (found_grad,) = torch.autograd.grad(found, single, grad.float())
    torch.testing.assert_close(found_grad.double(), expected, rtol=2e-5, atol=2e-5)


def test_gelu_far_from_zero() -> None:
    x = torch.tensor([-1e4, -100.0, -20.0, -6.0, -1e-30, 0.0, 1e-30, 6.0, 20.0, 100.0, 1e4])
    x.requires_grad_()
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    found = kernels.bias_gelu_tanh(x[None, None])
    torch.testing.assert_close(found[0, 0].double(), exact, rtol=2e-6, atol=1e-8)
    (grad,) = torch.autograd.grad(found.sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), x)
    torch.testing.assert_close(grad, expected.float(), rtol=2e-6, atol=1e-7)
    assert kernels.bias_gelu_tanh(torch.tensor([[[torch.nan]]])).isnan().all()


def test_no_tokens() -> None:
    """A rank may hold none."""
    x, modulation = (
        torch.zeros(0, 2, 8, requires_grad=True),
        torch.zeros(1, 2, 8, requires_grad=True),
    )
    y = kernels.layernorm_modulate(x, modulation, modulation)
    y = kernels.gated_residual(y, y, modulation)
    y = kernels.bias_gelu_tanh(y)
    (grad,) = torch.autograd.grad(y.sum(), modulation)
    assert y.shape == (0, 2, 8)
    assert torch.equal(grad, torch.zeros(1, 2, 8))


def in_new_process(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_keeps_subnormal_numbers() -> None:
    """Loading a library linked with -ffast-math would flush them to zero in the whole process."""
    script = """
import torch
from megagen import kernels
assert kernels.status()["cpu"].available
kernels.bias_gelu_tanh(torch.ones(1, 1, 8))
print((torch.tensor([1e-40]) * 1).item() > 0)
"""
    assert in_new_process(script).strip() == "True"


def test_forked_child_does_not_hang() -> None:
    """OpenMP's threads do not survive a fork: the child must go on without them."""
    script = """
import os, torch
from megagen import kernels
x, w = torch.randn(4096, 1, 64), torch.ones(64)
torch.set_num_threads(2)
expected = kernels.layernorm_affine(x, w, w).numpy().tobytes()
pid = os.fork()
if pid == 0:
    os._exit(0 if kernels.layernorm_affine(x, w, w).numpy().tobytes() == expected else 3)
print(os.waitpid(pid, 0)[1])
"""
    assert in_new_process(script).strip() == "0"
