"""Adapters of one linear against their formula in fp64, and which linears get one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.core.errors import ConfigError
from megagen.layers.linear import ReplicatedLinear, column_linear, row_linear
from megagen.layers.lora import LowRankAdapter, add_adapter
from megagen.models.adapters import AdapterSpec, adapted_modules, num_parameters
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine.cases import make_plugin

RANK, SCALE, HEAD, TOKENS = 3, 0.75, 2, 8
IN, PARTS = 12, 3
"""The fused linear: three projections of 12, interleaved head by head."""
KINDS = ("fused", "row", "replicated", "replicated_input")


def interleave(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.unflatten(0, (-1, HEAD)) for p in parts], dim=1).flatten(0, 2)


def expected(kind: str, given: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients in fp64, by the formula, of the whole linear."""
    x = given["x"].double().requires_grad_()
    pairs = [[m.double().requires_grad_() for m in pair] for pair in given["pairs"]]
    blocks = [
        SCALE * pairs[given["wanted"].index(i)][1] @ pairs[given["wanted"].index(i)][0]
        if i in given["wanted"]
        else torch.zeros(given["out"][i], IN, dtype=torch.float64)
        for i in range(len(given["out"]))
    ]
    delta = interleave(blocks) if len(blocks) > 1 else blocks[0]
    y = x @ (given["weight"].double() + delta).T
    (y * given["probe"].double()).sum().backward()
    grads = {
        f"{letter}{i}": m.grad
        for i, pair in enumerate(pairs)
        for letter, m in zip("AB", pair, strict=True)
    }
    return {"y": y.detach(), "x": x.grad, "delta": delta.detach(), **grads}


