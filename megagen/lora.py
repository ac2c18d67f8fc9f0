"""``models.<role>.lora`` of a config as parts of its roles, and the checks that need the models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagen.checkpoint.adapters import AdapterFile, InitialAdapters, make_reference
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError
from megagen.core.streams import Streams
from megagen.engine.role import Role
from megagen.models.adapters import AdapterSpec, adapted_modules
from megagen.models.base import ModelPlugin, WeightStore


def adapter_spec(config: RunConfig, name: str) -> AdapterSpec | None:
    """The adapters of role ``name``; None: it has none."""
    return AdapterSpec.of(config.role_lora(name))


def check(config: RunConfig, plugins: Mapping[str, ModelPlugin]) -> None:
    """Targets name something, files fit, roles on one base agree.

    Raises:
        ConfigError: names the key.
        CheckpointError: ``lora.init_from`` has other adapters.
    """
    for name, plugin in plugins.items():
        options, spec, where = config.role_lora(name), adapter_spec(config, name), _where(name)
        if options is not None and spec is None and config.models[name].trainable:
            raise ConfigError(
                "required: the role is trained, and its base is not.",
                remedy="Give a number from 1 up.",
                where=f"{where}.rank",
            )
        if options is not None and spec is not None:
            adapted_modules(plugin, spec, where)
            if options.init_from is not None:
                AdapterFile(options.init_from, plugin, spec, f"{where}.init_from")
    _check_sharing(config, plugins)


def _check_sharing(config: RunConfig, plugins: Mapping[str, ModelPlugin]) -> None:
    sharing = config.base_sharers()
    if len(sharing) == 1:
        others = [name for name in config.models if name not in sharing]
        raise ConfigError(
            "is true, but no other role shares its base.",
            remedy=f"Set it for {' or '.join(others)} too, or drop it."
            if others
            else "Drop it: the run has one role.",
            where=f"{_where(sharing[0])}.share_base",
        )
    for name in sharing[1:]:
        first, own = (_base_keys(config, role) for role in (sharing[0], name))
        for key, value in own.items():
            if value != first[key]:
                raise ConfigError(
                    f"is {value!r}, but {first[key]!r} for {sharing[0]!r}, whose base it shares.",
                    remedy=f"Make them equal, or drop {_where(name)}.share_base.",
                    where=f"models.{name}.{key}",
                )
        if (plugins[name].vsa is None) != (plugins[sharing[0]].vsa is None):
            raise ConfigError(
                f"has the gate of sparse attention, or {sharing[0]!r} has, but not both, and they "
                "share a base.",
                remedy="Give both backend vsa (sparsity 0 is dense attention), or drop "
                f"{_where(name)}.share_base.",
                where=f"models.{name}.attention.backend",
            )
        if plugins[name].tensor_shapes() != plugins[sharing[0]].tensor_shapes():
            raise ConfigError(
                f"is not that of {sharing[0]!r}, whose base it shares.",
                remedy=f"Make them equal, or drop {_where(name)}.share_base.",
                where=f"models.{name}.architecture",
            )


def _base_keys(config: RunConfig, name: str) -> dict[str, Any]:
    """What decides which weights a rank holds, and in which form."""
    role, distributed = config.models[name], config.role_distributed(name)
    layout = ("tp_size", "pp_size", "virtual_pp_size", "pipeline_layers")
    given = role.model_options()
    return {
        **{f"distributed.{key}": getattr(distributed, key) for key in layout},
        "precision": role.precision or config.training.precision,
        "transformer_impl": role.transformer_impl,
        "fp8": role.fp8,
        **{key: given.get(key) for key in ("init_from", "subfolder", "expert")},
    }


def adapter_store(
    config: RunConfig, name: str, plugin: ModelPlugin, streams: Streams
) -> WeightStore | None:
    """Where the first adapters of role ``name`` come from; None: it has none."""
    options, spec = config.role_lora(name), adapter_spec(config, name)
    if options is None or spec is None:
        return None
    if options.init_from is None:
        return InitialAdapters(plugin, spec, streams, name)
    return AdapterFile(options.init_from, plugin, spec, f"{_where(name)}.init_from")


def lender(config: RunConfig, name: str, built: Mapping[str, Role]) -> Role | None:
    """The role whose base weights role ``name`` uses; None: it has its own."""
    sharing = config.base_sharers()
    lenders = [other for other in sharing if other in built]  # the first may not be needed
    return built[lenders[0]] if name in sharing and lenders else None


def reference(
    config: RunConfig, name: str, plugin: ModelPlugin, base: WeightStore
) -> dict[str, Any] | None:
    """What checkpoints say of a role's adapters; None: it has none. ``base`` is read through."""
    spec = adapter_spec(config, name)
    if spec is None:
        return None
    sharing = config.base_sharers()
    given = config.models[name].model_options()
    source, directory = given.get("init_from"), getattr(plugin, "directory", None)
    if source is not None and Path(source).exists():
        source = str(Path(source).resolve())
    origin = {
        "init_from": source,
        "subfolder": given.get("subfolder"),
        "directory": None if directory is None else str(directory.resolve()),
        "seed": config.training.seed,
        "role": sharing[0] if name in sharing else name,
    }
    return make_reference(plugin, spec, origin, base)


def _where(name: str) -> str:
    return f"models.{name}.lora"
