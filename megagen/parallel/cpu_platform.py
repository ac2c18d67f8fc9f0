"""Adapts megatron-core to a machine without CUDA (torch on CPU, gloo), for tests and small runs.

Where CUDA exists, ``enable`` changes nothing: GPU runs execute megatron-core as published.
Elsewhere these things in megatron-core's own namespace are replaced; torch itself stays as it is,
but for the duration of the calls in ``PRETEND``:

1. the name ``torch`` in ``MODULES``: a stand-in whose ``cuda`` works on the CPU and whose factories
   read ``device="cuda"`` as the CPU;
2. the setter of the CUDA generator's state: a CPU rank's generator is the default CPU one;
3. the functions in ``PRETEND`` run while tensors report CUDA types and ``.cuda()`` does nothing;
4. the checkpoint writer's results queue is forked: a spawned one re-imports ``__main__``;
5. one warning about CPU generator states is filtered.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import types
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from megagen.core import process

TESTED_VERSIONS = ("0.16.1",)
MODULES = (
    *("tensor_parallel.random", "tensor_parallel.layers", "tensor_parallel.mappings"),
    *("tensor_parallel.utils", "utils", "timers"),
    *("pipeline_parallel.p2p_communication", "pipeline_parallel.schedules"),
    *("distributed.distributed_data_parallel", "distributed.param_and_grad_buffer"),
    *("optimizer.optimizer", "optimizer.clip_grads", "optimizer.distrib_optimizer"),
    *("optimizer.grad_scaler", "dist_checkpointing.exchange_utils"),
    *(
        "dist_checkpointing.strategies.async_utils",
        "dist_checkpointing.strategies.filesystem_async",
    ),
    *("dist_checkpointing.strategies.fully_parallel",),
    *("dist_checkpointing.strategies.state_dict_saver",),
)
PRETEND = (
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("dist_checkpointing.strategies.fully_parallel", "exchange_by_distribution"),
)
CPU = torch.device("cpu")


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


class _Cuda(types.ModuleType):
    """``torch.cuda`` of a CPU rank; a name that is not here fails as torch's own does."""

    Stream = _Stream
    current_device = staticmethod(lambda: CPU)
    synchronize = staticmethod(lambda device=None: None)
    empty_cache = staticmethod(lambda: None)
    stream = staticmethod(lambda stream: stream)
    current_stream = staticmethod(lambda device=None: _Stream())
    default_stream = staticmethod(lambda device=None: _Stream())
    manual_seed = staticmethod(lambda seed: torch.default_generator.manual_seed(seed))
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())

    def __getattr__(self, name: str) -> Any:
        return self if name == "random" else getattr(torch.cuda, name)


class TorchStandIn(types.ModuleType):
    """The name ``torch`` in megatron-core's modules on a CPU rank."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda("torch.cuda")
        for factory in (torch.empty, torch.zeros, torch.tensor, torch.empty_like):
            setattr(self, factory.__name__, _on_cpu(factory))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _pretending(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensor_class: Any = torch.Tensor
        real_type, real_cuda = tensor_class.type, tensor_class.cuda

        def cuda_type(tensor: torch.Tensor, *type_args: Any, **type_kwargs: Any) -> Any:
            answer = real_type(tensor, *type_args, **type_kwargs)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

        tensor_class.type, tensor_class.cuda = cuda_type, lambda tensor, *a, **k: tensor
        try:
            return function(*args, **kwargs)
        finally:
            tensor_class.type, tensor_class.cuda = real_type, real_cuda

    return call


def _set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _results_queue() -> Any:
    name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    writer: Any = importlib.import_module(name)
    if writer._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(process.die_with_parent)  # else a killed rank leaves it behind
        writer._results_queue = manager.Queue()
    return writer._results_queue


def replace(module: str, path: str, make: Callable[[Any], Any]) -> None:
    """Set ``megatron.core.<module>.<path>`` to ``make(what it is now)``; a vanished name raises."""
    owner = importlib.import_module(f"megatron.core.{module}")
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))


def enable() -> bool:
    """Adapt megatron-core if CUDA is absent; may be called again.

    Returns:
        Whether the adaptation is active.

    Raises:
        RuntimeError: megatron-core is of a version that this was not tested with.
    """
    if torch.cuda.is_available():
        return False
    import megatron.core

    version = megatron.core.__version__.split("+")[0]
    if version not in TESTED_VERSIONS:
        raise RuntimeError(f"megatron-core {version} on a CPU: tested with {TESTED_VERSIONS} only")
    if isinstance(importlib.import_module("megatron.core.utils").torch, TorchStandIn):
        return True
    stand_in = TorchStandIn()
    for module in MODULES:
        replace(module, "torch", lambda _: stand_in)
    for module, path in PRETEND:
        replace(module, path, _pretending)
    replace("tensor_parallel.random", "_set_cuda_rng_state", lambda _: _set_rng_state)
    writer = "dist_checkpointing.strategies.filesystem_async"
    replace(writer, "_get_write_results_queue", lambda _: _results_queue)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    return True
