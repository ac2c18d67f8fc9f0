"""Which launch shapes of the fine stage are fastest on the GPU at hand.

``python -m megagen.kernels.triton.vsa_tune --head-dim 128`` tries every shape that fits, compares
its result with that of the table in ``vsa_launch``, and prints time and TFLOP/s on the listed
blocks.

Legend: B batch, H heads, S slots (64 a block), D head dim, q k blocks, M places of a list.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from megagen.core.process import device
from megagen.kernels.triton.vsa_fine_backward import fine_delta, fine_dkv, fine_dq
from megagen.kernels.triton.vsa_fine_forward import fine_forward
from megagen.kernels.triton.vsa_index import (
    key_blocks_of_queries,
    query_blocks_of_keys,
    transpose_index,
)
from megagen.kernels.triton.vsa_launch import BLOCK, KERNELS, Config, config_for

PRODUCTS = {"fine_forward": 2, "fine_dq": 3, "fine_dkv": 4}
"""Matrix products that a kernel makes for each pair of blocks."""


@dataclass(frozen=True)
class Trial:
    """One shape of one kernel.

    Attributes:
        ms: median time.
        tflops: 1e12 operations a second on the listed blocks, those of ragged ones in full.
        error: relative L2 distance from the result under the table's shape.
    """

    kernel: str
    config: Config
    ms: float
    tflops: float
    error: float


@dataclass(frozen=True)
class Problem:
    """Random tensors and lists of ``topk`` random key blocks for each query block."""

    head_dim: int = 128
    heads: int = 12
    blocks: int = 624
    topk: int = 63
    ragged: float = 0.27
    """Share of the blocks that are half full; a 480p Wan clip has so many ragged ones."""


def configs(kernel: str, has_tma: bool) -> Iterator[Config]:
    """Every shape worth a try; some will not fit."""
    pairs = (False, True) if kernel == "fine_forward" else (False,)
    tma = (True, False) if has_tma else (False,)
    for warps, stages, bulk, two in itertools.product((4, 8), (2, 3, 4, 5), tma, pairs):
        yield Config(warps, stages, tma=bulk, pairs=two)


def runs(
    problem: Problem, where: torch.device
) -> dict[str, Callable[[Config], tuple[Tensor, ...]]]:
    """Each kernel as a function of its shape."""
    generator = torch.Generator(where).manual_seed(0)
    H, n, D = problem.heads, problem.blocks, problem.head_dim
    shape = (1, H, n * BLOCK, D)
    q, k, v, do = (
        torch.randn(shape, generator=generator, device=where, dtype=torch.bfloat16)
        for _ in range(4)
    )
    order = torch.rand(1, H, n, n, generator=generator, device=where).argsort(-1)
    idx = order[..., : problem.topk].sort(-1).values.int()
    num = torch.full((1, H, n), problem.topk, dtype=torch.int32, device=where)
    is_ragged = torch.rand(n, generator=generator, device=where) < problem.ragged
    sizes = torch.where(is_ragged, BLOCK // 2, BLOCK).int()
    keys = key_blocks_of_queries(idx, num, sizes)
    queries = query_blocks_of_keys(*transpose_index(idx, num, n), sizes)
    scale = D**-0.5
    out, lse = fine_forward(q, k, v, keys, sizes, sizes, scale, config_for("fine_forward", q))
    given = (q, k, v, do, *fine_delta(out, do, lse, None, sizes))
    return {
        "fine_forward": lambda c: fine_forward(q, k, v, keys, sizes, sizes, scale, c)[:1],
        "fine_dq": lambda c: (fine_dq(*given, keys, sizes, sizes, scale, c),),
        "fine_dkv": lambda c: fine_dkv(*given, queries, sizes, sizes, scale, c),
    }


def tune(problem: Problem, kernels: tuple[str, ...] = KERNELS) -> list[Trial]:
    """Trials of each kernel, fastest first; shapes that do not fit the GPU are left out."""
    where = device()
    has_tma = torch.cuda.get_device_capability(where) >= (9, 0)
    functions = runs(problem, where)
    like = torch.empty(problem.head_dim, dtype=torch.bfloat16, device=where)
    trials = []
    for kernel in kernels:
        expected = functions[kernel](config_for(kernel, like))
        for config in configs(kernel, has_tma):
            trial = attempt(kernel, config, functions[kernel], expected, problem)
            trials += [] if trial is None else [trial]
    return sorted(trials, key=lambda t: (kernels.index(t.kernel), t.ms))


def attempt(
    kernel: str,
    config: Config,
    function: Callable[[Config], tuple[Tensor, ...]],
    expected: tuple[Tensor, ...],
    problem: Problem,
) -> Trial | None:
    """A trial, or None where the shape needs more than the GPU has."""
    try:
        found = function(config)
    except OutOfResources:
        return None
    pairs = zip(found, expected, strict=True)
    error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    ms = do_bench(lambda: function(config), warmup=20, rep=100, return_mode="median")
    steps = problem.heads * problem.blocks * problem.topk
    work = 2 * PRODUCTS[kernel] * BLOCK * BLOCK * problem.head_dim * steps
    return Trial(kernel, config, ms, work / ms / 1e9, error)


def main() -> None:
    """Print a table, and the table's entries that would be faster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Problem()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    problem = Problem(**vars(parser.parse_args()))
    best: dict[str, Trial] = {}
    for trial in tune(problem):
        best.setdefault(trial.kernel, trial)
        print(f"{trial.ms:8.3f} ms {trial.tflops:6.0f} TFLOP/s error {trial.error:.1e}", end="  ")
        print(trial.kernel, trial.config)
    major, minor = torch.cuda.get_device_capability(device())
    for kernel, trial in best.items():
        print(f'best: ("{kernel}", {problem.head_dim}, {10 * major + minor}): {trial.config}')


if __name__ == "__main__":
    main()
