"""States that a role's chunks are in for the duration of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


@contextlib.contextmanager
def evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """``eval()``, and back."""
    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, before, strict=True):
            chunk.train(training)


@contextlib.contextmanager
def frozen(chunks: Sequence[nn.Module], ddp: Sequence[Any]) -> Iterator[None]:
    """No parameter asks for a gradient, and the hooks that DDP has on forwards are off.

    Args:
        chunks: unwrapped.
        ddp: the same wrapped; empty where they are not trainable.
    """
    hooked = [wrapped for wrapped in ddp if wrapped.use_forward_hook]
    parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    for wrapped in hooked:
        wrapped.disable_forward_pre_hook()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for wrapped in hooked:
            wrapped.enable_forward_pre_hook()


@contextlib.contextmanager
def no_sync(ddp: Sequence[Any], config: Any, *, active: bool) -> Iterator[None]:
    """Backward passes inside reduce no gradients, not even the last one.

    Args:
        ddp: wrapped chunks.
        config: theirs; its own hook is set aside, since it would end with the last micro-batch.
        active: False: nothing changes.
    """
    if not active:
        yield
        return
    hook, config.no_sync_func = config.no_sync_func, None
    try:
        with contextlib.ExitStack() as stack:
            for wrapped in ddp:
                stack.enter_context(wrapped.no_sync())
            yield
    finally:
        config.no_sync_func = hook
