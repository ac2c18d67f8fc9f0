"""Estimates of memory per rank and work per step of a role.

Memory in bytes; a number of an activation or a cache has 2 (bf16) or 4 (fp32):

* weights 2 (bf16) or 4 (fp32) per parameter; parameters are cut by TP x PP; a base that roles
  share counts once, for its owner;
* gradients, moments, masters and EMA only of what is trained: with LoRA the adapters, which are cut
  by PP (TP cuts one matrix of each pair, which is not counted);
* gradients 4 (fp32 buffers) for a trained role;
* Adam moments 8, and 4 more for the fp32 master of a bf16 weight; divided by DP x CP under the
  distributed optimizer;
* EMA 4, divided likewise;
* activations of each kind of pass: see ``activations``;
* caches of rollouts: keys and values of every token and layer, 2 D numbers, divided by TP, PP and
  the all-to-all of CP, of the micro-batches whose rollouts wait for their backward pass.

Weights, gradients, optimizer states and EMA are there all the time, the rest comes and goes; how
roles' parts meet is in ``peak``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagen.models.base import ModelPlugin
from megagen.plan.activations import activations, cached_numbers
from megagen.plan.load import Load

GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one role on one rank, by use.

    Args:
        weights: of the network and its adapters.
        gradients: of what is trained.
        optimizer: moments and masters.
        ema: the average.
        training: of a pass with gradients; 0 where there is none.
        held: graphs that wait while other roles are at work.
        forward: of a pass without gradients.
        of_inputs: of a pass with gradients of its inputs alone.
        caches: of rollouts, from their first pass to their backward.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    training: float
    held: float
    forward: float
    of_inputs: float
    caches: float

    @property
    def stays(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def activations(self) -> float:
        """The most that the role's own passes hold at once."""
        return max(self.training, self.held, self.forward)


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
    found = activations(plugin, load)
    waiting = found.held if load.holds else found.waiting
    return Memory(
        weights=element * (adapters + (0 if load.borrows_base else parameters)),
        gradients=4 * trained,
        optimizer=states * trained,
        ema=4 * trained / shards if load.ema else 0.0,
        training=element * (waiting + found.at_work) if load.trainable else 0.0,
        held=element * found.held if load.holds else 0.0,
        forward=element * found.forward,
        of_inputs=element * found.of_inputs,
        caches=element * cached_numbers(plugin, load),
    )


def step_flops(plugin: ModelPlugin, load: Load, text_len: int) -> float:
    """FLOPs of one step of a role over the whole run."""
    samples = load.micro_batch_size * load.num_micro_batches * load.dims.dp_size(load.world_size)
    passes = load.passes.in_forwards(is_adapted=load.adapters is not None)
    return passes * samples * plugin.flops(load.latent_shape, text_len)
