"""From a checked config to a ``Run``: plugins, roles, data, method, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from megagen import lora
from megagen.callbacks.base import Callback
from megagen.checkpoint.adapters import fingerprint
from megagen.checkpoint.state import read_trainer
from megagen.checkpoint.weights import find_checkpoint, open_weights
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.core.registry import resolve
from megagen.core.streams import Streams
from megagen.data.dataset import open_dataset
from megagen.data.loader import Loader
from megagen.engine.role import Role
from megagen.methods.base import RunFacts
from megagen.models import MODELS
from megagen.models.base import ModelPlugin, WeightStore
from megagen.parallel.mesh import Mesh
from megagen.settings import (
    BUILT_IN,
    callback_class,
    callback_options,
    method_of,
    role_settings,
    run_optimizer,
)
from megagen.trainer import Run, agree_on_main


def build_plugins(config: RunConfig) -> dict[str, ModelPlugin]:
    """The model plugin of every role; no weights are read.

    Raises:
        ConfigError: unknown class or option.
    """
    return {name: _build_plugin(config, name) for name in config.models}


def _build_plugin(config: RunConfig, name: str) -> ModelPlugin:
    role, where = config.models[name], f"models.{name}"
    given = role.model_options()
    shift = role.flow_shift if role.flow_shift is not None else config.pipeline.flow_shift
    if shift is not None:
        given["flow_shift"] = shift
    cls = resolve(role.target, MODELS, where=f"{where}._target_")
    checkpoint = _checkpoint_of(given)
    if checkpoint is not None:
        stored = read_trainer(checkpoint, hashes=False).models["student"]
        # a bidirectional network may begin with the weights of a causal one
        kept = {k: v for k, v in stored.items() if k in cls.Options.model_fields}
        given = {**kept, **{k: v for k, v in given.items() if k != "init_from"}}
    options = parse_options(cls.Options, given, where)
    return cast(ModelPlugin, cls(options, where=where))


def _checkpoint_of(model_options: Mapping[str, Any]) -> Path | None:
    """The checkpoint of ours that ``init_from`` names, if it names one."""
    init_from = model_options.get("init_from")
    return find_checkpoint(init_from) if isinstance(init_from, str) else None


def build_run(config: RunConfig, plugins: Mapping[str, ModelPlugin]) -> Run:
    """Build every part. Collective over all ranks; ``check`` has passed."""
    streams = Streams(config.training.seed)
    mesh = Mesh.build(config.training.distributed.dims())
    loader = build_loader(config, mesh, streams)
    cls, options = method_of(config)
    facts = _facts(config, plugins, mesh, streams, loader)
    found = agree_on_main(lambda: cls.survey(options, plugins, streams, facts))
    built: dict[str, Role] = {}
    for name in sorted(plugins, key=lambda name: name not in config.base_sharers()[:1]):
        if name not in found.idle:
            built[name] = build_role(config, name, plugins[name], mesh, streams, built)
    roles = {name: built[name] for name in plugins if name in built}
    method = cls(roles, options, streams, replace(facts, preparation=found))
    callbacks = {
        name: _build_callback(config, name) for name in config.callbacks if name not in BUILT_IN
    }
    return Run(config, mesh, streams, roles, method, loader, callbacks)


def _facts(
    config: RunConfig,
    plugins: Mapping[str, ModelPlugin],
    mesh: Mesh,
    streams: Streams,
    loader: Loader,
) -> RunFacts:
    """What a method may know of the run."""
    return RunFacts(
        output_dir=Path(config.training.checkpoint.output_dir),
        unconditional=loader.dataset.unconditional,
        optimizer=run_optimizer(config),
        samples=loader,
        identity=lambda name: identity(config, name, plugins[name], streams),
        data_place=(mesh.dp_rank, mesh.dp_size),
        is_writer=mesh.tp_rank == mesh.cp_rank == mesh.pp_rank == 0,
    )


def identity(config: RunConfig, name: str, plugin: ModelPlugin, streams: Streams) -> dict[str, Any]:
    """What role ``name``'s first weights are: family, fingerprint, adapters."""
    adapters = lora.adapter_store(config, name, plugin, streams)
    return {
        "family": plugin.family,
        "weights": fingerprint(weight_store(config, name, plugin, streams)),
        "adapters": None if adapters is None else fingerprint(adapters),
    }


def sample_shape(
    config: RunConfig, plugin: ModelPlugin, *, required: bool
) -> tuple[tuple[int, int, int, int] | None, int]:
    """Latent shape [C, T, H, W] of the largest bucket, and text tokens of a sample.

    Opens the dataset, so a missing or corrupt file is found here, before any rank starts.

    Args:
        config: the config.
        plugin: the student's model.
        required: raise where there is no dataset; else the shape is None.

    Raises:
        ConfigError: the dataset's latents are not this model's.
    """
    data = config.training.data
    if not required and not all(Path(source).is_dir() for source in data.sources()):
        return data.latent_shape, data.text_len or 0
    dataset = open_dataset(data, "training.data")
    shape = max((b.latent_shape for b in dataset.buckets), key=lambda s: s[1] * s[2] * s[3])
    if shape[0] != plugin.in_channels:
        raise ConfigError(
            f"has latents of {shape[0]} channels, the model works on {plugin.in_channels}.",
            remedy="Preprocess with this model's codec, or change models.student.architecture.",
            where="training.data.data_path",
        )
    return shape, dataset.text_len


def build_loader(config: RunConfig, mesh: Mesh, streams: Streams) -> Loader:
    """The loader of this rank's share of the data."""
    data = config.training.data
    return Loader(
        data,
        data_rank=mesh.dp_rank,
        data_size=mesh.dp_size,
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size or data.micro_batch_size * mesh.dp_size,
        streams=streams,
    )


def build_role(
    config: RunConfig,
    name: str,
    plugin: ModelPlugin,
    mesh: Mesh,
    streams: Streams,
    built: Mapping[str, Role],
) -> Role:
    """One role with its weights in place; ``built`` may lend it their base weights."""
    base = lora.lender(config, name, built)
    owner = name if base is None else base.name
    store = weight_store(config, owner, plugin, streams)
    role = Role.build(
        plugin,
        role_settings(config, name),
        data_layout=mesh,
        store=store,
        adapters=lora.adapter_store(config, name, plugin, streams),
        base=base,
    )
    role.adapter_reference = agree_on_main(lambda: lora.reference(config, name, plugin, store))
    return role


def weight_store(
    config: RunConfig, name: str, plugin: ModelPlugin, streams: Streams
) -> WeightStore:
    """Where role ``name``'s first weights come from; only headers are read here.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    given = config.models[name].model_options()
    return open_weights(plugin, given.get("init_from"), streams, name, given.get("subfolder"))


def _build_callback(config: RunConfig, name: str) -> Callback:
    return callback_class(config, name)(callback_options(config, name))
