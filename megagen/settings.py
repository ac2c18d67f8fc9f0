"""What a run config says of its method, callbacks and roles, in the terms of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from megagen import lora
from megagen.callbacks import CALLBACKS
from megagen.callbacks.base import Callback
from megagen.callbacks.builtin import EMAOptions, GradClipOptions
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError, suggest
from megagen.core.options import StrictOptions, parse_options
from megagen.core.registry import resolve
from megagen.engine.settings import EMASettings, OptimizerSettings, RoleSettings
from megagen.methods import METHODS
from megagen.methods.base import TrainingMethod
from megagen.models.base import ModelPlugin, Passes
from megagen.models.heads import HeadsLoad

BUILT_IN = {"ema": EMAOptions, "grad_clip": GradClipOptions}
"""Callback names that set the engine rather than hook into the loop (FastVideo's names)."""


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


def method_of(config: RunConfig) -> tuple[type[TrainingMethod], Any]:
    """The method's class and its options."""
    cls = method_class(config)
    return cls, parse_options(cls.Options, config.method.own_options(), "method")


def passes(config: RunConfig) -> dict[str, Passes]:
    """What a step of the config's method asks of each role."""
    cls, options = method_of(config)
    return cls.passes(options)


def heads_load(config: RunConfig, plugins: Mapping[str, ModelPlugin]) -> HeadsLoad | None:
    """What the config's method trains beside the roles."""
    cls, options = method_of(config)
    return cls.heads_load(options, plugins)


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
        attention_backend=role.attention.dense_backend,
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
    cls, options = method_of(config)
    of_method = cls.optimizer_options(options, name)
    own = config.models[name].optimizer.model_dump(exclude_none=True)
    for key in own.keys() & of_method.keys():
        if own[key] != of_method[key]:
            raise ConfigError(
                f"is {own[key]!r}, but the method's own options say {of_method[key]!r}.",
                remedy="Give it in one place.",
                where=f"models.{name}.optimizer.{key}",
            )
    base = run_optimizer(config)
    return replace(
        base,
        **{**of_method, **own},
        total_steps=cls.num_updates(options, name, base.total_steps),
        use_distributed_optimizer=config.role_distributed(name).use_distributed_optimizer,
    )


def run_optimizer(config: RunConfig) -> OptimizerSettings:
    """``training.optimizer`` with the clip of ``callbacks.grad_clip``, over all steps."""
    return OptimizerSettings(
        **config.training.optimizer.model_dump(),
        max_grad_norm=_built_in(config, "grad_clip", GradClipOptions).max_grad_norm,
        total_steps=config.training.loop.max_train_steps,
    )


def _built_in(config: RunConfig, name: str, cls: type[Any]) -> Any:
    section = config.callbacks.get(name)
    return parse_options(cls, section.own_options() if section else {}, f"callbacks.{name}")


def callback_options(config: RunConfig, name: str) -> StrictOptions:
    """Of ``callbacks.<name>``, checked."""
    section = config.callbacks[name]
    if section.target is None and name in BUILT_IN:
        return cast(StrictOptions, _built_in(config, name, BUILT_IN[name]))
    return parse_options(
        callback_class(config, name).Options, section.own_options(), f"callbacks.{name}"
    )


def callback_class(config: RunConfig, name: str) -> type[Callback]:
    """Of ``callbacks.<name>``.

    Raises:
        ConfigError: there is none of that name.
    """
    target = config.callbacks[name].target or CALLBACKS.get(name)
    if target is None:
        raise ConfigError(
            "is no built-in callback and has no _target_;",
            remedy=suggest(name, [*BUILT_IN, *CALLBACKS]),
            where=f"callbacks.{name}",
        )
    return cast(type[Callback], resolve(target, CALLBACKS, where=f"callbacks.{name}._target_"))
