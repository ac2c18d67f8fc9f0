"""Triton kernels compile for GPUs that are not here: every ``compiled_*.py`` on both tritons."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.triton.interpret import HERE, ROOT, run_pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install -e '.[dev]'"
)

FILES = sorted(HERE.glob("compiled_*.py"))
OLDEST = ROOT / ".venv" / "triton-oldest"
"""Where ``make triton-oldest`` puts the oldest triton that pyproject.toml allows."""


@pytest.mark.timeout(960)
@pytest.mark.parametrize("version", ["installed", "oldest"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_compiles(file: Path, version: str, tmp_path: Path) -> None:
    environment = {"TRITON_INTERPRET": "", "TRITON_CACHE_DIR": str(tmp_path)}
    if version == "oldest":
        if not (OLDEST / "triton").is_dir():
            pytest.skip(f"{OLDEST.relative_to(ROOT)} is not there: make triton-oldest")
        paths = [str(OLDEST), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    run_pytest(file, environment, plugin=False, timeout=900)