def make_inputs(kind: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fused = kind in ("fused", "replicated_input")
    out = [IN] * PARTS if fused else [10]
    wanted = [0, 2] if fused else [0]
    return {
        "out": out,
        "wanted": wanted,
        "x": normal(TOKENS, 2, IN),
        "weight": normal(sum(out), IN),
        "pairs": [[normal(RANK, IN), normal(out[i], RANK)] for i in wanted],
        "probe": normal(TOKENS, 2, sum(out)),
    }


def part(x: Tensor, dim: int, mesh: Mesh, cut: bool = True) -> Tensor:
    return x.chunk(mesh.dims.tp_size, dim)[mesh.tp_rank] if cut else x


def run(kind: str, dims: ParallelDims, given: dict[str, Any]) -> dict[str, Tensor]:
    """In a rank: the same of a linear with adapters, made whole over TP."""
    mesh = Mesh.build(dims)
    config = make_plugin().transformer_config(dims)
    tp, tp_size = mesh.pg.tp, dims.tp_size
    is_sp = dims.sequence_parallel
    cut: Any = {"row": "inputs", "replicated": "none"}.get(kind, "outputs")
    linear: Any
    if kind == "row":
        linear = row_linear(config, tp, IN, sum(given["out"]))
    elif kind == "replicated":
        linear = ReplicatedLinear(IN, sum(given["out"]), dtype=torch.float32)
    else:
        linear = column_linear(
            config, tp, IN, sum(given["out"]), replicated_input=kind == "replicated_input"
        )
    rows, columns = cut == "outputs", cut == "inputs"
    adapter = LowRankAdapter(
        linear.weight,
        [n // tp_size if rows else n for n in given["out"]],
        given["wanted"],
        rank=RANK,
        scale=SCALE,
        cut=cut,
        tp_group=tp,
        sequence_parallel=is_sp if kind == "replicated" else linear.sequence_parallel,
        assemble=interleave if len(given["out"]) > 1 else lambda shards: shards[0],
    )
    add_adapter(linear, adapter)
    with torch.no_grad():
        linear.weight.copy_(part(part(given["weight"], 0, mesh, rows), 1, mesh, columns))
        linear.bias.zero_()
        for i, (a, b) in zip(given["wanted"], given["pairs"], strict=True):
            adapter.get_parameter(f"A{i}").copy_(part(a, 1, mesh, columns))
            adapter.get_parameter(f"B{i}").copy_(part(b, 0, mesh, rows))
    linear.weight.requires_grad_(False)
    sharded_in = is_sp and kind in ("fused", "replicated")
    sharded_out = is_sp and kind in ("row", "replicated")
    x = part(part(given["x"], 0, mesh, sharded_in), 2, mesh, columns).clone().requires_grad_()
    y = linear(x)
    (y * part(part(given["probe"], 0, mesh, sharded_out), 2, mesh, rows)).sum().backward()
    found = {
        "y": gathered(gathered(y, 0, sharded_out, tp), 2, rows, tp),
        "x": gathered(gathered(x.grad, 0, sharded_in, tp), 2, columns, tp),
        "delta": gathered(gathered(adapter.delta_weight(), 0, rows, tp), 1, columns, tp),
    }
    for number, i in enumerate(given["wanted"]):
        for letter, dim in (("A", 1), ("B", 0)):
            found[f"{letter}{number}"] = whole_gradient(
                adapter.get_parameter(f"{letter}{i}"), dim, tp
            )
    return found


def whole_gradient(parameter: Any, dim: int, group: Any) -> Tensor:
    """As DDP, ``finalize_model_grads`` and a gather make it."""
    gradient = parameter.grad.clone()
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient, group=group)
    return gathered(gradient, dim, getattr(parameter, "tensor_model_parallel", False), group)


def gathered(x: Tensor, dim: int, wanted: bool, group: Any) -> Tensor:
    if not wanted or group.size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_their_formula(kind: str) -> None:
    given = make_inputs(kind, seeds.fresh())
    wanted = expected(kind, given)
    layouts = [ParallelDims(), ParallelDims(tp_size=2)]
    layouts.append(ParallelDims(tp_size=2, sequence_parallel=True))
    for dims in layouts:
        for found in run_ranks(dims.tp_size, run, kind, dims, given):
            for name, value in wanted.items():
                error = (found[name] - value).norm() / value.norm()
                assert error < 1e-6, f"{name} under {dims}"


def test_a_linear_of_another_kind_gets_one_too() -> None:
    """All that is asked of a linear: a weight, and an output alone."""

    class Other(nn.Linear):
        pass

    linear = Other(4, 6)
    adapter = LowRankAdapter(
        linear.weight.bfloat16(),
        [6],
        [0],
        rank=2,
        scale=2.0,
        cut="none",
        tp_group=None,  # type: ignore[arg-type]
        sequence_parallel=False,
        assemble=lambda shards: shards[0],
    )
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    adapter.float()
    with torch.no_grad():
        adapter.get_parameter("A0").fill_(1.0)
        adapter.get_parameter("B0").fill_(0.5)
    x = torch.ones(3, 1, 4)
    before = linear(x)
    add_adapter(linear, adapter)
    # each output: 2.0 x two products of 0.5 and four ones
    assert torch.allclose(linear(x) - before, torch.full((3, 1, 6), 8.0))


# -- which linears ------------------------------------------------------------------------------
def names(*targets: str, exclude: tuple[str, ...] = ("embedder",)) -> list[str]:
    spec = AdapterSpec(2, 2.0, targets or None, exclude)
    return [
        n
        for n in adapted_modules(make_plugin(), spec, "models.x.lora")
        if "s.1." in n or "b" not in n
    ]


def test_targets() -> None:
    block = [
        f"blocks.1.{a}.{n}"
        for a in ("attn1", "attn2")
        for n in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert names() == block
    assert names("attn2.to_k", "net.2") == ["blocks.1.attn2.to_k", "blocks.1.ffn.net.2"]
    assert names("blocks.1.attn1", exclude=("to_out", "to_q")) == block[1:3]
    assert names("proj_out", exclude=()) == ["proj_out"]
    spec = AdapterSpec(5, 5.0, ("ffn",))
    assert num_parameters(make_plugin(), spec) == 4 * 2 * 5 * (32 + 24)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ("to_kk",),
            r"target_modules: 'to_kk' names no linear of the network; did you mean 'to_k'",
        ),
        (("to_q", "attn3.to_q"), r"'attn3.to_q' names no linear .* did you mean 'attn"),
        (("time_embedder",), r"names only modules that exclude_modules \['embedder'\] takes out"),
        (("norm_q",), "names no linear"),
        (("patch_embedding",), "names no linear"),
    ],
)
def test_targets_that_name_nothing(targets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        names(*targets)
