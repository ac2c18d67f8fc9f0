"""Rules of the source that a linter does not know: sizes, devices, randomness, names."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

from megagen.cli.main import COMMANDS
from megagen.core.registry import resolve

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "megagen").rglob("*.py"))

MAX_FILE, MAX_FUNCTION = 400, 60
TOLERANCE = 1.1
"""Beyond the limit is a warning, beyond this times the limit a failure."""

CUDA_ALLOWED = {
    "megagen/core/process.py",
    "megagen/parallel/cpu_platform.py",
    "megagen/kernels/backend.py",  # the name of a kernel backend
    "megagen/kernels/vsa/dispatch.py",  # which backends serve which type of device
}
"""Where the word may stand as a device: everything else asks ``core.process.device()``."""

GLOBAL_RANDOM = re.compile(
    r"\b(?:torch\.(?:manual_seed|seed|cuda\.manual_seed\w*)"
    r"|np\.random\.(?!default_rng|Generator)\w+|numpy\.random\.(?!default_rng|Generator)\w+"
    r"|random\.(?:seed|random|randint|choice|choices|shuffle|sample|uniform|gauss))\("
)
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
IN_PLACE_DRAWS = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "trunc_normal_"}
RANDOM_LIKE = {"rand_like", "randn_like", "randint_like"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def by_path(path: Path) -> str:
    return relative(path).removeprefix("megagen/")


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_sizes(path: Path) -> None:
    source = path.read_text()
    sizes = {"the file": (len(source.splitlines()), MAX_FILE)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            # a command's options stand in its signature: only the body counts
            sizes[node.name] = (node.end_lineno - node.body[0].lineno + 1, MAX_FUNCTION)
    for what, (lines, limit) in sizes.items():
        if lines > limit:
            warnings.warn(f"{relative(path)}: {what} has {lines} lines", stacklevel=1)
        assert lines <= TOLERANCE * limit, f"{what} has {lines} lines: split it"


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_devices_are_named_in_one_place(path: Path) -> None:
    if relative(path) in CUDA_ALLOWED:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.fullmatch(r"cuda(:\d+)?", node.value), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            call = ast.unparse(node)
            assert call in ("torch.cuda", "torch.version.cuda"), f"line {node.lineno}: {call}"


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_no_global_randomness(path: Path) -> None:
    """Every draw names its generator, so that a run does not depend on what ran before it."""
    source = path.read_text()
    found = GLOBAL_RANDOM.search(source)
    assert found is None, found and found[0]
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        assert name not in RANDOM_LIKE, f"line {node.lineno}: {name} takes no generator"
        draws = (name in DRAWS and owner == "torch") or name in IN_PLACE_DRAWS
        if draws:
            given = {keyword.arg for keyword in node.keywords}
            assert given & {"generator", "device", None} and (
                "generator" in given or _on_meta(node)
            ), f"line {node.lineno}: {name} without a generator"


def _on_meta(call: ast.Call) -> bool:
    return any(k.arg == "device" and ast.unparse(k.value) == "'meta'" for k in call.keywords)


def tables() -> list[tuple[str, str]]:
    """Every ``NAME: dict[str, str] = {... "package.module:Name" ...}`` of the package."""
    entries = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
                for item in value.values:
                    text = item.value if isinstance(item, ast.Constant) else None
                    if isinstance(text, str) and re.fullmatch(r"megagen\.[\w.]+:\w+", text):
                        entries.append((relative(path), text))
    return entries


@pytest.mark.parametrize(("path", "target"), tables(), ids=str)
def test_registries_resolve(path: str, target: str) -> None:
    assert resolve(target) is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_resolve(name: str) -> None:
    assert callable(resolve(COMMANDS[name].target))


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_files_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "no docstring at the head of the file"
    assert "NotImplementedError" not in path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())
