"""No kernel is left out, the counts are right, and the triton is the one that was asked for."""

from __future__ import annotations

from importlib import metadata

import pytest
import triton
import triton.language as tl

from tests.kernels.triton import compiled_fused, compiled_vsa
from tests.kernels.triton.compiled import ARCHITECTURES, IS_OLDEST, compile_kernel
from tests.kernels.triton.launches import every_kernel

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
    if IS_OLDEST:
        assert triton.__version__ == "3.6.0"
    else:
        assert triton.__version__ == metadata.version("triton")


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kernel_is_compiled(target: int) -> None:
    tables = (compiled_fused.EVERYWHERE, compiled_vsa.EVERYWHERE)
    compiled = {launch.kernel for table in tables for launch in table.values()}
    compiled |= {x.kernel for (_, _, only), x in compiled_vsa.FINE.items() if only == target}
    missing = every_kernel() - compiled
    assert not missing, sorted(f"{k.module}.{k.__name__}" for k in missing)


def test_kernels_are_found() -> None:
    """By what calls what: helpers of kernels are none."""
    names = {kernel.__name__ for kernel in every_kernel()}
    assert {"fine_forward_kernel", "add_more", "squares_kernel"} <= names
    assert not names & {"load_block", "rotate", "choose", "segment"}
