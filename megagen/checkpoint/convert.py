"""Between diffusers directories and checkpoints of ours.

To diffusers, one process reads and writes one tensor at a time; no process group is needed. From
diffusers, a role is loaded under any layout (each rank its shards) and saved without an optimizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

import megagen
from megagen.checkpoint import commit, state
from megagen.checkpoint.adapters import spec_of, write_adapters
from megagen.checkpoint.store import DiffusersStore, check_weights
from megagen.checkpoint.weights import (
    CheckpointStore,
    Kind,
    adapter_reference,
    find_checkpoint,
    open_role,
)
from megagen.checkpoint.writer import DirectoryWriter
from megagen.core import process
from megagen.core.errors import CheckpointError
from megagen.core.options import parse_options
from megagen.core.registry import resolve, target_of
from megagen.engine.role import Role, RoleSettings
from megagen.models import MODELS
from megagen.models.base import ModelPlugin
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Export:
    """What to write.

    Args:
        checkpoint: a step's directory or a run folder (its newest valid step).
        output: directory to make.
        role: which network.
        kind: its weights or their average; None: the average where there is one.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None: as stored.
        base: diffusers pipeline whose other parts (VAE, text encoder...) are copied beside, or
            transformer directory whose ``config.json`` is kept; None: the transformer alone.
        max_shard_bytes: largest file, unless one tensor is larger.
        lora: of a role with adapters: ``merged`` into its base, or the ``adapter`` alone, as
            diffusers' ``load_lora_weights`` reads it.
        base_weights: the base of the adapters, where it is not where the run found it.
    """

    checkpoint: Path
    output: Path
    role: str = "student"
    kind: Kind | None = None
    dtype: str | None = None
    base: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    lora: Literal["merged", "adapter"] = "merged"
    base_weights: str | None = None


def to_diffusers(export: Export) -> Path:
    """Write a role of a checkpoint as a diffusers directory, or its adapters as one.

    Returns:
        The transformer's directory: ``output``, or ``output/transformer`` in a pipeline; of
        adapters ``output``.

    Raises:
        CheckpointError: no such checkpoint or role, or the output exists.
    """
    checkpoint = find_checkpoint(export.checkpoint)
    if checkpoint is None:
        raise CheckpointError(
            "is neither a checkpoint nor a run folder with checkpoints.",
            remedy="Give a step's directory (step_00000200) or a run's output_dir.",
            where=str(export.checkpoint),
        )
    if export.output.exists() and any(export.output.iterdir()):
        raise CheckpointError(
            "is there already.", remedy="Choose another --output.", where=str(export.output)
        )
    plugin = rebuild_plugin(state.read_trainer(checkpoint), export.role, checkpoint)
    if export.lora == "adapter":
        return _write_adapters(checkpoint, plugin, export)
    store = open_role(
        checkpoint, plugin, export.role, _kind(checkpoint, plugin, export), base=export.base_weights
    )
    check_weights(plugin, store)
    is_pipeline = export.base is not None and (export.base / "transformer").is_dir()
    target = export.output / "transformer" if is_pipeline else export.output
    shapes = plugin.tensor_shapes()  # a published base may hold tensors that no network reads
    names = [name for name in store.names() if name in shapes]
    dtypes = {n: DTYPES[export.dtype] if export.dtype else store.dtype(n) for n in names}
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = DirectoryWriter(plugin, target, dtypes, export.max_shard_bytes)
    for name in names:
        writer.write(name, store.read(name, None, 0, 1))
    config_from = export.base / "transformer" if is_pipeline and export.base else export.base
    writer.finish(plugin, config_from)
    if is_pipeline and export.base is not None:
        _copy_parts(export.base, export.output)
    return target


def rebuild_plugin(trainer: state.TrainerState, role: str, checkpoint: Path) -> ModelPlugin:
    """The plugin of a checkpoint's role, from what the checkpoint itself says.

    Raises:
        CheckpointError: it has no such role.
    """
    if role not in trainer.models:
        raise CheckpointError(
            f"has no role {role!r}; it has {', '.join(trainer.models)}.",
            remedy="Choose one of them with --role.",
            where=str(checkpoint),
        )
    options = dict(trainer.models[role])
    cls = resolve(options.pop("_target_"), MODELS)
    plugin: ModelPlugin = cls(parse_options(cls.Options, options, f"models.{role}"))
    return plugin


def from_diffusers(plugin: ModelPlugin, source: str, output: Path, dims: ParallelDims) -> Path:
    """Save a diffusers directory's weights as ``output/checkpoints/step_00000000``. Collective.

    Args:
        plugin: built with ``init_from: source``.
        source: diffusers directory or hub id.
        output: run folder; it must hold no checkpoint yet.
        dims: layout to load under.

    Returns:
        The checkpoint's directory; ``models.<role>.init_from`` takes it.

    Raises:
        CheckpointError: weights missing or of another shape, or the folder is in use.
    """
    root = output / "checkpoints"
    if commit.steps(root):
        raise CheckpointError(
            "holds checkpoints already.", remedy="Choose another --output.", where=str(output)
        )
    store = DiffusersStore(getattr(plugin, "directory", None) or source)
    check_weights(plugin, store)
    is_bf16 = _dtypes(store) == {torch.bfloat16}
    precision: Literal["fp32", "bf16"] = "bf16" if is_bf16 else "fp32"
    settings = RoleSettings("student", dims, trainable=False, precision=precision)
    role = Role.build(plugin, settings, data_layout=Mesh.build(dims), store=store)
    trainer = state.TrainerState(
        step=0,
        seed=0,
        version=megagen.__version__,
        world_size=process.world_size(),
        config={},
        models={"student": {"_target_": target_of(plugin), **plugin.portable_options()}},
    )
    if process.is_main():
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    target = root / commit.step_name(0)
    state.save(target, trainer, {"student": role}, include_frozen=True)
    return target


def _kind(checkpoint: Path, plugin: ModelPlugin, export: Export) -> Kind:
    """What is asked for, else the average where there is one."""
    if export.kind is not None:
        return export.kind
    try:
        CheckpointStore(checkpoint, plugin, export.role, "ema")
    except CheckpointError:
        return "weights"
    return "ema"


def _write_adapters(checkpoint: Path, plugin: ModelPlugin, export: Export) -> Path:
    reference = adapter_reference(checkpoint, export.role)
    if reference is None:
        raise CheckpointError(
            f"the role {export.role!r} has no adapters: it was trained whole.",
            remedy="Export it merged (the default).",
            where=str(checkpoint),
        )
    kind = _kind(checkpoint, plugin, export)
    store = CheckpointStore(checkpoint, plugin, export.role, kind)
    dtype = DTYPES[export.dtype] if export.dtype else None
    write_adapters(export.output, store, spec_of(reference), dtype)
    return export.output


def _dtypes(store: DiffusersStore) -> set[torch.dtype]:
    """Types of the stored tensors, one row of each read."""
    return {store.read(name, 0, 0, store.shape(name)[0]).dtype for name in store.names()}


def _copy_parts(base: Path, output: Path) -> None:
    """A pipeline's other parts, beside the new transformer."""
    for part in _others(base.iterdir()):
        if part.is_dir():
            shutil.copytree(part, output / part.name)
        else:
            shutil.copy2(part, output / part.name)


def _others(parts: Iterable[Any]) -> list[Path]:
    return [p for p in parts if p.name != "transformer" and not p.name.startswith(".")]
