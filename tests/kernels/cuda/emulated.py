"""The CUDA kernels on an emulated processor: their own source, compiled by g++ against emulator/.

The emulator has what the kernels count on: warps, barriers in shared memory, bulk copies that
arrive late and in any order, wgmma by descriptors and fragments as the PTX ISA describes them. It
cannot show how fast a GPU is, nor that the ISA was read right; it shows that the kernels' own
arithmetic of lists, slots, phases and layouts is right under every schedule that was tried.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

from megagen.kernels.vsa.backends import cuda

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).parent / "emulator"
SOURCES = [
    *(
        KERNELS / name
        for name in ("forward.cu", "backward.cu", "combine.cu", "lists.cu", "probe.cu")
    ),
    KERNELS / "bindings.cpp",
    *sorted(EMULATOR.glob("*.cpp")),
]
FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-O1",  # products.cpp asks for more
    "-fPIC",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",  # fibers jump between stacks
    "-w",
    '-DMEGAGEN_EMULATOR="emulated.h"',
]


class Emulated:
    """The extension on the emulated processor, and the processor's switches."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None and spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.machine = ctypes.CDLL(str(path))
        self.machine.emulator_products.restype = ctypes.c_int64
        self.machine.emulator_protocol.restype = ctypes.c_char_p

    def configure(self, schedule: int, *, eager: bool = False, processors: int = 2) -> None:
        """The next launches' order of threads and copies, when products are made, the grid."""
        self.machine.emulator_configure(schedule, int(eager), processors)

    def run(self, name: str, args: Any, like: object) -> None:
        """What ``cuda._run`` is where there is no stream."""
        args.stream = 0
        getattr(self.module, name)(args)


def build() -> Path:
    """The emulated extension, compiled unless that was done for these very sources."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    import pybind11

    headers = [*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), *EMULATOR.glob("*.h")]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES, *headers]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    module = folder / "_cuda.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not module.exists():
            python = sysconfig.get_path("include")
            includes = [f"-I{p}" for p in (KERNELS, EMULATOR, pybind11.get_include(), python)]
            command = [compiler, *FLAGS, *includes, *map(str, SOURCES), "-shared"]
            partial = folder / "partial.so"
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            partial.replace(module)
    return module


@pytest.fixture(scope="session")
def built() -> Emulated:
    return Emulated(build())


@pytest.fixture
def emulated(built: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The backend ``cuda`` on CPU tensors, by way of the emulated processor."""
    monkeypatch.setattr(cuda, "load_cuda", lambda: (built.module, ""))
    monkeypatch.setattr(cuda, "_run", built.run)
    built.configure(0)
    return built
