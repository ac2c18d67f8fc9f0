"""Fresh random inputs: a new seed each run, shown where a test fails."""

import os
import secrets

import pytest
import torch


@pytest.fixture
def seeded() -> torch.Generator:
    seed = int(os.environ.get("MEGAGEN_TEST_SEED", secrets.randbelow(2**31)))
    print(f"MEGAGEN_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
