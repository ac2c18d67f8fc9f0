"""What is measured side by side on a row: ours here, the peers in ``peers``.

An arm makes a ``Call`` from a row's inputs in the order of tokens it wants; whatever is done once
for many steps (lists, masks, compilation) is done there and not timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.problem import Problem
from benchmarks.kernels.rows import HEAD_DIM, Row
from megagen.kernels.vsa import (
    BlockIndex,
    block_mean,
    block_sparse_attention,
    coarse_attention,
    dispatch,
    tile,
    untile,
    vsa_attention,
)

KINDS = ("sparse", "all", "dense", "layer")
"""The fine stage on the row's lists; on lists of all blocks; dense on real tokens; all of
``vsa_attention`` from and to raster order."""


@dataclass(frozen=True)
class Call:
    """One arm on one row.

    Args:
        run: the forward; its result is in the arm's order.
        leaves: what gradients are taken of, in the arm's order.
        names: their gradients' names.
        index: of a layer, the lists it chose.
        fine: of a layer of ours, its fine stage alone on these lists.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    names: tuple[str, ...] = ("dq", "dk", "dv")
    index: BlockIndex | None = None
    fine: Call | None = None


@dataclass(frozen=True)
class Arm:
    """One implementation.

    Args:
        name: in the table.
        kind: of ``KINDS``.
        order: of ``problem.ORDERS``.
        build: makes the call.
        needs: modules without which it is ``not installed``.
        lacks: why a row cannot be served; None: it can.
        is_ours: of this package.
        no_backward: why there is none; None: there is one.
    """

    name: str
    kind: str
    order: str
    build: Callable[[Problem], Call]
    needs: tuple[str, ...] = ()
    lacks: Callable[[Row, torch.device], str | None] = field(default=lambda row, device: None)
    is_ours: bool = False
    no_backward: str | None = None

    def absence(self, row: Row, device: torch.device) -> str | None:
        """Why it cannot run here, in the words of the table; None: it can."""
        for module in self.needs:
            reason = why_not_there(module)
            if reason is not None:
                return reason
        reason = self.lacks(row, device)
        return None if reason is None else f"not measured: {reason}"


def why_not_there(module: str) -> str | None:
    """None where a module can be found, else the words of the table."""
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it is missing
        found = False
    except Exception as error:  # the parent is there and does not load
        return f"not measured: {module} cannot be imported ({first_line(error)})"
    return None if found else f"not installed: {module}"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    line = next(iter(str(error).strip().splitlines()), "")[:160]
    if re.match(r"\w+(Error|Exception): ", line):  # told by another process
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")


def sparse(
    problem: Problem,
    *,
    backend: str,
    deterministic: bool = True,
    is_all: bool = False,
    chosen: BlockIndex | None = None,
) -> Call:
    """``block_sparse_attention`` on the row's lists, on all blocks, or on chosen ones."""
    q, k, v = leaves = problem.leaves("slots")
    index = chosen or (problem.every if is_all else problem.index)
    sizes = problem.sizes_n

    def run() -> Tensor:
        out, _ = block_sparse_attention(
            q, k, v, index, sizes, sizes, backend=backend, deterministic=deterministic
        )
        return out

    return Call(run, leaves)


def layer(problem: Problem, *, backend: str, deterministic: bool = True) -> Call:
    """``vsa_attention``, tokens in raster order to tokens in raster order."""
    leaves = problem.leaves("bshd", has_gate=True)
    attend: Callable[..., Any] = partial(
        vsa_attention,
        layout=problem.row.layout,
        topk=problem.row.selected,
        backend=backend,
        deterministic=deterministic,
    )
    with torch.no_grad():
        _, aux = attend(*leaves, return_aux=True)

    def run() -> Tensor:
        out: Tensor = attend(*leaves)
        return out

    fine = sparse(problem, backend=backend, deterministic=deterministic, chosen=aux.index)
    return Call(run, leaves, ("dq", "dk", "dv", "dgate"), aux.index, fine)


def parts(problem: Problem, *, backend: str) -> dict[str, Callable[[], Any]]:
    """Forwards of what a layer is made of, by the public operations; the layer fuses some."""
    layout, sizes, topk = problem.row.layout, problem.sizes_n, problem.row.selected
    tokens = (problem.q, problem.k, problem.v)
    slots = tuple(x.detach() for x in problem.leaves("slots"))
    qm, km, vm = (block_mean(x, sizes, backend=backend) for x in slots)
    return {
        "tiling": lambda: [tile(x, layout) for x in tokens],
        "means": lambda: [block_mean(x, sizes, backend=backend) for x in slots],
        "coarse": lambda: coarse_attention(qm, km, vm, sizes, topk=topk, backend=backend),
        "untiling": lambda: untile(slots[0], layout),
    }


def sdpa(problem: Problem, *, backends: tuple[SDPBackend, ...] = ()) -> Call:
    """torch's dense attention on real tokens, by the given backends or by its own choice."""
    q, k, v = leaves = problem.leaves("bhsd")

    def run() -> Tensor:
        if not backends:
            return scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(list(backends)):
            return scaled_dot_product_attention(q, k, v)

    return Call(run, leaves)


def unserved(backend: str, device: torch.device) -> str | None:
    """Why a backend of ours does not serve a device."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    like = torch.empty(HEAD_DIM, dtype=dtype, device=device)
    try:
        dispatch.choose(backend, like)
    except ValueError as error:
        return str(error)
    return None


def ours(backend: str, row: Row) -> tuple[Arm, ...]:
    """The arms of one backend of this package."""

    def lacks(row: Row, device: torch.device) -> str | None:
        return unserved(backend, device)

    found = [
        Arm(
            backend, "sparse", "slots", partial(sparse, backend=backend), lacks=lacks, is_ours=True
        ),
    ]
    if backend == "cuda":
        build = partial(sparse, backend=backend, deterministic=False)
        found.append(Arm("cuda, fast", "sparse", "slots", build, lacks=lacks, is_ours=True))
    if row.also_all:
        build = partial(sparse, backend=backend, is_all=True)
        name = f"{backend}, all blocks"
        found.append(Arm(name, "all", "slots", build, lacks=lacks, is_ours=True))
    build = partial(layer, backend=backend)
    found.append(Arm(f"{backend}, whole layer", "layer", "bshd", build, lacks=lacks, is_ours=True))
    return tuple(found)
