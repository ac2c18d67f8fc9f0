"""Who may import whom, read from the source: imports point downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megagen"

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "fastgen": set(),
    "kernels": {"core"},
    "parallel": {"core"},
    "data": {"core"},
    "config": {"core", "parallel", "data"},
    "tracking": {"core", "config"},
    "layers": {"core", "parallel", "kernels"},
    "models": {"core", "parallel", "kernels", "layers", "fastgen"},
    "checkpoint": {"core", "parallel", "models"},
    "engine": {"core", "parallel", "kernels", "layers", "models", "checkpoint", "fastgen"},
    "plan": {"core", "parallel", "models", "config"},
    "sampling": {"core", "parallel", "models", "checkpoint", "engine", "data", "fastgen", "config"},
    "methods": {"core", "parallel", "models", "engine", "data", "fastgen", "sampling"},
    "callbacks": {
        *{"core", "parallel", "models", "engine", "data", "fastgen", "sampling", "methods"},
        *{"tracking", "checkpoint", "config"},
    },
}
"""What each part may import of megagen besides itself."""

FURTHER = {"checkpoint/state.py": {"engine"}, "checkpoint/convert.py": {"engine"}}
"""Single files that stand higher than the rest of their part: a run's state holds its roles'."""

ON_TOP = {
    *{"__main__", "builder", "checks", "cli", "demo", "lora", "settings", "throughput"},
    "trainer",
}
"""The trainer and the command line: nothing below imports them, and they may import anything."""


@cache
def imported_parts(path: Path) -> frozenset[str]:
    """Parts of megagen that a file imports at run time (not under ``TYPE_CHECKING``)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found.update(n.split(".")[1] for n in names if n.startswith("megagen."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return frozenset(found)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    if part in ON_TOP or part == "__init__":
        return
    assert part in ALLOWED, f"new part {part!r}: say in this table what it may import"
    allowed = ALLOWED[part] | FURTHER.get(path.relative_to(PACKAGE).as_posix(), set())
    upward = imported_parts(path) - allowed - {part, "__version__", "_cpu"}
    assert not upward, f"{path.relative_to(ROOT)} imports {sorted(upward)}"


def test_the_table_has_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [p for p in ALLOWED if p not in order and ALLOWED[p] <= set(order)]
        assert ready, f"cycle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


def modules_after(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import megagen",
        "import megagen.cli.main",
        "import megagen.kernels",
        "import megagen.config",
    ],
)
def test_imports_are_light(statement: str) -> None:
    heavy = {"torch", "megatron", "triton", "diffusers", "transformers", "numpy", "pyarrow"}
    assert not heavy & modules_after(statement)


def test_fastgen_stands_alone() -> None:
    """A user may take the loss library without the rest: torch, and what reads a config."""
    allowed = {"torch", "numpy", "pydantic", "pydantic_core", "yaml"}
    for path in sorted((PACKAGE / "fastgen").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root = name.split(".")[0]
                ok = root in allowed or root in sys.stdlib_module_names
                assert ok or name.startswith("megagen.fastgen"), f"{path}: {name}"
