"""Native parts of megagen, and the recipes that a built package carries.

torch is never imported here: the extension sees tensors as raw addresses, so one build serves any
torch version. ``MEGAGEN_BUILD_CPU`` = ``auto`` (default: build, go on without on failure) | ``0``
(skip) | ``1`` (fail if it cannot be built).
"""

from __future__ import annotations

import os
import platform
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
    "-Wall",
]
CPU_OPS = ("layernorm", "residual", "norm_rope", "bias_gelu")
CPU_VARIANTS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_VARIANTS["avx2"] = ["-mavx2", "-mfma"]


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


class BuildExt(build_ext):
    """Compiles the per-instruction-set objects before the module that links them."""

    def build_extension(self, ext: Extension) -> None:
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
            ["csrc/cpu/bindings.cpp"],
            variants=[f"csrc/cpu/{op}.cpp" for op in CPU_OPS],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
