"""``megagen doctor``: what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

import typer


@dataclass(frozen=True)
class Line:
    """One fact: a name, what was found, and the remedy where something is missing."""

    name: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        tail = f"\n{'':24}-> {self.remedy}" if self.remedy else ""
        return f"{self.name:<24}{self.found}{tail}"


REQUIRED = ("torch", "megatron-core", "diffusers", "transformers", "av", "pyarrow")
CUDA_ONLY = {
    "transformer-engine": "transformer_impl: transformer_engine and fp8",
    "flash-attn": "attention.backend: flash",
    "triton": "Triton kernels",
}


def doctor() -> None:
    """Print versions, devices and kernel backends; exit with 1 if a required package is missing."""
    lines = [*package_lines(), *device_lines(), *kernel_lines()]
    for line in lines:
        typer.echo(str(line))
    if any(line.found == "missing" and line.name in REQUIRED for line in lines):
        raise typer.Exit(1)


def package_lines() -> list[Line]:
    """Python and the packages megagen stands on, then those only a GPU machine uses."""
    lines = [Line("python", f"{platform.python_version()} ({sys.executable})")]
    for name in ("megagen", *REQUIRED):
        found = version(name)
        lines.append(Line(name, found, "pip install -e ." if found == "missing" else ""))
    has_cuda = _has_cuda()
    for name, purpose in CUDA_ONLY.items():
        found = version(name)
        remedy = ""
        if found == "missing" and has_cuda:
            remedy = f"pip install -e '.[cuda]' for {purpose}"
        elif name == "transformer-engine" and found != "missing" and not has_cuda:
            remedy = "pip uninstall it: without CUDA it keeps megatron-core from being imported"
        lines.append(Line(name, found, remedy))
    return lines


def device_lines() -> list[Line]:
    """The accelerators torch sees, and the threads it uses on the CPU."""
    if version("torch") == "missing":
        return []
    import torch

    lines = [Line("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        built = "torch is a CPU build" if torch.version.cuda is None else "no driver or no device"
        return [*lines, Line("gpu", f"none ({built}); ranks talk over gloo")]
    for index in range(torch.cuda.device_count()):
        info = torch.cuda.get_device_properties(index)
        gigabytes = info.total_memory / 2**30
        lines.append(
            Line(f"gpu {index}", f"{info.name}, {gigabytes:.0f} GiB, sm_{info.major}{info.minor}")
        )
    return lines


def kernel_lines() -> list[Line]:
    """The kernel backends, with the reason and the remedy for one that is missing."""
    if version("torch") == "missing":
        return []
    from megagen import kernels

    return [
        Line(
            f"kernels: {name}",
            backend.detail if backend.available else f"missing: {backend.detail}",
            backend.remedy,
        )
        for name, backend in kernels.status().items()
    ]


def version(distribution: str) -> str:
    """The installed version of a distribution, or ``missing``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _has_cuda() -> bool:
    if version("torch") == "missing":
        return False
    import torch

    return torch.cuda.is_available()
