"""pytest plugin where ``interpreted_*.py`` files run: the repaired interpreter, the device."""

from __future__ import annotations

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from tests.kernels.triton import repair

    repair.install()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: the CPU under the interpreter, else the GPU."""
    return "cpu" if INTERPRETING else "cuda"
