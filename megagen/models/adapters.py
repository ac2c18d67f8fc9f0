"""Low-rank adapters (LoRA, arXiv 2106.09685) in diffusers' names: which modules, which tensors.

A module ``m`` with weight ``W`` becomes ``W x + (alpha / rank) B A x`` with ``m.lora_A.weight``
``[rank, in]`` and ``m.lora_B.weight`` ``[out, rank]``. In a chunk these are parameters
``<linear>.lora.A<i>`` and ``.B<i>`` beside the linear's weight, ``i`` counting the diffusers
modules that the linear is made of (``to_q``, ``to_k``, ``to_v`` make ``linear_qkv``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megagen.core.errors import ConfigError, suggest
from megagen.models.base import ModelPlugin, WeightSource

PEER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_k", "to_v", "to_out")
DEFAULT_TARGETS = (*PEER_TARGETS, "to_qkv", "to_gate_compress")
"""FastVideo's list: each names what it finds in a network, if anything."""
DEFAULT_EXCLUDED = ("embedder",)
_PARAMETER = re.compile(r"(.+)\.lora\.([AB])(\d+)")


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of one network.

    Args:
        rank: of A and B, >= 1.
        alpha: numerator of the scale, > 0.
        target_modules: parts of diffusers module names; None: attention's projections.
        exclude_modules: likewise; a module that both match has no adapter.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = DEFAULT_EXCLUDED

    @staticmethod
    def of(options: Any) -> AdapterSpec | None:
        """From a ``lora`` section of a config (or None); None where it asks for no adapter."""
        if options is None or options.rank is None:
            return None
        alpha = options.rank if options.alpha is None else options.alpha
        return AdapterSpec(options.rank, alpha, options.target_modules, options.exclude_modules)

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


def linear_modules(plugin: ModelPlugin) -> dict[str, tuple[int, ...]]:
    """Every diffusers module that is a linear, with its weight's shape ``(out, in)``."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in plugin.tensor_shapes().items():
        if name.endswith(".weight") and len(shape) == 2:
            found[name.removesuffix(".weight")] = shape
    return found


def adapted_modules(plugin: ModelPlugin, spec: AdapterSpec, where: str = "lora") -> tuple[str, ...]:
    """The diffusers modules that get an adapter, in diffusers' order.

    Raises:
        ConfigError: a target names no linear of the network, or only excluded ones.
    """
    linears = linear_modules(plugin)
    for target in spec.target_modules or ():
        named = [module for module in linears if target in module]
        if not named:
            leaves = {re.sub(r"^blocks\.\d+\.", "", module) for module in linears}
            parts = {part for leaf in leaves for part in leaf.split(".") if not part.isdigit()}
            raise ConfigError(
                f"{target!r} names no linear of the network;",
                remedy=suggest(target, leaves | parts),
                where=f"{where}.target_modules",
            )
        if all(_matches(module, spec.exclude_modules) for module in named):
            raise ConfigError(
                f"{target!r} names only modules that exclude_modules "
                f"{list(spec.exclude_modules)} takes out.",
                remedy="Drop it, or change exclude_modules.",
                where=f"{where}.target_modules",
            )
    targets = DEFAULT_TARGETS if spec.target_modules is None else spec.target_modules
    found = tuple(
        module
        for module in linears
        if _matches(module, targets) and not _matches(module, spec.exclude_modules)
    )
    if not found:
        raise ConfigError(
            "no module is left for an adapter.",
            remedy=f"Name parts of module names: {', '.join(list(linears)[-6:])}...",
            where=f"{where}.target_modules",
        )
    return found


def _matches(module: str, parts: Sequence[str]) -> bool:
    return any(part in module for part in parts)


def adapter_shapes(
    plugin: ModelPlugin, modules: Sequence[str], rank: int
) -> dict[str, tuple[int, int]]:
    """The tensors of adapters on ``modules`` with their shapes."""
    linears, shapes = linear_modules(plugin), {}
    for module in modules:
        out_features, in_features = linears[module]
        shapes[f"{module}.lora_A.weight"] = (rank, in_features)
        shapes[f"{module}.lora_B.weight"] = (out_features, rank)
    return shapes


def num_parameters(plugin: ModelPlugin, spec: AdapterSpec) -> int:
    """Parameters of all adapters."""
    shapes = adapter_shapes(plugin, adapted_modules(plugin, spec), spec.rank)
    return sum(rows * columns for rows, columns in shapes.values())


def is_adapter(name: str) -> bool:
    """Whether a chunk's parameter of that name belongs to an adapter."""
    return _PARAMETER.fullmatch(name) is not None


def adapter_source(plugin: Any, name: str, rank: int) -> WeightSource:
    """Where an adapter's parameter comes from, from where its linear's weight does."""
    found = _PARAMETER.fullmatch(name)
    assert found is not None, f"{name} is no adapter's parameter"
    linear = plugin.weight_source(f"{found[1]}.weight")
    module = linear.names[int(found[3])].removesuffix(".weight")
    out_features, in_features = linear.shapes[int(found[3])]
    is_a = found[2] == "A"
    return WeightSource(
        names=(f"{module}.lora_{found[2]}.weight",),
        shapes=((rank, in_features) if is_a else (out_features, rank),),
        # what cuts the weight's outputs cuts B's, what cuts its inputs cuts A's
        tp_dim=linear.tp_dim if linear.tp_dim == (1 if is_a else 0) else None,
        assemble=lambda shards: shards[0],
        split=lambda full: [full],
    )
