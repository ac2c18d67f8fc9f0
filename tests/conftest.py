"""What every test may rely on: one thread, no network, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests import seeds


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_report_header() -> str:
    return f"MEGAGEN_TEST_SEED of what tests share: {seeds.SHARED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seeded() -> torch.Generator:
    """Random inputs that differ from run to run; a failing test shows how to repeat them."""
    return torch.Generator().manual_seed(seeds.fresh())
