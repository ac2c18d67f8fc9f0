"""The plan of a run as text: what ``megagen train --dry-run`` prints."""

from __future__ import annotations

from collections.abc import Mapping

from megagen.config.schema import RunConfig
from megagen.core.vsa import VSAOptions
from megagen.models.adapters import AdapterSpec, adapted_modules, num_parameters
from megagen.models.base import ModelPlugin, Passes
from megagen.models.heads import HeadsLoad
from megagen.plan.estimate import GB, Memory, memory, step_flops
from megagen.plan.load import Load
from megagen.plan.peak import heads_memory, peak


def describe(
    config: RunConfig,
    plugins: Mapping[str, ModelPlugin],
    world_size: int,
    latent_shape: tuple[int, int, int, int] | None,
    text_len: int,
    passes: Mapping[str, Passes],
    heads: HeadsLoad | None = None,
) -> str:
    """The run's layout, batches, memory per rank, tokens and FLOPs, one line each.

    Args:
        config: the checked config.
        plugins: the model of each role.
        world_size: ranks of the run.
        latent_shape: [C, T, H, W] of one sample; None where neither dataset nor config tells.
        text_len: text tokens of a sample.
        passes: of each sample through the roles in a step.
        heads: what is trained beside the roles.
    """
    micro, micros, dp = batch_layout(config, world_size)
    lines = [
        f"run        {config.training.checkpoint.output_dir}, "
        f"{config.training.loop.max_train_steps} steps, seed {config.training.seed}",
        f"ranks      {world_size}: {_layout(config, world_size)}",
        f"batch      {micro} x {micros} micro-batches x {dp} data ranks = {micro * micros * dp}",
    ]
    if latent_shape is not None:
        lines.append(f"sample     latents {list(latent_shape)}, {text_len} text tokens")
    used: dict[str, Memory] = {}
    loads: dict[str, Load] = {}
    for name, plugin in plugins.items():
        lines.append(_network(config, name, plugin))
        if latent_shape is not None:
            asked = passes.get(name, Passes())
            loads[name] = role_load(config, name, plugin, world_size, latent_shape, asked)
            used[name] = memory(plugin, loads[name])
            lines += _cost(plugin, loads[name], used[name], text_len)
    if latent_shape is None:
        return "\n".join(lines)
    judge = None
    if heads is not None:
        judge = heads_memory(heads, plugins[heads.source], loads[heads.source])
        lines += [
            f"heads      on {heads.num_features} features of {heads.source}, "
            f"{heads.parameters / 1e6:.3f} M parameters",
            f"{'':<10} {judge.stays / GB:.2f} GB per rank with gradients and moments, features "
            f"{judge.features / GB:.2f}, their own activations {judge.graph / GB:.2f}",
        ]
    most = peak(used, heads, judge)
    lines.append(
        f"memory     {most.total / GB:.2f} GB per rank at the peak: {most.stays / GB:.2f} stay, "
        f"{most.comes / GB:.2f} {most.when} (estimate, workspace not counted)"
    )
    return "\n".join(lines)


def batch_layout(config: RunConfig, world_size: int) -> tuple[int, int, int]:
    """(micro-batch size, micro-batches per step and data rank, data ranks)."""
    data = config.training.data
    dp = config.training.distributed.dims().dp_size(world_size)
    whole = data.global_batch_size or data.micro_batch_size * dp
    return data.micro_batch_size, whole // (data.micro_batch_size * dp), dp


def _layout(config: RunConfig, world_size: int) -> str:
    d = config.training.distributed
    parts = [
        f"dp {d.dims().dp_size(world_size)}",
        f"tp {d.tp_size}",
        f"cp {d.cp_size}",
        f"pp {d.pp_size}",
    ]
    if d.virtual_pp_size:
        parts.append(f"virtual pp {d.virtual_pp_size}")
    if d.sequence_parallel:
        parts.append("sequence parallel")
    if d.cp_size > 1:
        parts.append(f"cp by {d.cp_comm_type}")
    if d.use_distributed_optimizer:
        parts.append("distributed optimizer")
    return ", ".join(parts)


