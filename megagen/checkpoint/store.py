"""Sets of named tensors that are read shard by shard: a diffusers directory, fresh weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagen.core.errors import CheckpointError
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.models.base import ModelPlugin, WeightStore
from megagen.models.hub import component_directory, read_json

log = get_logger(__name__)

STEM = "diffusion_pytorch_model"
_GATED = (
    "They were trained with sparse attention: set attention: {backend: vsa, vsa: {sparsity: ...}} "
    "for this role (sparsity 0 keeps its attention dense)."
)
IGNORED = re.compile(r"\.norm_added_q\.")
"""Tensors that published checkpoints hold and no network reads (diffusers ignores them too)."""


class DiffusersStore:
    """The tensors of a diffusers directory, in one safetensors file or several with an index.

    Args:
        path: the transformer's directory, or a pipeline's directory or hub id with a folder for it.
        subfolder: that folder. Default ``transformer`` where there is one.

    Raises:
        CheckpointError: no such directory, no weights in it, a file that the index names is
            missing.
    """

    def __init__(self, path: str | Path, subfolder: str | None = None) -> None:
        self.directory = component_directory(
            path, subfolder, "transformer", ["config.json", f"{STEM}*.safetensors*"]
        )
        self._files = self._read_index()
        self._open: dict[str, Any] = {}

    def _read_index(self) -> dict[str, str]:
        """Tensor name to file name."""
        index = self.directory / f"{STEM}.safetensors.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(
                    "has no weight_map.", remedy="Fetch it again.", where=str(index)
                )
            for file in sorted(set(files.values())):
                if not (self.directory / file).is_file():
                    raise CheckpointError(
                        f"names {file!r}, which is not there.",
                        remedy="Fetch the directory again; a file is missing.",
                        where=str(index),
                    )
            return files
        single = self.directory / f"{STEM}.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"holds neither {single.name} nor {index.name}.",
                remedy="Give a diffusers directory with safetensors weights.",
                where=str(self.directory),
            )
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single.name)

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self._files)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.directory / self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole), in the stored dtype."""
        stored = self._slice(name)
        index: list[slice] = [slice(None)] * len(stored.get_shape())
        if dim is not None:
            size = stored.get_shape()[dim] // num_parts
            index[dim] = slice(part * size, (part + 1) * size)
        if not index:
            return self._file(name).get_tensor(name)
        try:
            return stored[tuple(index)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name!r} cannot be read ({error}).",
                remedy="Fetch the file again.",
                where=str(self.file(name)),
            ) from None

    def _file(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _opened(self.directory / file)
        return self._open[file]

    def _slice(self, name: str) -> Any:
        try:
            return self._file(name).get_slice(name)
        except SafetensorError:
            raise CheckpointError(
                f"the index says that it holds {name!r}, which it does not.",
                remedy="Fetch the directory again.",
                where=str(self.file(name)),
            ) from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"not a readable safetensors file ({error}).",
            remedy="Fetch it again; it may be cut short.",
            where=str(path),
        ) from None


class InitialStore:
    """Fresh weights: each diffusers tensor from its own stream, so the same under every layout.

    Args:
        plugin: its tensors and their initial distributions.
        streams: of the run.
        role_name: roles start differently.
    """

    def __init__(self, plugin: ModelPlugin, streams: Streams, role_name: str) -> None:
        self.plugin, self.streams, self.role_name = plugin, streams, role_name

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.plugin.tensor_shapes()

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole), fp32."""
        generator = self.streams.generator("init", self.role_name, name)
        tensor = self.plugin.initial_tensor(name, self._shapes[name], generator)
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]


class CompletedStore:
    """A store with zeros for what it lacks of a network (``ModelPlugin.may_start_at_zero``).

    Args:
        store: the other tensors.
        shapes: of those that it lacks.
    """

    def __init__(self, store: WeightStore, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.store, self._shapes = store, dict(shapes)
        self.directory = getattr(store, "directory", "the weight store")

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        yield from self.store.names()
        yield from self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name] if name in self._shapes else self.store.shape(name)

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole)."""
        if name not in self._shapes:
            return self.store.read(name, dim, part, num_parts)
        tensor = torch.zeros(self._shapes[name])
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]


def completed(plugin: ModelPlugin, store: WeightStore) -> WeightStore:
    """The store, with zeros for tensors that may start so where it holds none of them."""
    shapes = {n: s for n, s in plugin.tensor_shapes().items() if plugin.may_start_at_zero(n)}
    if not shapes or not shapes.keys().isdisjoint(store.names()):
        return store
    log.info("%d tensors that the weights lack start at zero (%s...)", len(shapes), min(shapes))
    return CompletedStore(store, shapes)


def check_weights(plugin: ModelPlugin, store: WeightStore) -> None:
    """Compare a store's names and shapes with the whole network's; only headers are read.

    Raises:
        CheckpointError: tensors missing, unexpected or of another shape, each with its file.
    """
    expected = plugin.tensor_shapes()
    found = [name for name in store.names() if not IGNORED.search(name)]
    place = str(getattr(store, "directory", "the weight store"))
    remedy = "Give the weights of this architecture, or leave architecture out."
    missing = sorted(expected.keys() - set(found))
    if missing:
        raise CheckpointError(
            f"{_listed(missing)} missing (the first should be {list(expected[missing[0]])}).",
            remedy=remedy,
            where=place,
        )
    unexpected = sorted(set(found) - expected.keys())
    if unexpected:
        is_gated = all(plugin.may_start_at_zero(name) for name in unexpected)
        raise CheckpointError(
            f"{_listed(unexpected)} not expected by the network.",
            remedy=_GATED if is_gated else remedy,
            where=str(_file(store, unexpected[0])),
        )
    for name, shape in expected.items():
        if store.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name!r} is {list(store.shape(name))}, the network expects {list(shape)}.",
                remedy=remedy,
                where=str(_file(store, name)),
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    if len(names) == 1:
        return f"tensor {shown} is"
    return f"tensors {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''} are"


def _file(store: WeightStore, name: str) -> Any:
    return store.file(name) if isinstance(store, DiffusersStore) else "the weight store"
