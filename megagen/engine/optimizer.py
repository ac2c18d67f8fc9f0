"""The optimizer of one role: megatron-core's, with our schedule, clip and guard.

megatron-core's own step clips by a norm that it does not check; here a non-finite norm skips the
update on every rank with nothing touched. Learning rate and weight decay are written to every
param group before each update, so the groups' overrides hold without an
``OptimizerParamScheduler`` (whose constructor is what else would write them).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.core import process
from megagen.engine.lr import learning_rate
from megagen.engine.settings import OptimizerSettings
from megagen.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepInfo:
    """What one update did.

    Args:
        grad_norm: global norm of the gradient before clipping.
        learning_rate: rate of this update.
        skipped: nothing was changed, because a loss or the norm was not finite.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool


@dataclass(frozen=True)
class Master:
    """The fp32 values of a part of one parameter that this rank updates.

    Args:
        parameter: of the model.
        start: first element of the part in the flat parameter.
        values: flat fp32 view, changed by the optimizer in place.
    """

    parameter: nn.Parameter
    start: int
    values: Tensor


def has_weight_decay(parameter: Tensor, name: str) -> bool:
    """False for biases, norms and modulation tables."""
    is_vector = parameter.ndim <= 1 or name.endswith(".bias")
    return not is_vector and "table" not in name and "norm" not in name.rpartition(".")[0]


class Optimizer:
    """AdamW over the trainable parameters of a role's chunks.

    Args:
        chunks: wrapped in megatron-core's DDP.
        settings: hyperparameters and schedule.
        mesh: the role's layout.
        is_bf16: whether parameters are bf16 with fp32 masters.
        overlap_param_gather: as in the chunks' DDP.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        settings: OptimizerSettings,
        mesh: Mesh,
        *,
        is_bf16: bool,
        overlap_param_gather: bool,
    ) -> None:
        self.settings, self.num_updates = settings, 0
        self._is_distributed = settings.use_distributed_optimizer
        self.megatron = _megatron_optimizer(chunks, settings, mesh, is_bf16, overlap_param_gather)

    def zero_grad(self) -> None:
        """Forget the gradients of the masters."""
        self.megatron.zero_grad()

    @property
    def learning_rate(self) -> float:
        """Rate of the next update."""
        return learning_rate(self.settings, self.num_updates)

    @torch.no_grad()
    def step(self, is_finite: bool) -> StepInfo:
        """Clip and update with reduced gradients. Collective over all ranks.

        Args:
            is_finite: whether the losses that this rank saw were.
        """
        rate = self.learning_rate
        self.megatron.prepare_grads()
        norm = self.megatron.get_grad_norm()
        if not _everywhere(is_finite and math.isfinite(norm)):
            return StepInfo(norm, rate, skipped=True)
        self._clip(norm)
        for group in self._groups():
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.settings.weight_decay * group.get("wd_mult", 1.0)
        self.megatron.step_with_ready_grads()
        self.num_updates += 1
        return StepInfo(norm, rate, skipped=False)

    def _clip(self, norm: float) -> None:
        limit = self.settings.max_grad_norm
        if limit <= 0 or norm <= limit:
            return
        grads = [p.grad for p in self.megatron.get_parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))

    def _parts(self) -> Iterator[Any]:
        """megatron-core's optimizers inside its chain that have parameters on this rank."""
        for part in self.megatron.chained_optimizers:
            if not getattr(part, "is_stub_optimizer", False) and part.optimizer is not None:
                yield part

    def _groups(self) -> Iterator[dict[str, Any]]:
        for part in self._parts():
            yield from part.optimizer.param_groups

    def masters(self) -> Iterator[Master]:
        """Every element that this rank updates, once over dp x cp where that is sharded."""
        for part in self._parts():
            if self._is_distributed:
                yield from _sharded_masters(part)
            elif hasattr(part, "fp32_from_float16_groups"):
                groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
                for models, mains in groups:
                    for model, main in zip(models, mains, strict=True):
                        yield Master(model, 0, main.detach().view(-1))
                for group in part.fp32_from_fp32_groups:
                    yield from (Master(p, 0, p.detach().view(-1)) for p in group)
            else:
                yield from (Master(p, 0, p.detach().view(-1)) for p in part.get_parameters())

    def reload_weights(self) -> None:
        """Take the model's parameters as the masters, after they were set from outside."""
        self.megatron.reload_model_params()

    def sharded_state(
        self, model: dict[str, Any], metadata: dict[str, Any], is_loading: bool
    ) -> dict[str, Any]:
        """Moments and masters as megatron-core's sharded tensors, keyed by the model's."""
        with torch.no_grad():
            if self.num_updates == 0 and not is_loading:
                # Adam makes its moments in the first update; a role may be saved before that
                for part in self._parts():
                    part.init_state_fn(part.optimizer, part.config)
            with contextlib.ExitStack() as stack:
                for part in self._parts():
                    stack.enter_context(_all_parameters_named(part))
                options = {"is_loading": is_loading, "metadata": metadata}
                return _masters_keyed(self.megatron.sharded_state_dict(model, **options))

    def load_state(self, state: dict[str, Any]) -> None:
        """What ``sharded_state`` gave, filled."""
        with torch.no_grad():
            self.megatron.load_state_dict(_masters_listed(state))


