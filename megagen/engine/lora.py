"""Adapters on a role's chunks, and chunks of several roles on one set of base weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from megagen.checkpoint.fill import fill_parameters
from megagen.core.errors import ConfigError
from megagen.layers.lora import Cut, LowRankAdapter, add_adapter
from megagen.models.adapters import AdapterSpec, adapted_modules, adapter_source, is_adapter
from megagen.models.base import ModelPlugin, WeightSource, WeightStore


def attach(
    plugin: ModelPlugin, chunk: nn.Module, spec: AdapterSpec, tp_group: ProcessGroup
) -> None:
    """Put adapters beside the chunk's linears that ``spec`` names; uninitialised.

    Raises:
        ConfigError: a target names nothing.
    """
    wanted = set(adapted_modules(plugin, spec))
    for name, source in plugin.weights(chunk).items():
        path, _, leaf = name.rpartition(".")
        modules = [tensor.removesuffix(".weight") for tensor in source.names]
        numbers = [i for i, module in enumerate(modules) if module in wanted]
        if leaf == "weight" and numbers:
            linear = chunk.get_submodule(path)
            add_adapter(linear, _adapter(linear, source, numbers, spec, tp_group))


def _adapter(
    linear: nn.Module,
    source: WeightSource,
    numbers: Sequence[int],
    spec: AdapterSpec,
    tp_group: ProcessGroup,
) -> LowRankAdapter:
    weight: Any = linear.weight
    cuts: dict[int | None, Cut] = {None: "none", 0: "outputs", 1: "inputs"}
    parts = tp_group.size() if source.tp_dim == 0 else 1
    if source.tp_dim is None:
        is_sharded = getattr(weight, "sequence_parallel", False)
    else:  # megatron-core's and Transformer Engine's linears know it
        is_sharded = getattr(linear, "sequence_parallel", False)
    return LowRankAdapter(
        weight,
        [shape[0] // parts for shape in source.shapes],
        numbers,
        rank=spec.rank,
        scale=spec.scale,
        cut=cuts[source.tp_dim],
        tp_group=tp_group,
        sequence_parallel=is_sharded,
        assemble=source.assemble,
    )


def sources(plugin: ModelPlugin, chunk: nn.Module, rank: int) -> dict[str, WeightSource]:
    """For each adapter parameter of ``chunk``: its source in diffusers' names."""
    names = [name for name, _ in chunk.named_parameters() if is_adapter(name)]
    return {name: adapter_source(plugin, name, rank) for name in names}


def fill_adapters(
    plugin: ModelPlugin,
    chunks: Sequence[nn.Module],
    tp_group: ProcessGroup,
    spec: AdapterSpec,
    store: WeightStore,
) -> None:
    """Read the chunks' adapters; each rank takes its shards."""
    for chunk in chunks:
        fill_parameters(chunk, sources(plugin, chunk, spec.rank), tp_group, store)


def freeze_base(chunks: Sequence[nn.Module]) -> None:
    """Of the parameters only adapters ask for gradients."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_adapter(name))


def own_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters' part of a chunk's state."""
    return {name: value for name, value in state.items() if is_adapter(name)}


# -- one base for several roles -----------------------------------------------------------------
class _OnMeta(TorchFunctionMode):
    """``torch.empty`` allocates nothing, whatever device it is asked for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def unallocated() -> Iterator[None]:
    """Modules built inside have parameters without memory, to be lent by ``share``."""
    with _OnMeta():
        yield


def share(chunk: nn.Module, base: nn.Module, role: str) -> None:
    """Let ``chunk`` use the base parameters of ``base``: the same objects, so one copy in memory.

    Raises:
        ConfigError: the two networks have other parameters.
    """
    lent = {name: p for name, p in base.named_parameters() if not is_adapter(name)}
    own = {name: p for name, p in chunk.named_parameters() if not is_adapter(name)}
    for name in sorted(lent.keys() | own.keys()):
        found, wanted = (_kind(parameters.get(name)) for parameters in (lent, own))
        if found != wanted:
            raise ConfigError(
                f"the base that is shared has {name!r} as {found}, this network needs {wanted}.",
                remedy="Share a base among roles of the same architecture, layout and precision.",
                where=f"models.{role}.lora.share_base",
            )
    for name in own:
        path, _, leaf = name.rpartition(".")
        setattr(chunk.get_submodule(path), leaf, lent[name])


def _kind(parameter: nn.Parameter | None) -> str:
    if parameter is None:
        return "nothing"
    return f"{list(parameter.shape)} {str(parameter.dtype).removeprefix('torch.')}"
