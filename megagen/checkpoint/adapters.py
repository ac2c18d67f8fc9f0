"""Adapters on disk: fresh ones, diffusers/PEFT files, and a base with adapters merged in.

A file is what diffusers' ``save_lora_weights`` writes: ``pytorch_lora_weights.safetensors`` with
``transformer.<module>.lora_A.weight`` and ``.lora_B.weight``, and PEFT's config as JSON in its
metadata, which carries alpha.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megagen.core.errors import CheckpointError
from megagen.core.streams import Streams
from megagen.models.adapters import AdapterSpec, adapted_modules, adapter_shapes
from megagen.models.base import ModelPlugin, WeightStore

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
PREFIX = "transformer."


class InitialAdapters:
    """Fresh adapters: A kaiming-uniform (a = sqrt 5, so within ``1 / sqrt(in)``), B zero.

    Each tensor comes from its own stream, so it is the same under every layout.

    Args:
        plugin: of the network.
        spec: which adapters.
        streams: of the run.
        role: its name; roles start differently.
    """

    def __init__(self, plugin: ModelPlugin, spec: AdapterSpec, streams: Streams, role: str) -> None:
        self._shapes = adapter_shapes(plugin, adapted_modules(plugin, spec), spec.rank)
        self._streams, self._role = streams, role

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole), fp32."""
        tensor = torch.zeros(self._shapes[name])
        if ".lora_A." in name:
            bound = 1 / math.sqrt(tensor.size(1))
            generator = self._streams.generator("init", self._role, name)
            tensor.uniform_(-bound, bound, generator=generator)
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]


class AdapterFile:
    """The adapters of a diffusers/PEFT file, as adapters of ``spec``.

    Where the file's alpha / rank is another than ``spec``'s, B is scaled so that the network is the
    same.

    Args:
        path: the file, or its directory.
        plugin: of the network.
        spec: rank and modules that it must have.
        where: config key, for errors.

    Raises:
        CheckpointError: no such file, or other modules or another rank in it.
    """

    def __init__(
        self, path: str | Path, plugin: ModelPlugin, spec: AdapterSpec, where: str
    ) -> None:
        file = Path(path).expanduser()
        self.path = file / FILE if file.is_dir() else file
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{str(self.path)!r} is no readable safetensors file ({error}).",
                remedy=f"Give a directory with {FILE}, or such a file.",
                where=where,
            ) from None
        keys = {_plain(key): key for key in self._file.keys()}  # noqa: SIM118
        self._alphas = {name: keys.pop(name) for name in list(keys) if name.endswith(".alpha")}
        self._keys = keys
        self._shapes = adapter_shapes(plugin, adapted_modules(plugin, spec), spec.rank)
        self._check(where)
        config = json.loads((self._file.metadata() or {}).get(METADATA, "{}"))
        self._alpha: float | None = config.get(f"{PREFIX}lora_alpha", config.get("lora_alpha"))
        self._spec = spec

    def _check(self, where: str) -> None:
        wrong = sorted(self._keys.keys() ^ self._shapes.keys())
        if wrong:
            lacking = "has no" if wrong[0] in self._shapes else "has a"
            raise CheckpointError(
                f"{str(self.path)!r} {lacking} tensor {wrong[0]!r}"
                f"{f' and {len(wrong) - 1} more differences' if len(wrong) > 1 else ''}.",
                remedy="Set target_modules and exclude_modules as it was trained with.",
                where=where,
            )
        for name, shape in self._shapes.items():
            found = tuple(self._file.get_slice(self._keys[name]).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{str(self.path)!r} has {name!r} as {list(found)}, not {list(shape)}.",
                    remedy="Set rank as it was trained with, and the model of its base.",
                    where=where,
                )

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._shapes[name]

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole)."""
        tensor = self._file.get_tensor(self._keys[name])
        if ".lora_B." in name:
            factor = self._file_scale(name) / self._spec.scale
            tensor = tensor if factor == 1 else tensor.float() * factor
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]

    def _file_scale(self, name: str) -> float:
        key = self._alphas.get(name.partition(".lora_B.")[0] + ".alpha")
        if key is not None:
            return float(self._file.get_tensor(key)) / self._spec.rank
        return (self._alpha / self._spec.rank) if self._alpha is not None else 1.0


def _plain(key: str) -> str:
    """A key of a file as diffusers names the module in the transformer."""
    key = re.sub(r"^(base_model\.model\.|transformer\.|transformer_2\.)", "", key)
    key = key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
    return re.sub(r"\.lora_([AB])\.\w+\.weight$", r".lora_\1.weight", key)


def write_adapters(
    directory: Path, store: WeightStore, spec: AdapterSpec, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters of ``store`` for diffusers' ``load_lora_weights``.

    Args:
        directory: to make.
        store: all of a network's adapters.
        spec: rank and alpha.
        dtype: of the file; None: as stored.
    """
    tensors = {}
    for name in store.names():
        tensor = store.read(name, None, 0, 1)
        tensors[PREFIX + name] = tensor.to(dtype or tensor.dtype).contiguous()
    modules = sorted({name.partition(".lora_")[0] for name in store.names()})
    config = {"r": spec.rank, "lora_alpha": spec.alpha, "target_modules": modules}
    packed = json.dumps({PREFIX + key: value for key, value in config.items()}, sort_keys=True)
    directory.mkdir(parents=True, exist_ok=True)
    staged = directory / f".{FILE}.staged-{os.getpid()}"
    save_file(tensors, staged, metadata={"format": "pt", METADATA: packed})
    staged.rename(directory / FILE)


