"""Test files that run Triton kernels: under the interpreter on a CPU, compiled on a GPU.

Write ``tests/kernels/triton/interpreted_<name>.py``, an ordinary pytest file that takes the fixture
``device`` for its tensors; ``test_interpreted.py`` finds it and runs it in a process of its own,
since triton reads TRITON_INTERPRET where it is imported. Every inner failure is shown with its
traceback. In that process fp32 and bf16 kernels are right, bf16 as long as arithmetic is done on
values converted to fp32. Not there: libdevice, inline assembly, atomics on bf16, and
``triton.autotune`` over more than one config. Each ``tl`` call costs about 0.1 ms whatever its
size, so keep grids small (some 64 tile pairs a case), and mask every load: one out of bounds is a
segmentation fault.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def run_pytest(file: Path, environment: dict[str, str], *, plugin: bool, timeout: float) -> None:
    """Run one file in a process and fail with what pytest printed unless everything passed.

    Args:
        file: of tests.
        environment: variables to add to this process's; an empty value takes one away.
        plugin: load ``tests.kernels.triton.plugin``.
        timeout: seconds.
    """
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
    merged = {name: value for name, value in merged.items() if value}
    words = ["-p", "tests.kernels.triton.plugin"] if plugin else []
    words += ["-p", "no:cacheprovider", "-q", "--tb=short", "-o", f"timeout={timeout:.0f}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(file)],
        cwd=ROOT,
        env=merged,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    print(done.stdout)
    if done.returncode != 0:
        output = f"{done.stdout}\n{done.stderr}"[-20_000:]
        pytest.fail(f"{file.name}: exit status {done.returncode}\n{output}", pytrace=False)


def run_interpreted(file: Path, timeout: float = 900) -> None:
    """Run a file's tests on the CPU by Triton's interpreter."""
    run_pytest(file, {"TRITON_INTERPRET": "1"}, plugin=True, timeout=timeout)


def run_on_gpu(file: Path, timeout: float = 1200) -> None:
    """Run the same tests compiled, on the GPU of this machine."""
    run_pytest(file, {"TRITON_INTERPRET": ""}, plugin=True, timeout=timeout)
