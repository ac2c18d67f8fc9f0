"""What nvcc made of the kernels, read from the built extension: no GPU is needed to look."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megagen import kernels
from tests.kernels.cuda.sass import Kernel

ROOT = Path(__file__).parents[3]
MATRIX = ("forward_kernel", "query_grad_kernel", "key_grad_kernel")
VARIANTS = {
    "forward_kernel": {("Bf16", 64), ("Bf16", 128), ("Fp16", 64), ("Fp16", 128)},
    "query_grad_kernel": {("Bf16", 64), ("Bf16", 128)},
    "key_grad_kernel": {("Bf16", 64), ("Bf16", 128)},
}
MAX_SHARED = 232_448
LAUNCH_REGISTERS = 168
"""A thread's at launch, as csrc/cuda/tiles.cuh counts on."""
PRODUCER_REGISTERS = 24


def extension() -> Path:
    spec = importlib.util.find_spec("megagen._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the CUDA extension is not built")
    return Path(spec.origin)


def tool() -> Path:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("cuobjdump comes with triton")
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def code() -> dict[str, list[str]]:
    """Instructions of each kernel."""
    done = subprocess.run(
        [str(tool()), "-sass", str(extension())], capture_output=True, text=True, check=True
    )
    kernels_: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "Function :" in line:
            found = kernels_.setdefault(line.split(":")[1].strip(), [])
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S+.*;", line):
            found.append(line)
    return kernels_


def variants(code: dict[str, list[str]], kernel: str) -> list[tuple[str, int, bool, list[str]]]:
    """Element type, head size, whether it is the fast variant, instructions."""
    found = []
    for name, lines in code.items():
        match = re.search(rf"{kernel}INS0_4(\w\w\w\w)ELi(\d+)E(Lb1E)?", name)
        if match:
            found.append((match[1], int(match[2]), match[3] is not None, lines))
    return found


def count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def products(kernel: str, dim: int, is_fast: bool) -> int:
    """wgmma instructions that the source asks for, one for each 16 columns or rows."""
    along = dim // 16
    if kernel == "forward_kernel":  # begin, next, finish, and blocks of 16, 32, 48
        return 2 * along + 2 * 4 + 3 * along + 1 + 2 + 3
    if kernel == "query_grad_kernel":
        return 2 * 2 * along + 2 * 4 + 3 * 2 * along + 1 + 2 + 3
    per_entry = 4 * dim // 64 if is_fast else 0
    return 4 * (2 * along + per_entry) + 2 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("kernel", MATRIX)
def test_products_and_copies_are_what_was_asked_for(
    code: dict[str, list[str]], kernel: str
) -> None:
    found = variants(code, kernel)
    assert {(kind, dim) for kind, dim, *_ in found} == VARIANTS[kernel]
    for _, dim, is_fast, lines in found:
        assert count(lines, r"\bHGMMA\b") == products(kernel, dim, is_fast), (dim, is_fast)
        assert count(lines, r"\bUTMALDG\b") >= 2
        assert count(lines, r"\bUSETMAXREG\b") == 2
    if kernel == "key_grad_kernel":  # row statistics come by plain bulk copies
        assert all(count(lines, r"\bUBLKCP\b") >= 1 for *_, lines in found)
        assert all(bool(count(lines, r"\bREDG?\b")) == is_fast for *_, is_fast, lines in found)


