"""Weights and buffers from a module or a state dict into a module, whatever is sharded how.

See ``factory.load_fake_score_weights``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.fastgen.sharding import clean_name, copy_into, is_sharded, reshard


def plain_name(name: str) -> str:
    """``name`` without the prefixes of activation checkpointing and torch.compile."""
    return clean_name(name).replace("_orig_mod.", "")


@torch.no_grad()
def load_weights(
    target: nn.Module,
    source: nn.Module | Mapping[str, Tensor],
    *,
    strict: bool,
    device: torch.device | str | None,
    from_rank0: bool,
) -> None:
    """Fill ``target``; see ``factory.load_fake_score_weights``."""
    reshard(target)
    if isinstance(source, nn.Module):
        reshard(source)
    values: _Values | _Sent = _Sent(source) if from_rank0 else _Values(source)
    _check_names(target, values, strict)
    _materialise(target, None if device is None else torch.device(device), values.device())
    for names, tensor in _entries(target):
        name = next((name for name in names if name in values), None)
        if name is not None:
            values.into(tensor, name)


class _Values:
    """The source's tensors by plain name."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        self._source: Mapping[str, Tensor]
        self._keys: dict[str, str]
        if isinstance(source, nn.Module):
            self._source = dict(_named_tensors(source))
            volatile = {plain_name(name) for name in self._source} - _persistent(source)
        else:
            self._source = source
            volatile = set()
        self._keys = {plain_name(name): name for name in self._source}
        self.expected = self._keys.keys() - volatile
        """Names that a target of the same structure has."""

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._keys[name]]

    def names(self) -> list[str]:
        return list(self._keys)

    def device(self) -> torch.device:
        """Where the first tensor lies."""
        return self[next(iter(self._keys))].device if self._keys else torch.device("cpu")

    def into(self, target: Tensor, name: str) -> None:
        copy_into(target, self[name], name)


class _Form(NamedTuple):
    """What the other ranks must know of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    is_sharded: bool


class _Sent:
    """Global rank 0's tensors by plain name, sent as they are asked for: by all ranks in step."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        self._values = _Values(source) if dist.get_rank() == 0 else None
        message: list[Any] = [None, None]
        if self._values is not None:
            found = ((name, self._values[name]) for name in self._values.names())
            forms = {name: _Form(x.shape, x.dtype, is_sharded(x)) for name, x in found}
            message = [forms, set(self._values.expected)]
        dist.broadcast_object_list(message, src=0)
        self._forms: dict[str, _Form] = message[0]
        self.expected: set[str] = message[1]
        sharded = [name for name, form in self._forms.items() if form.is_sharded]
        if sharded:
            raise ValueError(f"from_rank0 needs whole tensors; sharded: {sharded[:3]}")

    def __contains__(self, name: str) -> bool:
        return name in self._forms

    def device(self) -> torch.device:
        """Where the process group communicates."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or dist.get_backend() == "gloo":
            return torch.device("cpu")
        return accelerator

    def into(self, target: Tensor, name: str) -> None:
        form = self._forms[name]
        if form.shape != target.shape:
            raise RuntimeError(
                f"{name}: cannot copy shape {tuple(form.shape)} into {tuple(target.shape)}."
            )
        place = self.device()
        if self._values is not None:
            whole = self._values[name].detach().to(place, target.dtype).contiguous()
        else:
            whole = torch.empty(form.shape, dtype=target.dtype, device=place)
        # whole to all: scattering does not know every placement (FSDP2 over tensor parallelism)
        dist.broadcast(whole, src=0)
        copy_into(target, whole, name)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _persistent(module: nn.Module) -> set[str]:
    return {plain_name(name) for name in module.state_dict(keep_vars=True)}


def _entries(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each parameter and buffer once, with all its plain names."""
    tensors = dict(_named_tensors(module))
    return [
        ([plain_name(name) for name in names], tensors[names[0]])
        for names in _grouped(tensors.items())
    ]


def _grouped(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Names by the tensor they stand for."""
    groups: dict[int, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _check_names(target: nn.Module, values: _Values | _Sent, strict: bool) -> None:
    persistent = _persistent(target)
    entries = _entries(target)
    missing = [
        names[0]
        for names, tensor in entries
        if not any(name in values for name in names)
        and (tensor.is_meta or (strict and not persistent.isdisjoint(names)))
    ]
    known = {name for names, _ in entries for name in names}
    unexpected = sorted(values.expected - known) if strict else []
    if missing or unexpected:
        raise RuntimeError(
            f"the teacher's weights do not fit the fake score: missing {missing}, "
            f"unexpected {unexpected}."
        )


def _materialise(module: nn.Module, device: torch.device | None, source: torch.device) -> None:
    """Memory for what is on the meta device, one memory for what is shared."""
    named = list(_named_tensors(module))
    if not any(tensor.is_meta for _, tensor in named):
        return
    meshes = (tensor.device_mesh.device_type for _, tensor in named if is_sharded(tensor))
    mesh = next((torch.device(kind) for kind in meshes), None)
    shared = [names for names in _grouped(named) if len(names) > 1]

    def real(tensor: Tensor) -> Tensor:
        place = (device or mesh if is_sharded(tensor) else mesh or device) or source
        if tensor.is_meta:
            return torch.empty_like(tensor, device=place)
        return tensor if is_sharded(tensor) else tensor.to(place)

    module._apply(real)  # as nn.Module.to_empty, but what has values keeps them
    for first, *others in shared:
        owner, _, leaf = first.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        for other in others:
            owner, _, leaf = other.rpartition(".")
            setattr(module.get_submodule(owner), leaf, tensor)
