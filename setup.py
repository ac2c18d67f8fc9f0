"""Native parts of megagen, and the recipes that a built package carries.

torch is never imported here: the extensions see tensors as raw addresses, so one build serves any
torch version. ``MEGAGEN_BUILD_CPU`` and ``MEGAGEN_BUILD_CUDA`` = ``auto`` (default: build, go on
without on failure; CUDA only where nvcc is found) | ``0`` (skip) | ``1`` (fail if it cannot be
built).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

RECIPES = Path("configs/fastgen")
CSRC = Path("csrc")
# -ffast-math is left out on purpose: at link time it would set flush-to-zero for the whole process.
CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
]
CPU_OPS = (
    *("layernorm", "residual", "norm_rope", "bias_gelu"),
    *(f"vsa_{part}" for part in ("forward", "backward", "coarse", "glue")),
)
CPU_VARIANTS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    CPU_VARIANTS["avx512"] = [
        *CPU_VARIANTS["avx2"],
        *(f"-mavx512{part}" for part in ("f", "vl", "dq", "bw")),
        "-mprefer-vector-width=512",
    ]
# The -gencode form: -arch=sm_90a would also make PTX for compute_90, which knows no wgmma. A kernel
# that spills registers is a warning, and warnings are errors.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v,-warn-spills,-Werror",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]


def build_mode(variable: str) -> str:
    """``auto``, ``0`` or ``1`` as the environment variable says."""
    value = os.environ.get(variable, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, not {value!r}")
    return value


class CpuExtension(Extension):
    """``variants`` are compiled once per instruction set; the module picks one at run time."""

    def __init__(self, name: str, sources: list[str], variants: list[str]) -> None:
        import pybind11  # here, so that MEGAGEN_BUILD_CPU=0 needs no pybind11

        super().__init__(
            name,
            sources,
            include_dirs=[pybind11.get_include(), str(CSRC / "cpu")],
            language="c++",
            extra_compile_args=[*CPU_FLAGS, f"-DMEGAGEN_X86={int(len(CPU_VARIANTS) > 1)}"],
            extra_link_args=["-fopenmp"],
            depends=[*variants, *map(str, sorted((CSRC / "cpu").glob("*.h")))],
            optional=build_mode("MEGAGEN_BUILD_CPU") == "auto",
        )
        self.variants = variants


class CudaExtension(Extension):
    """Kernels for sm_90a behind plain C entry points; imports without CUDA libraries."""

    def __init__(self, name: str, folder: Path) -> None:
        import pybind11

        headers = [p for pattern in ("*.h", "*.cuh") for p in sorted(folder.glob(pattern))]
        super().__init__(
            name,
            [str(folder / "bindings.cpp")],
            include_dirs=[pybind11.get_include(), str(folder)],
            language="c++",
            extra_compile_args=["-std=c++17", "-O1", "-g0", "-fvisibility=hidden", "-Wall"],
            libraries=["cudart_static", "rt", "pthread", "dl"],
            depends=list(map(str, [*sorted(folder.glob("*.cu")), *headers])),
            optional=build_mode("MEGAGEN_BUILD_CUDA") == "auto",
        )
        self.kernels = sorted(folder.glob("*.cu"))


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or else of PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_libraries(nvcc: str) -> str:
    """Folder of libcudart_static.a, as nvcc itself names it: PATH may hold a wrapper."""
    command = [nvcc, "--dryrun", "-x", "cu", "/dev/null", "-c", "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if top and Path(top[1].strip(), folder, "libcudart_static.a").exists():
            return str(Path(top[1].strip(), folder))
    raise RuntimeError("libcudart_static.a was not found")


def compile_kernels(nvcc: str, source: Path, folder: Path, newest: float) -> str:
    """The object of one .cu file, compiled anew when a file of its folder is newer.

    Raises:
        RuntimeError: it does not compile, spills registers, or its wgmma instructions would run
            one after the other.
    """
    target = folder / f"{source.stem}.o"
    if target.exists() and target.stat().st_mtime > newest:
        return str(target)
    folder.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *NVCC_FLAGS, "-c", str(source), "-o", str(target)]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    complaints = [
        line for line in done.stdout.splitlines() if re.search(r"error|\(C75\d\d\)", line)
    ]
    if done.returncode or complaints:
        target.unlink(missing_ok=True)
        print(done.stdout, flush=True)
        what = complaints[0] if complaints else f"nvcc ended with {done.returncode}"
        raise RuntimeError(f"{source.name}: {what}")
    return str(target)


class BuildExt(build_ext):
    """Compiles the per-instruction-set objects before the module that links them."""

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            self.build_cuda(ext)
            return
        if isinstance(ext, CpuExtension):
            for isa, flags in CPU_VARIANTS.items():
                ext.extra_objects += self.compiler.compile(
                    ext.variants,
                    output_dir=str(Path(self.build_temp) / isa),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args, *flags, f"-DMEGAGEN_ISA={isa}"],
                    depends=ext.depends,
                )
        super().build_extension(ext)

    def build_cuda(self, ext: CudaExtension) -> None:
        """Leaves a line beside the module that says whether it was built: the doctor reads it."""
        note = Path(self.get_ext_fullpath(ext.name)).with_name("_cuda_build.txt")
        note.parent.mkdir(parents=True, exist_ok=True)
        try:
            nvcc = find_nvcc()
            if nvcc is None:
                raise RuntimeError("nvcc was not found")
            newest = max(Path(p).stat().st_mtime for p in ext.depends)
            folder = Path(self.build_temp) / "cuda"
            ext.extra_objects = [
                compile_kernels(nvcc, source, folder, newest) for source in ext.kernels
            ]
            ext.library_dirs = [cuda_libraries(nvcc)]
            super().build_extension(ext)
        except Exception as error:
            note.write_text(f"{error}\n")
            if not ext.optional:
                raise
            self.warn(f"the CUDA kernels were not built: {error}")
        else:
            note.write_text("built\n")


class BuildPy(build_py):
    """Copies the built-in recipes into the package; an editable one reads the repository's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "megagen" / "fastgen" / "recipes"
            target.mkdir(parents=True, exist_ok=True)
            for recipe in sorted(RECIPES.glob("*.yaml")):
                self.copy_file(str(recipe), str(target / recipe.name))


extensions = []
if build_mode("MEGAGEN_BUILD_CPU") != "0":
    extensions.append(
        CpuExtension(
            "megagen._cpu",
            ["csrc/cpu/bindings.cpp", "csrc/cpu/vsa_bindings.cpp"],
            variants=[f"csrc/cpu/{op}.cpp" for op in CPU_OPS],
        )
    )
if build_mode("MEGAGEN_BUILD_CUDA") != "0":
    extensions.append(CudaExtension("megagen._cuda", CSRC / "cuda"))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