class MergedStore:
    """``W + (alpha / rank) B A`` of a base and its adapters, in fp32, one tensor at a time.

    Args:
        base: the base's tensors.
        adapters: the adapters'.
        scale: ``alpha / rank``.
    """

    def __init__(self, base: WeightStore, adapters: WeightStore, scale: float) -> None:
        self.base, self.adapters, self.scale = base, adapters, scale
        self._adapted = set(adapters.names())

    def names(self) -> Iterator[str]:
        """The base's names."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of the base's tensor."""
        return dtype_of(self.base, name)

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """Part ``part`` of ``num_parts`` along ``dim`` (None: the whole)."""
        weight = self.base.read(name, dim, part, num_parts)
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self._adapted:
            return weight
        place = {d: (d, part, num_parts) if dim == d else (None, 0, 1) for d in (0, 1)}
        a = self.adapters.read(f"{module}.lora_A.weight", *place[1]).float()
        b = self.adapters.read(f"{module}.lora_B.weight", *place[0]).float()
        return weight.float() + self.scale * (b @ a)


def dtype_of(store: WeightStore, name: str) -> torch.dtype:
    """The type that a tensor is stored in; one row of it is read."""
    own = getattr(store, "dtype", None)
    return own(name) if own is not None else _row(store, name).dtype


def _row(store: WeightStore, name: str) -> Tensor:
    shape = store.shape(name)
    return store.read(name, 0, 0, shape[0]) if shape else store.read(name, None, 0, 1)


def fingerprint(store: WeightStore) -> str:
    """A digest of every tensor's name, shape and first row: other weights, another digest."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(store.names()):
        row = _row(store, name).float().contiguous()
        digest.update(f"{name}{tuple(store.shape(name))}".encode())
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def spec_of(reference: Mapping[str, Any]) -> AdapterSpec:
    """The adapters that a checkpoint's ``trainer.json`` speaks of."""
    return AdapterSpec(reference["rank"], reference["alpha"], tuple(reference["modules"]), ())


def make_reference(
    plugin: ModelPlugin, spec: AdapterSpec, base: Mapping[str, Any], store: WeightStore
) -> dict[str, Any]:
    """What a checkpoint says of a role's adapters and of the base that they belong to.

    Args:
        plugin: of the network.
        spec: the adapters.
        base: ``init_from``, ``subfolder``, and ``seed`` and ``role`` of fresh weights.
        store: the base's tensors.
    """
    return {
        "rank": spec.rank,
        "alpha": spec.alpha,
        "modules": list(adapted_modules(plugin, spec)),
        "base": {**base, "fingerprint": fingerprint(store)},
    }


def check_reference(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None, role: str, where: str
) -> None:
    """Raise ``CheckpointError`` unless a checkpoint's adapters are those of this run."""
    if saved is None or now is None:
        if saved is not now:
            has, wants = ("adapters", "none") if saved else ("no adapters", "them")
            raise CheckpointError(
                f"its role {role!r} has {has}, this run has {wants}.",
                remedy=f"Resume with models.{role}.lora as it was.",
                where=where,
            )
        return
    for key in ("rank", "alpha", "modules"):
        if saved[key] != now[key]:
            shown = [_shown(side[key]) for side in (saved, now)]
            raise CheckpointError(
                f"adapters of {role!r} have {key} {shown[0]} there, {shown[1]} in this run.",
                remedy=f"Resume with models.{role}.lora as it was.",
                where=where,
            )
    if saved["base"]["fingerprint"] != now["base"]["fingerprint"]:
        raise CheckpointError(
            f"adapters of {role!r} were trained on other base weights "
            f"({saved['base']['init_from'] or 'fresh ones'}).",
            remedy=f"Resume with models.{role}.init_from as it was.",
            where=where,
        )


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} modules from {value[0]!r} to {value[-1]!r}"
    return str(value)
