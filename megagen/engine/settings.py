"""What a role is built from; the run config is turned into these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagen.models.adapters import AdapterSpec
from megagen.parallel.dims import ParallelDims

LRScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "piecewise_constant",
]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule (see ``lr.py`` for the formulas).

    Args:
        learning_rate: peak rate.
        betas: decay of the moments.
        eps: Adam's epsilon.
        weight_decay: decoupled; none on norms, biases and modulation tables.
        max_grad_norm: clip by the global norm; 0: no clipping.
        lr_scheduler: shape of the schedule.
        lr_warmup_steps: updates of linear warm-up.
        lr_num_cycles: restarts of ``cosine_with_restarts``.
        lr_power: power of ``polynomial``.
        lr_end: end rate of ``polynomial``.
        min_lr_ratio: floor of ``cosine_with_min_lr``.
        lr_step_rules: rules of ``piecewise_constant``.
        total_steps: updates over which the schedule runs down.
        use_distributed_optimizer: shard moments and fp32 masters over dp x cp.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler: LRScheduler = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: float = 1.0
    lr_power: float = 1.0
    lr_end: float = 1e-7
    min_lr_ratio: float = 0.5
    lr_step_rules: str = ""
    total_steps: int = 1
    use_distributed_optimizer: bool = True


@dataclass(frozen=True)
class EMASettings:
    """Moving average of the weights.

    Args:
        decay: share of the old average kept at each update.
        start_step: the average is the weights themselves up to this many updates.
    """

    decay: float
    start_step: int = 0


@dataclass(frozen=True)
class RoleSettings:
    """One network under one layout.

    Args:
        name: of the role; prefix of its tensors in checkpoints.
        dims: its layout over all ranks of the run.
        trainable: whether it has gradients and an optimizer.
        precision: of parameters and activations; bf16 keeps fp32 masters in the optimizer.
        recompute: activation recomputation in the backward pass.
        transformer_impl: megatron-core's local linears and norms, or Transformer Engine's.
        attention_backend: what computes dense attention.
        fp8: Transformer Engine's linears in fp8.
        score_schedule: how ``forward_score_backward`` goes: ``hold`` keeps every micro-batch's
            graph, ``replay`` repeats the forward.
        overlap_grad_reduce: reduce gradient buckets during the backward pass.
        overlap_param_gather: gather updated parameters during the next forward pass.
        grad_reduce_in_fp32: accumulate and reduce gradients in fp32.
        optimizer: None where the role is frozen.
        ema: None: no average.
        lora: adapters, which are all that is trained, averaged and saved; None: the whole network.
    """

    name: str
    dims: ParallelDims
    trainable: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    attention_backend: str = "sdpa"
    fp8: bool = False
    score_schedule: Literal["replay", "hold"] = "replay"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_fp32: bool = True
    optimizer: OptimizerSettings | None = None
    ema: EMASettings | None = None
    lora: AdapterSpec | None = None
