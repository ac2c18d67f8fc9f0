"""Numbers that a pass of a role holds on a rank, beside weights and caches.

Per token and layer, with D the hidden and F the FFN size:

* a pass with gradients keeps ``18 D + 2 F`` without recomputation, ``16 D + F`` with selective
  (normed queries and keys and the MLP's activation are made again) and ``D`` with full; what is
  recomputed is there for one layer at a time, under full beside the gradients of its MLP,
  ``D + 2 F``. Embedding and head keep 2 D more;
* sparse attention keeps D more, its gate;
* linears whose weights have no gradient do not keep their inputs: ``15 D + F`` where the whole
  network is frozen, ``17 D + F`` where the adapters are attention's;
* a pass without gradients holds one layer's ``4 D + 2 F``, at least ``8 D``;
* a block of a causal network that continues a video holds the keys and values of all its frames,
  2 D each, in one piece a layer.

TP divides what is inside attention and MLP, sequence parallelism the rest, CP the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagen.models.base import ModelPlugin
from megagen.plan.load import Load


@dataclass(frozen=True)
class Activations:
    """Numbers of one role on its fullest rank (the first pipeline stage), by pass.

    Args:
        waiting: kept for the backward passes, as far as the schedule lets micro-batches wait.
        held: kept where all micro-batches wait.
        at_work: of the layer whose backward pass runs.
        forward: of a pass without gradients.
        of_inputs: of a pass with gradients of its inputs alone.
    """

    waiting: float
    held: float
    at_work: float
    forward: float
    of_inputs: float


def activations(plugin: ModelPlugin, load: Load) -> Activations:
    """What each kind of pass holds; whether a role makes such passes is not asked here."""
    dims, hidden, ffn = load.dims, plugin.hidden_size, plugin.ffn_size
    outside = hidden / (dims.tp_size if dims.sequence_parallel else 1)
    inside, units = hidden / dims.tp_size, ffn / dims.tp_size
    gate = inside if plugin.vsa is not None else 0.0
    one_layer = 10 * outside + 8 * inside + 2 * units + gate
    frozen_layer = 7 * outside + 8 * inside + units + gate
    selective = 10 * outside + 6 * inside + units + gate
    if not load.trains_mlp:
        one_layer, selective = one_layer - outside - units, selective - outside
    kept = {"none": one_layer, "selective": selective, "full": outside}[load.recompute]
    of_inputs = {"none": frozen_layer, "selective": selective - units, "full": outside}
    again = one_layer - kept
    if load.recompute == "full":
        again += outside + 2 * units
    layers, ends = plugin.num_layers / dims.pp_size, 2 * outside
    tokens, past = pass_tokens(plugin, load), past_numbers(plugin, load)
    sample = sample_tokens(load, plugin.num_tokens(load.latent_shape))
    of_pass = tokens * (kept * layers + ends)
    if load.recompute == "none":
        of_pass, past = of_pass + past * layers, 0.0
    num_passes = load.num_passes(plugin)
    return Activations(
        waiting=of_pass * min(dims.pp_size, num_passes),
        held=of_pass * num_passes,
        at_work=tokens * again + past,
        forward=sample * max(2 * outside + 6 * inside, 4 * outside + 2 * units),
        of_inputs=sample * (of_inputs[load.recompute] * layers + ends + again),
    )


def sample_tokens(load: Load, tokens: float) -> float:
    """Of so many tokens a sample: those of a micro-batch on a CP rank."""
    return load.micro_batch_size * tokens / load.dims.cp_size


def pass_tokens(plugin: ModelPlugin, load: Load) -> float:
    """Of a pass with gradients, in a micro-batch on a CP rank."""
    shape = load.latent_shape
    if load.passes.by_block:
        shape = of_frames(shape, max(map(len, load.blocks(plugin))))
    return sample_tokens(load, plugin.num_tokens(shape))


def past_numbers(plugin: ModelPlugin, load: Load) -> float:
    """Keys and values of a block and of all frames before it, in one layer; no window counts."""
    if not load.passes.by_block:
        return 0.0
    parts = load.dims.tp_size * load.cp_parts
    tokens = plugin.num_tokens(of_frames(load.latent_shape, load.num_frames))
    return 2 * load.micro_batch_size * tokens * plugin.hidden_size / parts


def cached_numbers(plugin: ModelPlugin, load: Load) -> float:
    """Keys and values that rollouts leave behind: of every frame but those of the last block."""
    if not load.cached_micro_batches:
        return 0.0
    frames = load.num_frames - len(load.blocks(plugin)[-1])
    if frames <= 0:
        return 0.0
    tokens = load.micro_batch_size * plugin.num_tokens(of_frames(load.latent_shape, frames))
    parts = load.dims.tp_size * load.dims.pp_size * load.cp_parts
    numbers = 2 * tokens * plugin.hidden_size * plugin.num_layers / parts
    return numbers * load.cached_micro_batches


def of_frames(latent_shape: Sequence[int], frames: int) -> tuple[int, ...]:
    """The shape of so many of a sample's frames."""
    return (latent_shape[0], frames, *latent_shape[2:])
