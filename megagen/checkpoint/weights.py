"""Where a role's first weights come from: a diffusers directory, a checkpoint, or nowhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megagen.checkpoint import commit
from megagen.checkpoint.adapters import MergedStore, fingerprint, spec_of
from megagen.checkpoint.store import DiffusersStore, InitialStore, check_weights, completed
from megagen.core.errors import CheckpointError
from megagen.core.streams import Streams
from megagen.models.adapters import adapter_source, is_adapter
from megagen.models.base import ModelPlugin, WeightSource, WeightStore
from megagen.models.hub import read_json

Kind = Literal["weights", "ema"]


class CheckpointStore:
    """A role's weights, or their average, in a checkpoint: diffusers tensors read one at a time.

    Of a role with adapters a checkpoint holds these alone (see ``open_role``). No process group and
    no network are needed; the memory used is that of one tensor.

    Args:
        directory: a step's directory, verified.
        plugin: of the role.
        role: its name.
        kind: ``weights`` or ``ema``.

    Raises:
        CheckpointError: the checkpoint has no such role or no average.
    """

    def __init__(
        self, directory: Path, plugin: ModelPlugin, role: str, kind: Kind = "weights"
    ) -> None:
        self.directory, self.plugin = directory, plugin
        prefix = f"{role}.ema." if kind == "ema" else f"{role}."
        self._sources: dict[str, tuple[str, WeightSource, int]] = {}
        for key, stored in self._stored.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name.startswith("ema."):
                continue
            source = _source(plugin, name, stored.size)
            for number, tensor in enumerate(source.names):
                self._sources[tensor] = (key, source, number)
        if not self._sources:
            raise CheckpointError(
                f"holds no {kind} of the role {role!r}.",
                remedy="Name a trained role, and ema only where callbacks.ema was on.",
                where=str(directory),
            )
        self._last: tuple[str, list[Tensor]] | None = None

    @cached_property
    def _stored(self) -> dict[str, TensorStorageMetadata]:
        reader = dcp.FileSystemReader(str(self.directory / "state"))
        entries = reader.read_metadata().state_dict_metadata
        return {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}

    def names(self) -> Iterator[str]:
        """All tensors, parameter by parameter."""
        yield from self._sources

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        _, source, number = self._sources[name]
        return source.shapes[number]

    def dtype(self, name: str) -> torch.dtype:
        """Type it is stored in."""
        return self._stored[self._sources[name][0]].properties.dtype

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim``; the whole tensor where ``dim`` is None."""
        key, source, number = self._sources[name]
        if self._last is None or self._last[0] != key:
            self._last = (key, list(source.split(self._load(key))))
        tensor = self._last[1][number]
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]

    def _load(self, key: str) -> Tensor:
        stored = self._stored[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        reader = dcp.FileSystemReader(str(self.directory / "state"))
        with warnings.catch_warnings():
            # one process reading by itself is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({key: tensor}, storage_reader=reader, no_dist=True)
        return tensor


def _source(plugin: ModelPlugin, name: str, size: torch.Size) -> WeightSource:
    if is_adapter(name):
        return adapter_source(plugin, name, rank=size[0] if ".lora.A" in name else size[1])
    return plugin.weight_source(name)


def adapter_reference(directory: Path, role: str) -> dict[str, Any] | None:
    """What a checkpoint says of a role's adapters and their base; None: it has none."""
    trainer = read_json(directory / "trainer.json")
    found: dict[str, Any] | None = trainer.get("adapters", {}).get(role)
    return found


def open_role(
    directory: Path,
    plugin: ModelPlugin,
    role: str,
    kind: Kind = "weights",
    *,
    base: str | None = None,
) -> CheckpointStore | MergedStore:
    """A role's whole weights in a checkpoint; adapters are merged into the base they belong to.

    Args:
        directory: a step's directory, verified.
        plugin: of the role.
        role: its name.
        kind: ``weights`` or ``ema``.
        base: where the base weights are now; None: where the run found them.

    Raises:
        CheckpointError: no such role or average, or no such base, or other weights there.
    """
    store = CheckpointStore(directory, plugin, role, kind)
    reference = adapter_reference(directory, role)
    if reference is None:
        return store
    return MergedStore(_base(plugin, reference["base"], base), store, spec_of(reference).scale)


def _base(plugin: ModelPlugin, saved: dict[str, Any], given: str | None) -> WeightStore:
    """The base weights that a checkpoint's adapters were trained on."""
    directory, source = saved["directory"], given or saved["init_from"]
    if given is None and directory is not None and Path(directory).is_dir():
        source = directory
    streams = Streams(saved["seed"])
    folder = saved["subfolder"] if source == saved["init_from"] else None
    store = open_weights(plugin, source, streams, saved["role"], folder)
    if fingerprint(store) != saved["fingerprint"]:
        raise CheckpointError(
            "holds other weights than the adapters were trained on.",
            remedy="Name the base with --base-weights.",
            where=str(source or "the fresh weights"),
        )
    return store


def find_checkpoint(source: str | Path) -> Path | None:
    """The step's directory that ``source`` names: itself, or the newest valid of a run folder.

    Returns:
        None where ``source`` is neither (a diffusers directory, a hub id).

    Raises:
        CheckpointError: a run folder without a valid checkpoint.
    """
    path = Path(source)
    if (path / commit.MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and commit.steps(folder):
            return commit.newest_valid(folder)
    return None


def open_weights(
    plugin: ModelPlugin, init_from: str | None, streams: Streams, role: str, subfolder: str | None
) -> WeightStore:
    """The store of a role's first weights, compared with what its network needs.

    Args:
        plugin: of the role.
        init_from: diffusers directory or hub id, checkpoint or run folder; None: fresh weights.
        streams: for fresh weights.
        role: the role's name.
        subfolder: of a diffusers directory.

    Raises:
        CheckpointError: names what is missing, superfluous or of another shape.
    """
    store: Any
    checkpoint = find_checkpoint(init_from) if init_from is not None else None
    if init_from is None:
        store = InitialStore(plugin, streams, role)
    elif checkpoint is not None:
        store = open_role(checkpoint, plugin, "student")
    else:
        store = DiffusersStore(getattr(plugin, "directory", None) or init_from, subfolder)
    store = completed(plugin, store)
    check_weights(plugin, store)
    return store
