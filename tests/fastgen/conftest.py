"""The package that fastgen takes the place of, and a fresh seed for torch's default generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def published() -> Any:
    """``modelopt.torch.fastgen``; whatever is compared with it is skipped where it is missing."""
    return pytest.importorskip(
        "modelopt.torch.fastgen",
        reason="nvidia-modelopt cannot be imported: pip install 'megagen[dev]'",
        exc_type=ImportError,
    )


@pytest.fixture(autouse=True)
def fresh_seed(seeded: torch.Generator) -> None:
    torch.manual_seed(seeded.initial_seed())
