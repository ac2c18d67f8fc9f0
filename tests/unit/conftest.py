"""Fresh random inputs: a new seed each run, shown where a test fails."""

import pytest
import torch

from tests import seeds


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(seeds.fresh())
