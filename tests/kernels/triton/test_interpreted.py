"""Triton kernels against their references: every ``interpreted_*.py`` here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.triton.interpret import HERE, run_interpreted, run_on_gpu

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -e '.[dev]'"
)

FILES = sorted(HERE.glob("interpreted_*.py"))


@pytest.mark.timeout(960)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    run_interpreted(file)


@pytest.mark.gpu
@pytest.mark.timeout(1260)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_a_gpu(file: Path) -> None:
    run_on_gpu(file)
