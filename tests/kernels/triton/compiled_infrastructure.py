"""The counts are right about a known kernel, and the triton is the one that was asked for."""

from __future__ import annotations

import os
from importlib import metadata

import pytest
import triton
import triton.language as tl

from tests.kernels.triton.compiled import compile_kernel

SIGNATURE = {"A": "*bf16", "B": "*bf16", "C": "*fp32"}


@triton.jit
def product(A, B, C, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    places = rows * SIZE + columns
    tl.store(C + places, tl.dot(tl.load(A + places), tl.load(B + places)))


@pytest.mark.parametrize(("target", "matrix"), [(80, "hmma"), (90, "hgmma")])
def test_counts(target: int, matrix: str) -> None:
    counts = compile_kernel(product, SIGNATURE, {"SIZE": 64}, target).check()
    assert getattr(counts, matrix) > 0
    assert 0 < counts.registers <= 255
    assert counts.shared >= 64 * 64 * 2
    assert counts.wide_loads > 0


def test_spills_are_seen() -> None:
    counts = compile_kernel(product, SIGNATURE, {"SIZE": 128}, 80, {"maxnreg": 96})
    assert counts.stack > 0
    assert counts.ldl > 0 and counts.stl > 0
    with pytest.raises(AssertionError, match="spills"):
        counts.check()


def test_this_is_the_version_that_was_asked_for() -> None:
    if "triton-oldest" in os.environ.get("PYTHONPATH", ""):
        assert triton.__version__ == "3.6.0"
    else:
        assert triton.__version__ == metadata.version("triton")