@pytest.mark.parametrize("kernel", MATRIX)
def test_products_stay_under_way_where_the_source_says(
    code: dict[str, list[str]], kernel: str
) -> None:
    """A wait that the compiler adds, or one for everything, would undo the overlap."""
    waits = {
        "forward_kernel": {0: 10, 1: 1},
        "query_grad_kernel": {0: 9, 1: 5, 2: 1},
        "key_grad_kernel": {0: 4, 1: 8},
    }[kernel]
    for _, dim, is_fast, lines in variants(code, kernel):
        pending = Counter(
            int(m[1], 16)
            for line in lines
            if (m := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", line))
        )
        expected = Counter(waits)
        if is_fast:
            expected[0] += 4 * dim // 64
        assert pending == expected, (dim, is_fast)


@pytest.mark.parametrize(
    ("kernel", "pending"), [("forward_kernel", 1), ("query_grad_kernel", 2), ("key_grad_kernel", 1)]
)
def test_weights_are_made_beside_a_product(
    code: dict[str, list[str]], kernel: str, pending: int
) -> None:
    """The assembler may move a wait, and what it would overlap with then comes after it."""
    for _, dim, is_fast, lines in variants(code, kernel):
        ends = [i for i, line in enumerate(lines) if re.search(r"DEPBAR\.LE gsb0|HGMMA", line)]
        start = next(i for i in ends if f"gsb0, 0x{pending}" in lines[i])
        beside = lines[start : min(i for i in ends if i > start)]
        assert count(beside, r"\bMUFU\.EX2\b") >= 32, (dim, is_fast)


@pytest.mark.parametrize("kernel", MATRIX)
def test_registers_of_products_under_way_are_left_alone(
    code: dict[str, list[str]], kernel: str
) -> None:
    for _, dim, is_fast, lines in variants(code, kernel):
        found = Kernel(lines)
        assert sum(one.product is not None for one in found.code) == products(kernel, dim, is_fast)
        assert found.conflicts() == [], (dim, is_fast)
        assert found.unfenced() == [], (dim, is_fast)
        # what the producer gave away is not its own any more
        assert 0 < found.registers_after("USETMAXREG.DEALLOC") <= PRODUCER_REGISTERS
        without_waits = [line.replace("WARPGROUP.DEPBAR.LE", "NOP") for line in lines]
        assert Kernel(without_waits).conflicts(), "a missing wait would go unseen"
        without_fences = [line.replace("WARPGROUP.ARRIVE", "NOP") for line in lines]
        assert Kernel(without_fences).unfenced(), "a missing fence would go unseen"


def test_every_kernel_of_the_source_is_in_it(code: dict[str, list[str]]) -> None:
    sources = (ROOT / "csrc" / "cuda").glob("*.cuh")
    pattern = r"HW_(?:SMALL_)?KERNEL\(.*\)\n(\w+)\("
    names = {name for source in sources for name in re.findall(pattern, source.read_text())}
    assert names >= {*MATRIX, "combine_grad_kernel", "fill_kernel", "probe_kernel"}
    for name in names:
        assert any(f"{len(name)}{name}" in mangled for mangled in code), name
    fast = {(dim, is_fast) for _, dim, is_fast, _ in variants(code, "key_grad_kernel")}
    assert fast == {(dim, is_fast) for dim in (64, 128) for is_fast in (False, True)}


def test_nothing_is_spilled(code: dict[str, list[str]]) -> None:
    assert len(code) >= 18
    for name, lines in code.items():
        assert not count(lines, r"\b(LDL|STL)\b"), name
    done = subprocess.run(
        [str(tool()), "-res-usage", str(extension())], capture_output=True, text=True, check=True
    )
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, done.stdout)
    assert len(usage) == len(code)
    for name, registers, stack, shared, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(shared) <= MAX_SHARED
        # a block owns 3 x 128 times as many: with fewer, consumers would wait for theirs forever
        if any(kernel in name for kernel in MATRIX):
            assert int(registers) == LAUNCH_REGISTERS, name


def test_only_this_architecture_is_in_it() -> None:
    done = subprocess.run(
        [str(tool()), "-lelf", str(extension())], capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"sm_\w+", done.stdout)) == {"sm_90a"}


def test_it_imports_without_a_driver() -> None:
    extension()
    script = """
import time; t = time.perf_counter()
from megagen import _cuda
assert time.perf_counter() - t < 5
import sys; assert "torch" not in sys.modules
try:
    args = _cuda.Forward(); args.sequences = args.num_q = args.num_k = 1; args.dim = 64
    _cuda.vsa_forward(args)
except RuntimeError as error:
    assert "cuTensorMapEncodeTiled" in str(error) or "device" in str(error), error
else:
    raise AssertionError("a launch without tensors went well")
args.dim = 80
try: _cuda.vsa_forward(args)
except RuntimeError as error: assert "head size" in str(error)
"""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=hidden
    )
    assert done.returncode == 0, done.stderr


def test_the_status_tells_what_was_built() -> None:
    status = kernels.status()["cuda"]
    if importlib.util.find_spec("megagen._cuda") is None:
        assert not status.available and "MEGAGEN_BUILD_CUDA=1" in status.remedy
    else:
        assert status.available and "Hopper" in status.detail