def _megatron_optimizer(
    chunks: Sequence[nn.Module],
    settings: OptimizerSettings,
    mesh: Mesh,
    is_bf16: bool,
    overlap_param_gather: bool,
) -> Any:
    from megatron.core.optimizer import (
        OptimizerConfig,
        ParamKey,
        ParamWithNamePredicate,
        get_megatron_optimizer,
    )

    no_decay = ParamWithNamePredicate(
        name="no_decay", fn=lambda parameter, name: not has_weight_decay(parameter, name)
    )
    # the distributed optimizer mistakes one parameter's state for another's where a group has
    # fp32 and bf16 ones: a group of their own for the fp32 ones of a bf16 network
    wide = ParamWithNamePredicate(
        name="wide", fn=lambda parameter, name: is_bf16 and parameter.dtype == torch.float32
    )
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=0.0,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=overlap_param_gather,
    )
    return get_megatron_optimizer(
        config,
        list(chunks),
        config_overrides={
            ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0},
            # a label alone: of what tells groups apart in checkpoints, it does nothing else
            ParamKey(with_name_predicate=wide): {"is_decoupled_lr": True},
        },
        use_gloo_process_groups=False,
        pg_collection=mesh.pg,
    )


@contextlib.contextmanager
def _all_parameters_named(part: Any) -> Iterator[None]:
    """Inside, the unsharded bf16 optimizer numbers its fp32 parameters too.

    It numbers states by the bf16 parameters alone, and so takes those of one for another's. Each
    group is of one dtype, so its parameters stand in one of the two lists.
    """
    if not hasattr(part, "fp32_from_float16_groups"):
        yield
        return
    own = part.float16_groups
    part.float16_groups = [
        narrow or wide for narrow, wide in zip(own, part.fp32_from_fp32_groups, strict=True)
    ]
    try:
        yield
    finally:
        part.float16_groups = own


_MASTERS = "fp32_from_fp16_params"


def _masters_keyed(state: dict[str, Any]) -> dict[str, Any]:
    """An unsharded bf16 optimizer's masters by group and place, in place of lists of lists.

    A list that is empty, for a group of fp32 parameters, would be merged with one that is not when
    the state is read.
    """
    if _MASTERS not in state:
        return {k: _masters_keyed(v) if isinstance(v, dict) else v for k, v in state.items()}
    groups = {i: dict(enumerate(group)) for i, group in enumerate(state[_MASTERS]) if group}
    return {**state, _MASTERS: groups}


def _masters_listed(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_masters_keyed``."""
    if _MASTERS not in state:
        return {k: _masters_listed(v) if isinstance(v, dict) else v for k, v in state.items()}
    groups = [
        list(state[_MASTERS].get(i, {}).values())
        for i in range(len(state["optimizer"]["param_groups"]))
    ]
    return {**state, _MASTERS: groups}


def _sharded_masters(part: Any) -> Iterator[Master]:
    """The shards of megatron-core's ``DistributedOptimizer`` on this rank."""
    pairs = (
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    )
    for model_groups, shard_groups in pairs:
        for models, shards in zip(model_groups, shard_groups, strict=True):
            for model, shard in zip(models, shards, strict=True):
                start = part._get_model_param_range_map(model)["param"].start
                yield Master(model, start, shard.detach().view(-1))


def _everywhere(value: bool) -> bool:
    """Whether ``value`` holds on every rank of the run."""
    flag = torch.tensor([float(value)], device=process.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
