"""What every test may rely on: one thread, no network, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seeded() -> torch.Generator:
    """Random inputs that differ from run to run; a failing test shows how to repeat them."""
    seed = int(os.environ.get("MEGAGEN_TEST_SEED", secrets.randbelow(2**31)))
    print(f"MEGAGEN_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
