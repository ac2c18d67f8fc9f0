"""The state of a run on disk, through megatron-core's distributed checkpointing.

A step's directory holds ``state/`` (every role's weights, optimizer, schedule and EMA, sharded, so
that it can be read under another layout or number of ranks), ``trainer.json`` (step, seed,
config) and the manifest. Randomness and data order are functions of (seed, step): nothing of them
is stored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from megagen.checkpoint import commit
from megagen.core import process
from megagen.core.errors import CheckpointError
from megagen.core.log import get_logger

log = get_logger(__name__)

TRAINER = "trainer.json"
_GATE = ".linear_gate."
_UNGATED = (
    "It was trained without sparse attention: start a new run (another output_dir) from its "
    "weights with models.<role>.init_from, where the gate begins at zero; or resume with dense "
    "attention."
)


@dataclass(frozen=True)
class TrainerState:
    """What a step's ``trainer.json`` says.

    Args:
        step: optimizer steps done.
        seed: the run's seed.
        version: megagen's version.
        world_size: ranks that wrote it (any number may read it).
        config: the resolved run config as plain data; empty for converted weights.
        models: each role's ``_target_`` and portable options, so that a role can be rebuilt alone.
        adapters: of each role with adapters, which alone are saved: rank, alpha, modules, and which
            base they belong to.
    """

    step: int
    seed: int
    version: str
    world_size: int
    config: dict[str, Any]
    models: dict[str, dict[str, Any]]
    adapters: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class Stateful(Protocol):
    """What a checkpoint holds: a role, or a trained head beside the roles."""

    @property
    def trainable(self) -> bool: ...

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]: ...

    def load_state(self, loaded: dict[str, Any]) -> None: ...


def save(
    directory: Path,
    state: TrainerState,
    roles: Mapping[str, Stateful],
    *,
    include_frozen: bool = False,
) -> None:
    """Write one checkpoint and commit it. Collective over all ranks.

    Args:
        directory: the step's final directory, on a file system that all ranks share.
        state: what goes into ``trainer.json``.
        roles: roles to save.
        include_frozen: save frozen roles too, instead of leaving them out.

    Raises:
        CheckpointError: too little space; nothing was written.
    """
    sharded = {
        name: role.sharded_state()
        for name, role in roles.items()
        if role.trainable or include_frozen
    }
    _check_space(directory, sharded)
    staging = commit.staging_path(directory)
    if process.is_main():
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "state").mkdir(parents=True)
        (staging / TRAINER).write_text(json.dumps(asdict(state), indent=1))
    dist.barrier()
    dist_checkpointing.save(sharded, str(staging / "state"))
    dist.barrier()
    mine = commit.files_of(staging)[process.rank() :: process.world_size()]
    hashes: list[Any] = [None] * process.world_size()
    dist.all_gather_object(hashes, [commit.hash_file(staging, path) for path in mine])
    if process.is_main():
        commit.commit(directory, [h for part in hashes for h in part])
    dist.barrier()


def read_trainer(directory: Path, *, hashes: bool = True) -> TrainerState:
    """Verify a checkpoint and read its ``trainer.json``.

    Raises:
        CheckpointError: it is no checkpoint, or a corrupt one.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "is no directory.", remedy="Give a step's directory.", where=str(directory)
        )
    commit.verify(directory, hashes=hashes)
    return TrainerState(**json.loads((directory / TRAINER).read_text()))


def load(directory: Path, roles: Mapping[str, Stateful]) -> None:
    """Read the state of ``roles`` from a verified checkpoint, under any layout. Collective.

    Raises:
        CheckpointError: a role or tensor is missing or of another shape.
    """
    sharded = {
        name: role.sharded_state(is_loading=True) for name, role in roles.items() if role.trainable
    }
    _check_shapes(directory, sharded)
    loaded = dist_checkpointing.load(sharded, str(directory / "state"))
    for name, role in roles.items():
        if role.trainable:
            role.load_state(loaded[name])


def _tensors(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _check_space(directory: Path, sharded: Any) -> None:
    """Compare what will be written with the free space, before anything is."""
    mine = sum(
        t.data.numel() * t.data.element_size()
        for t in _tensors(sharded)
        if t.data is not None and is_main_replica(t.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64, device=process.device())
    dist.all_reduce(total)
    root = directory.parent
    while not root.exists():
        root = root.parent
    free = shutil.disk_usage(root).free
    if int(total) > free:
        raise CheckpointError(
            f"needs {int(total) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free.",
            remedy="Free some space or lower training.checkpoint.checkpoints_total_limit.",
            where=str(directory),
        )


def _check_shapes(directory: Path, sharded: Any) -> None:
    """Name the first tensor that the checkpoint lacks or holds in another shape."""
    stored = dist_checkpointing.load_tensors_metadata(str(directory / "state"))
    wanted = list(_tensors(sharded))
    if any(_GATE in key for key in stored) and not any(_GATE in t.key for t in wanted):
        raise CheckpointError(
            "was trained with sparse attention, this run's networks have none.",
            remedy="Resume with attention.backend vsa (its sparsity may be 0, which is dense).",
            where=str(directory),
        )
    for tensor in wanted:
        found = stored.get(tensor.key)
        if found is None:
            raise CheckpointError(
                f"holds no tensor {tensor.key!r}.",
                remedy=_UNGATED
                if _GATE in tensor.key
                else "It was made by another model or method: check models and method.",
                where=str(directory),
            )
        if tuple(found.global_shape) != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{tensor.key!r} has the shape {tuple(found.global_shape)} there, this run's model "
                f"needs {tuple(tensor.global_shape)}.",
                remedy="Resume with the architecture that the checkpoint was trained with.",
                where=str(directory),
            )
