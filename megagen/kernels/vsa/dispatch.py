"""Which backend computes what, and why.

``auto`` asks the backends of the tensors' device in order and takes the first that serves them; the
choice and what stood against the others is logged once for each kind of tensors. Where every block
is selected and a device's dense kernel is the faster one, attention is dense: the same numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megagen.core.log import get_logger

log = get_logger(__name__)

NAMES = ("cuda", "triton", "cpu", "reference")
_ORDER = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
"""The CUDA kernels come after Triton's until a GPU has run them; by name they can be had now."""

_DENSE_IS_FASTER = ("cuda",)
"""Devices whose dense kernel beats the block-sparse one with all blocks selected.

On the CPU the block-sparse kernel is the faster one (``python -m benchmarks.kernels``).
"""


def backend(name: str) -> ModuleType:
    """A backend's module; a function that it lacks is ``reference``'s (see ``function``)."""
    return importlib.import_module(f"megagen.kernels.vsa.backends.{name}")


def function(name: str, operation: str) -> Callable[..., Any]:
    """An operation of a backend, the reference's where it has none of its own."""
    own = getattr(backend(name), operation, None)
    found: Callable[..., Any] = own or getattr(backend("reference"), operation)
    return found


@torch.compiler.assume_constant_result
def has(name: str, operation: str) -> bool:
    """Whether a backend has an operation of its own; some are optional."""
    return hasattr(backend(name), operation)


def choose(wanted: str, q: Tensor) -> str:
    """The backend for tensors like ``q`` ``[..., D]``.

    Args:
        wanted: ``auto`` or one of ``NAMES``.
        q: queries; only device, dtype and head dim count.

    Raises:
        ValueError: unknown, or it does not serve such tensors; the message says why.
    """
    return _choice(wanted, q.device, q.dtype, q.size(-1))


@torch.compiler.assume_constant_result
def _choice(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return _choose(wanted, device, dtype, head_dim)


@lru_cache(maxsize=64)
def _choose(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if wanted not in ("auto", *NAMES):
        raise ValueError(f"backend must be auto or one of {', '.join(NAMES)}, found {wanted!r}")
    if device.type == "meta":
        return "reference"
    like = torch.empty(head_dim, dtype=dtype, device=device)
    if wanted != "auto":
        reason = backend(wanted).serves(like)
        if reason is not None:
            raise ValueError(f"backend {wanted!r} does not serve these tensors: {reason}")
        return wanted
    reasons: list[str] = []
    for name in _ORDER.get(device.type, ()):
        reason = backend(name).serves(like)
        if reason is None:
            _announce(name, like, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    _announce("reference", like, reasons)
    return "reference"


def _announce(name: str, like: Tensor, reasons: list[str]) -> None:
    kind = f"{like.dtype} with head dim {like.numel()} on {like.device}"
    against = f" ({'; '.join(reasons)})" if reasons else ""
    log.info("video sparse attention of %s runs on the %s backend%s", kind, name, against)


def is_dense(device_type: str, num_selected: int, num_key_blocks: int) -> bool:
    """Whether all blocks are selected and the device's dense kernel is the faster one."""
    return num_selected >= num_key_blocks and device_type in _DENSE_IS_FASTER
