"""Random inputs of these tests."""

from __future__ import annotations

import os
import secrets

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """Differs from run to run; a failing test prints the seed that repeats it."""
    seed = int(os.environ.get("MEGAGEN_TEST_SEED", secrets.randbelow(2**31)))
    print(f"MEGAGEN_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
