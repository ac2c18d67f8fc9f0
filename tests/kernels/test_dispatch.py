"""Which backend serves what, and that megagen works without the extension."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megagen import kernels
from megagen.kernels.backend import serves_cpu
from tests.kernels.operations import ALL, CASES, case_id, errors, gradients_like, run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_the_reference(dtype: torch.dtype) -> None:
    assert not serves_cpu(torch.zeros(2, dtype=dtype))


def test_meta_tensors_take_the_reference() -> None:
    x, gate = torch.empty(4, 2, 8, device="meta"), torch.empty(1, 2, 8, device="meta")
    assert kernels.gated_residual(x, x, gate).shape == (4, 2, 8)


@pytest.mark.parametrize(("name", "case"), CASES, ids=case_id)
def test_bf16_is_computed_in_fp32(name: str, case: dict[str, int], seeded: torch.Generator) -> None:
    """The output is the fp64 result of the same bf16 inputs, rounded once: half a bf16 step."""
    spec = ALL[name]
    made = spec.make(case, seeded, torch.bfloat16)
    grad = gradients_like(spec, made, seeded)
    exact = run(spec.reference, spec, made, torch.float64, grad)
    found = run(spec.function, spec, made, torch.bfloat16, grad)
    assert found["out"].dtype == torch.bfloat16
    assert errors(found, exact)["out"] < 2**-8


def test_wrong_shapes_are_refused() -> None:
    x = torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match="scale must be"):
        kernels.layernorm_modulate(x, torch.zeros(1, 2, 7), torch.zeros(1, 2, 7))
    with pytest.raises(ValueError, match="do not divide 6 tokens"):
        kernels.gated_residual(x, x, torch.zeros(4, 2, 8))
    with pytest.raises(ValueError, match="rows_S must be int64"):
        kernels.gated_residual(x, x, torch.zeros(4, 2, 8), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="bias is"):
        kernels.bias_gelu_tanh(x, torch.zeros(7))
    with pytest.raises(ValueError, match="together"):
        kernels.rmsnorm_rope(x[..., None], torch.zeros(8), cos=torch.zeros(6, 0))


def test_rows_out_of_range_are_refused() -> None:
    x = torch.zeros(6, 2, 8)
    rows = torch.tensor([0, 1, 2, 3, 0, 4])
    with pytest.raises((IndexError, RuntimeError)):
        kernels.gated_residual(x, x, torch.zeros(4, 2, 8), rows)


def test_works_without_the_extension() -> None:
    script = """
import sys
sys.modules["megagen._cpu"] = None
import torch
from megagen import kernels
from megagen.kernels.bias_gelu import bias_gelu_tanh_reference
x = torch.randn(3, 2, 8)
assert torch.equal(kernels.bias_gelu_tanh(x), bias_gelu_tanh_reference(x))
status = kernels.status()
assert not status["cpu"].available
assert "pip install" in status["cpu"].remedy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_package_does_not_import_torch_by_itself() -> None:
    script = "import sys, megagen.kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
