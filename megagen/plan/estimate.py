"""Estimates of memory per rank and work per step of a role.

Memory = weights + gradients + optimizer states + EMA + activations, in bytes:

* weights 2 (bf16) or 4 (fp32) per parameter; parameters are cut by TP x PP; a base that roles
  share counts once, for its owner;
* gradients, moments, masters and EMA only of what is trained: with LoRA the adapters, which are cut
  by PP (TP cuts one matrix of each pair, which is not counted);
* gradients 4 (fp32 buffers) for a trained role;
* Adam moments 8, and 4 more for the fp32 master of a bf16 weight; divided by DP x CP under the
  distributed optimizer;
* EMA 4;
* activations: per token and layer ``18 D + 2 F`` numbers are kept without recomputation,
  ``12 D + F`` with selective (attention and MLP inside recomputed), ``D`` with full, where D is the
  hidden and F the FFN size; with sparse attention D more (its gate). TP divides the FFN and
  attention part, sequence parallelism the rest.
  A pipeline stage keeps as many micro-batches as there are stages after it, at most all of them;
* caches of rollouts: keys and values of every token and layer, 2 D numbers, divided by TP, PP and
  the all-to-all of CP, of the micro-batches whose rollouts wait for their backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megagen.models.base import ModelPlugin, Passes
from megagen.parallel.dims import ParallelDims

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one role on one rank, by use."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    caches: float

    @property
    def total(self) -> float:
        """Sum of all uses."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Load:
    """What is asked of a role.

    Args:
        dims: its layout.
        world_size: ranks of the run.
        latent_shape: [C, T, H, W] of one sample.
        micro_batch_size: samples per micro-batch.
        num_micro_batches: micro-batches per step and data rank.
        trainable: whether it has gradients and an optimizer.
        bf16: bf16 weights with fp32 masters, else fp32.
        recompute: none, selective or full.
        distributed_optimizer: states sharded over data ranks.
        ema: whether an EMA is kept.
        passes: of each sample in a step.
        adapters: parameters of LoRA, which alone are trained; None: the whole network is.
        borrows_base: the base weights are another role's.
        cached_micro_batches: whose keys and values are held at once.
    """

    dims: ParallelDims
    world_size: int
    latent_shape: Sequence[int]
    micro_batch_size: int
    num_micro_batches: int
    trainable: bool
    bf16: bool
    recompute: str
    distributed_optimizer: bool
    ema: bool
    passes: Passes
    adapters: int | None = None
    borrows_base: bool = False
    cached_micro_batches: float = 0.0


def memory(plugin: ModelPlugin, load: Load) -> Memory:
    """Estimated bytes on the fullest rank (the first pipeline stage)."""
    dims = load.dims
    parameters = plugin.num_parameters() / (dims.tp_size * dims.pp_size)
    element = 2 if load.bf16 else 4
    shards = dims.dp_size(load.world_size) * dims.cp_size if load.distributed_optimizer else 1
    states = (12 if load.bf16 else 8) / shards
    adapters = (load.adapters or 0) / dims.pp_size
    trained = adapters if load.adapters is not None else parameters
    if not load.trainable:
        trained = 0
    return Memory(
        weights=element * (adapters + (0 if load.borrows_base else parameters)),
        gradients=4 * trained,
        optimizer=states * trained,
        ema=4 * trained if load.ema else 0.0,
        activations=element * _activation_numbers(plugin, load),
        caches=element * _cached_numbers(plugin, load),
    )


def _cached_numbers(plugin: ModelPlugin, load: Load) -> float:
    dims = load.dims
    tokens = load.micro_batch_size * plugin.num_tokens(load.latent_shape)
    parts = dims.tp_size * dims.pp_size * (dims.cp_size if dims.cp_comm_type == "a2a" else 1)
    numbers = 2 * tokens * plugin.hidden_size * plugin.num_layers / parts
    return numbers * load.cached_micro_batches


def _activation_numbers(plugin: ModelPlugin, load: Load) -> float:
    dims = load.dims
    tokens = load.micro_batch_size * plugin.num_tokens(load.latent_shape) / dims.cp_size
    hidden, ffn = plugin.hidden_size, plugin.ffn_size
    outside = dims.tp_size if dims.sequence_parallel else 1
    gate = hidden / dims.tp_size if plugin.vsa is not None else 0.0
    layers = plugin.num_layers / dims.pp_size
    one_layer = 10 * hidden / outside + (8 * hidden + 2 * ffn) / dims.tp_size + gate
    kept = {
        "none": one_layer,
        "selective": 8 * hidden / outside + (4 * hidden + ffn) / dims.tp_size + gate,
        "full": hidden / outside,
    }[load.recompute]
    if not load.trainable:
        return tokens * one_layer
    in_flight = min(dims.pp_size, load.num_micro_batches)
    return tokens * (kept * layers * in_flight + (one_layer if load.recompute == "full" else 0))


def step_flops(plugin: ModelPlugin, load: Load, text_len: int) -> float:
    """FLOPs of one step of a role over the whole run."""
    samples = load.micro_batch_size * load.num_micro_batches * load.dims.dp_size(load.world_size)
    passes = load.passes.in_forwards(is_adapted=load.adapters is not None)
    return passes * samples * plugin.flops(load.latent_shape, text_len)
