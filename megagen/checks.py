"""What can be wrong with a config, found before a process group exists."""

from __future__ import annotations

from collections.abc import Mapping

from megagen import lora
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError
from megagen.methods.base import TrainingMethod
from megagen.models.base import ModelPlugin
from megagen.settings import callback_options, method_of, optimizer_settings


def check(config: RunConfig, plugins: Mapping[str, ModelPlugin], world_size: int) -> None:
    """Everything about a config that can be wrong before a process group exists.

    Raises:
        ConfigError: names the key, the value and what would be right.
    """
    cls, options = method_of(config)
    cls.check(options, plugins)
    _check_trained(config, cls)
    _check_latents(config, cls.needs_latents(options))
    if cls.needs_ema(options) and "ema" not in config.callbacks:
        raise ConfigError(
            f"is missing, but {cls.__name__} with these options works on a moving average.",
            remedy="Add callbacks.ema, or see what the method's options offer without.",
            where="callbacks.ema",
        )
    for name in config.callbacks:
        callback_options(config, name)
    _check_ranks(config, world_size)
    for name, plugin in plugins.items():
        if config.models[name].trainable:
            optimizer_settings(config, name)
        distributed = config.role_distributed(name)
        owner = f"models.{name}" if config.models[name].distributed else "training"
        distributed.dims().dp_size(world_size)
        plugin.check(distributed.dims(), f"{owner}.distributed")
        _check_ramp(config, name)
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


def _check_ramp(config: RunConfig, name: str) -> None:
    vsa = config.models[name].attention.vsa
    if vsa is not None and vsa.decay_rate is not None and not config.models[name].trainable:
        raise ConfigError(
            f"is {vsa.decay_rate}, but nothing trains this role to follow a sparsity that rises.",
            remedy="Drop it and decay_interval_steps.",
            where=f"models.{name}.attention.vsa.decay_rate",
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
