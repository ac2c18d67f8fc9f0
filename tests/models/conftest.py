"""Random inputs of these tests."""

from __future__ import annotations

import pytest
import torch

from tests import seeds


@pytest.fixture
def generator() -> torch.Generator:
    """Differs from run to run; a failing test prints the seed that repeats it."""
    return torch.Generator().manual_seed(seeds.fresh())