def _trained(config: RunConfig, name: str, adapters: int | None) -> str:
    """What of a role is trained, and whose weights it stands on."""
    text = "trained" if config.models[name].trainable else "frozen"
    if adapters is not None:
        text += f" by {adapters / 1e6:.3f} M parameters of LoRA" if text == "trained" else ", LoRA"
    sharers = config.base_sharers()
    return text + (f", on the base weights of {sharers[0]}" if name in sharers[1:] else "")


def _sparse(vsa: VSAOptions) -> str:
    """How much of self-attention is left out, from when on."""
    text = f"sparse self-attention, {vsa.at(None):.4g} of the tiles left out"
    if vsa.decay_rate is None or vsa.decay_interval_steps is None:
        return text
    last = round(vsa.at(None) / vsa.decay_rate) * vsa.decay_interval_steps
    return (
        f"{text} from step {last} on; until then {vsa.decay_rate:.4g} more every "
        f"{vsa.decay_interval_steps} steps (FLOPs are those of the end)"
    )


def _network(config: RunConfig, name: str, plugin: ModelPlugin) -> str:
    """What a role's network is, and what of it is trained."""
    spec = AdapterSpec.of(config.role_lora(name))
    adapters = num_parameters(plugin, spec) if spec is not None else None
    return (
        f"{name:<10} {type(plugin).__name__}, {plugin.num_parameters() / 1e6:.2f} M parameters, "
        f"{plugin.num_layers} layers, hidden {plugin.hidden_size}, {plugin.num_heads} heads, "
        f"{config.models[name].precision or config.training.precision}, "
        f"{_trained(config, name, adapters)}"
    )


def role_load(
    config: RunConfig,
    name: str,
    plugin: ModelPlugin,
    world_size: int,
    latent_shape: tuple[int, int, int, int],
    passes: Passes,
) -> Load:
    """What a step asks of role ``name``.

    Args:
        config: the checked config.
        name: of the role.
        plugin: its model.
        world_size: ranks of the run.
        latent_shape: [C, T, H, W] of one sample.
        passes: of each sample through the role.
    """
    role, distributed = config.models[name], config.role_distributed(name)
    micro, micros, num_data_ranks = batch_layout(config, world_size)
    # a replica under another layout works on several data ranks' micro-batches, or on a share
    replicas = distributed.dims().dp_size(world_size)
    spec = AdapterSpec.of(config.role_lora(name))
    keeps_graphs = config.training.score_schedule == "hold" and passes.is_scored
    return Load(
        dims=distributed.dims(),
        world_size=world_size,
        latent_shape=latent_shape,
        micro_batch_size=micro,
        num_micro_batches=max(1, micros * num_data_ranks // replicas),
        trainable=role.trainable,
        bf16=(role.precision or config.training.precision) == "bf16",
        recompute=role.recompute or config.training.recompute,
        distributed_optimizer=distributed.use_distributed_optimizer,
        ema=name == "student" and "ema" in config.callbacks,
        adapters=num_parameters(plugin, spec) if spec is not None else None,
        trains_mlp=spec is None or any(".ffn." in m for m in adapted_modules(plugin, spec)),
        borrows_base=name in config.base_sharers()[1:],
        passes=passes,
        cached_micro_batches=min(passes.cached, micros) * max(1, num_data_ranks // replicas),
        holds=keeps_graphs and distributed.dims().num_chunks == 1,  # else they are replayed
    )


def _cost(plugin: ModelPlugin, load: Load, used: Memory, text_len: int) -> list[str]:
    """Memory and work of a role."""
    activations = f"activations {used.activations / GB:.2f}"
    if load.holds:
        activations += f" (of them {used.held / GB:.2f} held for the scores)"
    caches = f", caches {used.caches / GB:.2f}" if used.caches else ""
    total = used.stays + used.activations + used.caches
    tokens = plugin.num_tokens(load.latent_shape)
    work = step_flops(plugin, load, text_len) / 1e12
    lines = [
        f"{'':<10} {total / GB:.2f} GB per rank: weights {used.weights / GB:.2f}, gradients "
        f"{used.gradients / GB:.2f}, optimizer {used.optimizer / GB:.2f}, ema "
        f"{used.ema / GB:.2f}, {activations}{caches}",
        f"{'':<10} {tokens} tokens a sample, {work:.3f} TFLOP a step",
    ]
    if plugin.vsa is not None:
        lines.append(f"{'':<10} {_sparse(plugin.vsa)}")
    return lines
