"""ODE paths of a teacher on disk: one file a sample, and a manifest of what they were made with.

    folder/paths.json                   provenance, timesteps of the states, notes
    folder/samples/00000012.safetensors states_KCTHW and x0_CTHW, with id, caption and a digest

A sample is written beside its place, fsynced and renamed: it is there whole or not at all, so what
is missing is what a run that was killed did not make. What a disk spoils later is found by the size
when a run starts and by the digest whenever a sample is read.

Legend: K states, C channels, T latent frames, H W latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megagen.core.errors import ConfigError, DataError
from megagen.core.options import StrictOptions, parse_options
from megagen.data.manifest import write_json

MANIFEST = "paths.json"
STATES, END, FACTS = "states_KCTHW", "x0_CTHW", "path"

PathDtype = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAME = 1e-3
"""Timesteps no further apart are one."""


class CacheManifest(StrictOptions):
    """Everything in ``paths.json``.

    Attributes:
        provenance: what decides the numbers; a run that would make others is refused.
        timesteps: of the states in every sample, in 0..1000, going down.
        notes: where things came from; not compared.
    """

    format: Literal["megagen-ode-paths"] = "megagen-ode-paths"
    version: Literal[1] = 1
    provenance: dict[str, Any]
    timesteps: list[float]
    notes: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class PathSample:
    """One path.

    Args:
        key: number of the sample in the dataset.
        id: its id there.
        caption: its caption.
        states_KCTHW: x at each of the cache's timesteps, normalised.
        x0_CTHW: the path's end, normalised.
    """

    key: int
    id: str
    caption: str
    states_KCTHW: Tensor
    x0_CTHW: Tensor


class OdeCache:
    """The samples of one directory.

    Args:
        folder: with a manifest in it.
        timesteps: of the states.
    """

    def __init__(self, folder: Path, timesteps: Sequence[float]) -> None:
        self.folder, self.timesteps = folder, tuple(timesteps)

    def path(self, key: int) -> Path:
        """The file of a sample."""
        return self.folder / "samples" / f"{key:08d}.safetensors"

    def missing(self, keys: Iterable[int], *, verify: bool = False) -> list[int]:
        """The keys whose files are not there or not whole.

        Args:
            keys: of the samples wanted.
            verify: read every file and compare its digest; else only its size.
        """
        return [key for key in keys if not self._is_whole(key, verify)]

    def write(self, sample: PathSample, dtype: PathDtype) -> None:
        """Put a sample in its place, atomically."""
        tensors = {
            STATES: sample.states_KCTHW.to("cpu", DTYPES[dtype]).contiguous(),
            END: sample.x0_CTHW.to("cpu", DTYPES[dtype]).contiguous(),
        }
        facts = {"key": str(sample.key), "id": sample.id, "caption": sample.caption}
        target = self.path(sample.key)
        temporary = target.with_name(f".{target.name}.tmp")
        with temporary.open("wb") as file:
            # one key, for safetensors writes several in any order
            text = json.dumps({**facts, "digest": _digest(facts, tensors)}, ensure_ascii=False)
            file.write(save(tensors, metadata={FACTS: text}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)

    def read(self, key: int, timesteps: Sequence[float]) -> PathSample:
        """A sample with its states at ``timesteps``, fp32.

        Raises:
            DataError: it is not there, or is not what was written.
        """
        tensors, facts = self._load(key)
        chosen = [self.place(timestep) for timestep in timesteps]
        return PathSample(
            key=key,
            id=facts["id"],
            caption=facts["caption"],
            states_KCTHW=tensors[STATES][chosen].float(),
            x0_CTHW=tensors[END].float(),
        )

    def has(self, timestep: float) -> bool:
        """Whether samples have a state at a timestep."""
        return any(abs(own - timestep) <= _SAME for own in self.timesteps)

    def place(self, timestep: float) -> int:
        """Which state is that at a timestep.

        Raises:
            DataError: none.
        """
        found = [i for i, own in enumerate(self.timesteps) if abs(own - timestep) <= _SAME]
        if found:
            return found[0]
        raise DataError(
            f"has no state at timestep {timestep:g}; it has "
            f"{', '.join(f'{t:g}' for t in self.timesteps)}.",
            remedy="Choose among these, or another folder, in which new paths are made.",
            where=str(self.folder / MANIFEST),
        )

    def _load(self, key: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.path(key)
        try:
            data = path.read_bytes()  # not mapped: another process may put a new file there
            tensors = load(data)
            facts: dict[str, str] = json.loads(_header(data)["__metadata__"][FACTS])
            if facts.pop("digest") != _digest(facts, tensors) or facts["key"] != str(key):
                raise ValueError("its digest is not that of its content")
        except FileNotFoundError:
            raise DataError(
                "is missing.",
                remedy="Start the run again with its teacher, which makes it; all ranks must see "
                "one directory.",
                where=str(path),
            ) from None
        except (OSError, SafetensorError, KeyError, ValueError, struct.error) as error:
            raise DataError(
                f"is corrupt ({error}).",
                remedy="Delete it and start the run again with its teacher, which makes it anew.",
                where=str(path),
            ) from None
        return tensors, facts

    def _is_whole(self, key: int, verify: bool) -> bool:
        if not verify:
            return _has_its_size(self.path(key))
        try:
            self._load(key)
        except DataError:
            return False
        return True


def open_cache(
    folder: Path,
    provenance: Mapping[str, Any],
    timesteps: Sequence[float],
    notes: Mapping[str, Any],
) -> OdeCache:
    """The cache in ``folder``; begun where there is none. One process calls this.

    Args:
        folder: to make, or made.
        provenance: JSON values; keys that this run does not know are left out.
        timesteps: that are wanted; an older cache may hold more.
        notes: JSON values.

    Raises:
        DataError: it was made otherwise (names the key and both values), or cannot be understood.
    """
    wanted = json.loads(json.dumps(dict(provenance)))
    if not (folder / MANIFEST).is_file():
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        manifest = CacheManifest(
            provenance=wanted, timesteps=list(timesteps), notes=json.loads(json.dumps(dict(notes)))
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        return OdeCache(folder, timesteps)
    found = read_manifest(folder)
    for key, value in wanted.items():
        _compare(folder, key, found.provenance.get(key), value)
    cache = OdeCache(folder, found.timesteps)
    for timestep in timesteps:
        cache.place(timestep)
    return cache


def read_manifest(folder: Path) -> CacheManifest:
    """The manifest of a cache.

    Raises:
        DataError: it is not there or cannot be understood.
    """
    path = folder / MANIFEST
    try:
        return parse_options(CacheManifest, json.loads(path.read_text()), "")
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(
            f"cannot be understood ({error}).",
            remedy="Delete the folder, or choose another one.",
            where=str(path),
        ) from None


def _compare(folder: Path, key: str, found: Any, wanted: Any) -> None:
    """Raise ``DataError`` for the first value that differs, named by its path of keys."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for inner in {**found, **wanted}:
            _compare(folder, f"{key}.{inner}", found.get(inner), wanted.get(inner))
    elif found != wanted:
        raise DataError(
            f"its paths were made with {key} {found!r}, this run has {wanted!r}.",
            remedy="Choose another method.teacher_path_cache, or what these were made with.",
            where=str(folder / MANIFEST),
        )


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(facts):
        digest.update(f"{name}\x1f{facts[name]}\x1e".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header(data: bytes) -> dict[str, Any]:
    """Of a safetensors file, which begins with its length."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def _has_its_size(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
            (length,) = struct.unpack("<Q", begin)
            size = os.fstat(file.fileno()).st_size
            header = _header(begin + file.read(min(length, size)))
        ends = [v["data_offsets"][1] for name, v in header.items() if name != "__metadata__"]
        return bool(ends) and 8 + length + max(ends) == size
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False
