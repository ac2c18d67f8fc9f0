"""Writes a diffusers directory tensor by tensor.

A safetensors file is a JSON header with byte ranges followed by the bytes, so every tensor has its
place before it is there, and can be written as soon as it arrives.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megagen.checkpoint.store import STEM
from megagen.models.base import ModelPlugin

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class DirectoryWriter:
    """A staged diffusers directory whose files are laid out before any tensor is there."""

    def __init__(
        self,
        plugin: ModelPlugin,
        directory: Path,
        dtypes: dict[str, torch.dtype],
        max_shard_bytes: int,
    ) -> None:
        self.directory = directory
        self.staged = directory.with_name(f".{directory.name}.staged-{os.getpid()}")
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir(parents=True)
        self.dtypes = dtypes
        shapes = plugin.tensor_shapes()
        groups = _shards(
            {n: math.prod(s) * dtypes[n].itemsize for n, s in shapes.items()}, max_shard_bytes
        )
        self.weight_map: dict[str, str] = {}
        self.offsets: dict[str, int] = {}
        self.files: dict[str, BinaryIO] = {}
        for number, names in enumerate(groups, start=1):
            file = f"{STEM}.safetensors"
            if len(groups) > 1:
                file = f"{STEM}-{number:05d}-of-{len(groups):05d}.safetensors"
            self._lay_out(file, names, shapes)
        self.total = sum(math.prod(shapes[n]) * dtypes[n].itemsize for n in shapes)
        self.missing = set(shapes)

    def _lay_out(self, file: str, names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> None:
        """Write a file's header and size it."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + math.prod(shapes[name]) * self.dtypes[name].itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[self.dtypes[name]],
                "shape": list(shapes[name]),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle = (self.staged / file).open("wb")
        handle.write(len(text).to_bytes(8, "little") + text)
        first = handle.tell()
        handle.truncate(first + end)
        self.files[file] = handle
        for name in names:
            self.weight_map[name] = file
            self.offsets[name] = first + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one whole tensor at its place."""
        handle = self.files[self.weight_map[name]]
        handle.seek(self.offsets[name])
        value = tensor.to(device="cpu", dtype=self.dtypes[name]).contiguous()
        handle.write(value.flatten().view(torch.uint8).numpy().data)
        self.missing.discard(name)

    def finish(self, plugin: ModelPlugin, base_dir: Path | None) -> None:
        """Write index and config, flush, and put the directory in place."""
        assert not self.missing, f"no parameter gave {sorted(self.missing)[:3]}"
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            _write_synced(self.staged / f"{STEM}.safetensors.index.json", _json(index))
        _write_synced(self.staged / "config.json", _config(plugin, base_dir))
        for handle in self.files.values():
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        self._put_in_place()

    def _put_in_place(self) -> None:
        old = self.directory.with_name(f".{self.directory.name}.old-{os.getpid()}")
        if self.directory.exists():
            self.directory.rename(old)
        self.staged.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)


def _config(plugin: ModelPlugin, base_dir: Path | None) -> bytes:
    """The base's ``config.json`` where there is one, else the plugin's.

    Keys of ours in it (``_causal``), which diffusers ignores, are the plugin's in any case.
    """
    config = plugin.diffusers_config()
    kept = base_dir / "config.json" if base_dir is not None else None
    if kept is None or not kept.is_file():
        return _json(config)
    own = {k: v for k, v in config.items() if k.startswith("_") and k != "_class_name"}
    known = json.loads(kept.read_bytes())
    return kept.read_bytes() if known | own == known else _json(known | own)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most ``limit`` bytes (one tensor may exceed it)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
