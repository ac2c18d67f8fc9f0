"""From a checked config to a ``Run``: plugins, checks, roles, data, method, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from megagen import lora
from megagen.callbacks import CALLBACKS
from megagen.callbacks.base import Callback
from megagen.callbacks.builtin import EMAOptions, GradClipOptions
from megagen.checkpoint.adapters import fingerprint
from megagen.checkpoint.state import read_trainer
from megagen.checkpoint.weights import find_checkpoint, open_weights
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError, suggest
from megagen.core.options import StrictOptions, parse_options
from megagen.core.registry import resolve
from megagen.core.streams import Streams
from megagen.data.dataset import open_dataset
from megagen.data.loader import Loader
from megagen.engine.role import Role
from megagen.engine.settings import EMASettings, OptimizerSettings, RoleSettings
from megagen.methods import METHODS
from megagen.methods.base import RunFacts, TrainingMethod
from megagen.models import MODELS
from megagen.models.base import ModelPlugin, Passes, WeightStore
from megagen.parallel.mesh import Mesh
from megagen.trainer import Run, agree_on_main

BUILT_IN = {"ema": EMAOptions, "grad_clip": GradClipOptions}
"""Callback names that set the engine rather than hook into the loop (FastVideo's names)."""


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


def method_class(config: RunConfig) -> type[TrainingMethod]:
    """The method's class, with its roles compared with ``models``."""
    if config.method.target is None:
        raise ConfigError(
            "required, not given.",
            remedy=f"One of {', '.join(METHODS)}, or a class.",
            where="method._target_",
        )
    cls = cast(
        type[TrainingMethod], resolve(config.method.target, METHODS, where="method._target_")
    )
    cls.check_roles(tuple(config.models))
    return cls


def passes(config: RunConfig) -> dict[str, Passes]:
    """What a step of the config's method asks of each role."""
    cls = method_class(config)
    return cls.passes(parse_options(cls.Options, config.method.own_options(), "method"))


def check(config: RunConfig, plugins: Mapping[str, ModelPlugin], world_size: int) -> None:
    """Everything about a config that can be wrong before a process group exists.

    Raises:
        ConfigError: names the key, the value and what would be right.
    """
    cls = method_class(config)
    options = parse_options(cls.Options, config.method.own_options(), "method")
    cls.check(options, plugins)
    _check_trained(config, cls)
    _check_latents(config, cls.needs_latents(options))
    for name in config.callbacks:
        _callback_options(config, name)
    _check_ranks(config, world_size)
    for name, plugin in plugins.items():
        if config.models[name].trainable:
            optimizer_settings(config, name)
        distributed = config.role_distributed(name)
        owner = f"models.{name}" if config.models[name].distributed else "training"
        distributed.dims().dp_size(world_size)
        plugin.check(distributed.dims(), f"{owner}.distributed")
    lora.check(config, plugins)
    _check_batches(config, world_size)


def _check_trained(config: RunConfig, cls: type[TrainingMethod]) -> None:
    for name, role in config.models.items():
        wanted = name in cls.trained_roles
        if role.trainable != wanted:
            raise ConfigError(
                f"is {str(role.trainable).lower()}, but {cls.__name__} "
                f"{'trains' if wanted else 'does not train'} this role.",
                remedy=f"Set it to {str(wanted).lower()}.",
                where=f"models.{name}.trainable",
            )


def _check_latents(config: RunConfig, needed: bool) -> None:
    if needed and config.training.data.is_text_only:
        raise ConfigError(
            "is text_only, but this method works on the dataset's latents.",
            remedy="Use a dataset with latents, or options of the method that need none.",
            where="training.data.preprocessed_data_type",
        )


def _check_ranks(config: RunConfig, world_size: int) -> None:
    wanted = config.training.distributed.num_gpus
    if wanted is not None and wanted != world_size:
        raise ConfigError(
            f"says {wanted}, the run was started with {world_size} ranks.",
            remedy="Start that many (--nproc), or drop the key.",
            where="training.distributed.num_gpus",
        )


def _check_batches(config: RunConfig, world_size: int) -> None:
    data = config.training.data
    dp = config.training.distributed.dims().dp_size(world_size)
    unit = data.micro_batch_size * dp
    whole = data.global_batch_size or unit
    if whole % unit:
        raise ConfigError(
            f"is {whole}, no multiple of micro_batch_size {data.micro_batch_size} "
            f"x {dp} data ranks.",
            remedy=f"Take a multiple of {unit}.",
            where="training.data.global_batch_size",
        )
    asked = config.training.loop.gradient_accumulation_steps
    if asked is not None and asked != whole // unit:
        raise ConfigError(
            f"is {asked}, but global_batch_size {whole} over {unit} samples a pass makes "
            f"{whole // unit}.",
            remedy="Drop it, or change global_batch_size.",
            where="training.loop.gradient_accumulation_steps",
        )
    for name, role in config.models.items():
        if role.trainable:
            _check_interleaving(config, name, whole // data.micro_batch_size, world_size)


def _check_interleaving(config: RunConfig, name: str, num_requests: int, world_size: int) -> None:
    """Whether a trained role's replicas get micro-batches that its virtual stages can take.

    Args:
        config: the config.
        name: of the role.
        num_requests: micro-batches of a step over all data ranks.
        world_size: ranks of the run.
    """
    distributed = config.role_distributed(name)
    share, stages = num_requests // distributed.dims().dp_size(world_size), distributed.pp_size
    if (distributed.virtual_pp_size or 1) > 1 and share % stages:
        raise ConfigError(
            f"{share} micro-batches per step for each replica of {name} do not divide by its "
            f"pp_size {stages}, which the interleaved schedule needs.",
            remedy="Change global_batch_size or micro_batch_size, or drop virtual_pp_size.",
            where="training.data.global_batch_size",
        )


def build_run(config: RunConfig, plugins: Mapping[str, ModelPlugin]) -> Run:
    """Build every part. Collective over all ranks; ``check`` has passed."""
    streams = Streams(config.training.seed)
    mesh = Mesh.build(config.training.distributed.dims())
    loader = build_loader(config, mesh, streams)
    cls = method_class(config)
    options = parse_options(cls.Options, config.method.own_options(), "method")
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
        optimizer=_run_optimizer(config),
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


def role_settings(config: RunConfig, name: str) -> RoleSettings:
    """What the engine needs to know of role ``name``."""
    role, training = config.models[name], config.training
    distributed = config.role_distributed(name)
    is_student = name == "student"
    ema = _built_in(config, "ema", EMAOptions) if is_student and "ema" in config.callbacks else None
    return RoleSettings(
        name=name,
        dims=distributed.dims(),
        trainable=role.trainable,
        precision=role.precision or training.precision,
        recompute=role.recompute or training.recompute,
        transformer_impl=role.transformer_impl,
        attention_backend=role.attention.backend,
        fp8=role.fp8,
        score_schedule=training.score_schedule,
        overlap_grad_reduce=distributed.overlap_grad_reduce,
        overlap_param_gather=distributed.overlap_param_gather,
        grad_reduce_in_fp32=distributed.grad_reduce_in_fp32,
        optimizer=optimizer_settings(config, name) if role.trainable else None,
        ema=EMASettings(decay=ema.decay, start_step=ema.start_iter) if ema else None,
        lora=lora.adapter_spec(config, name),
    )


def optimizer_settings(config: RunConfig, name: str) -> OptimizerSettings:
    """Of role ``name``: its own keys before the method's, and those before ``training``'s.

    Raises:
        ConfigError: the role's keys and the method's contradict each other.
    """
    cls = method_class(config)
    options = parse_options(cls.Options, config.method.own_options(), "method")
    of_method = cls.optimizer_options(options, name)
    own = config.models[name].optimizer.model_dump(exclude_none=True)
    for key in own.keys() & of_method.keys():
        if own[key] != of_method[key]:
            raise ConfigError(
                f"is {own[key]!r}, but the method's own options say {of_method[key]!r}.",
                remedy="Give it in one place.",
                where=f"models.{name}.optimizer.{key}",
            )
    base = _run_optimizer(config)
    return replace(
        base,
        **{**of_method, **own},
        total_steps=cls.num_updates(options, name, base.total_steps),
        use_distributed_optimizer=config.role_distributed(name).use_distributed_optimizer,
    )


def _run_optimizer(config: RunConfig) -> OptimizerSettings:
    """``training.optimizer`` with the clip of ``callbacks.grad_clip``, over all steps."""
    return OptimizerSettings(
        **config.training.optimizer.model_dump(),
        max_grad_norm=_built_in(config, "grad_clip", GradClipOptions).max_grad_norm,
        total_steps=config.training.loop.max_train_steps,
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


def _built_in(config: RunConfig, name: str, cls: type[Any]) -> Any:
    section = config.callbacks.get(name)
    return parse_options(cls, section.own_options() if section else {}, f"callbacks.{name}")


def _callback_options(config: RunConfig, name: str) -> StrictOptions:
    section = config.callbacks[name]
    if section.target is None and name in BUILT_IN:
        return cast(StrictOptions, _built_in(config, name, BUILT_IN[name]))
    return parse_options(
        _callback_class(config, name).Options, section.own_options(), f"callbacks.{name}"
    )


def _callback_class(config: RunConfig, name: str) -> type[Callback]:
    target = config.callbacks[name].target or CALLBACKS.get(name)
    if target is None:
        raise ConfigError(
            "is no built-in callback and has no _target_;",
            remedy=suggest(name, [*BUILT_IN, *CALLBACKS]),
            where=f"callbacks.{name}",
        )
    return cast(type[Callback], resolve(target, CALLBACKS, where=f"callbacks.{name}._target_"))


def _build_callback(config: RunConfig, name: str) -> Callback:
    return _callback_class(config, name)(_callback_options(config, name))
