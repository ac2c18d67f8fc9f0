"""Features of a frozen transformer: what its blocks put out, for a discriminator.

Forward hooks append each block's output to the list ``module._fastgen_captured``; whoever ran the
forward drains it. Three things a bare hook does not do:

* Nothing is captured while autograd runs backward. Activation checkpointing runs a block a second
  time there, and its output would stay in the list and be taken for the next forward's.
* ``captured(...)`` can stop the gradient after the last captured block, so that later blocks build
  no graph, or end the forward there; and it finds the gradient of a block under reentrant
  checkpointing, which autograd ties to the block's output only when the hook is over.
* A deep copy of the module (a student, a fake score) captures into a list of its own, not into the
  original's, and only within ``captured(...)``, since nobody drains it otherwise.

Where a forward is sharded (FSDP2), attach after ``fully_shard``: the last hook may end the forward,
and sharding's own hook on the block must have run before that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from megagen.fastgen.network import first_tensor

__all__ = ["Taken", "attach", "captured", "detach", "drain", "pop_captured_features"]

_BUFFER = "_fastgen_captured"
_HANDLES = "_fastgen_capture_handles"
_STATE = "_fastgen_capture_state"


@dataclass
class Taken:
    """What ``captured`` took: ``features`` in call order, or None if nothing was ever attached."""

    features: list[Tensor] | None = None


@dataclass
class _State:
    """What the hooks of one module share."""

    buffer: list[Tensor] = field(default_factory=list)
    stop_gradient: bool = False
    early_exit: bool = False
    needs_grad: bool = False
    only_captured: bool = False
    late: dict[int, Callable[[], Tensor]] = field(default_factory=dict)
    """By position, features that are to be made anew once their block is left."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return _State(buffer=copy.deepcopy(self.buffer, memo), only_captured=True)


class _ForwardDone(Exception):
    """The last captured block has run, and the rest of the forward is not wanted."""

    def __init__(self, state: _State) -> None:
        super().__init__("the forward ended at its last captured block")
        self.state = state


class _Hook:
    """A block's forward hook.

    An object rather than a closure: a deep copy of the module copies it, and the state it shares
    with the other hooks, along.
    """

    def __init__(self, state: _State, extract: Callable[[Any], Tensor], is_last: bool) -> None:
        self.state, self.extract, self.is_last = state, extract, is_last

    def __call__(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        state = self.state
        if _in_backward() or state.only_captured:
            return None
        if state.needs_grad and not torch.is_grad_enabled():
            # Reentrant checkpointing: the output gets its graph when this hook is over, and none
            # if the hook ended the forward or gave another tensor on.
            state.late[len(state.buffer)] = partial(self.extract, output)
            state.buffer.append(self.extract(output))
            return None
        state.buffer.append(self.extract(output))
        if not self.is_last:
            return None
        if state.early_exit:
            raise _ForwardDone(state)
        if state.stop_gradient:
            return tree_map_only(Tensor, Tensor.detach, output)
        return None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def attach(
    module: nn.Module,
    blocks_attr: str,
    indices: Iterable[int],
    extract: Callable[[Any], Tensor] = first_tensor,
) -> list[RemovableHandle]:
    """Capture the outputs of some of a module's blocks at every forward from now on.

    Hooks that were attached before are removed first.

    Args:
        module: the transformer.
        blocks_attr: name of its sequence of blocks.
        indices: of blocks, each in [0, number of blocks); order and repetition do not count.
        extract: makes the feature of what a block returned. It may view, permute or copy, but not
            compute: under activation checkpointing it is not repeated in backward.

    Returns:
        The hooks' handles, which ``detach`` removes; it removes what is added to the list as well.

    Raises:
        AttributeError: the module has no ``blocks_attr``.
        TypeError: ``blocks_attr`` has no length.
        IndexError: an index outside the blocks.
    """
    detach(module)
    name = type(module).__name__
    blocks = getattr(module, blocks_attr, None)
    if blocks is None:
        raise AttributeError(
            f"{name} has no attribute {blocks_attr!r}: name its blocks with blocks_attr=..."
        )
    if not hasattr(blocks, "__len__"):
        raise TypeError(f"{name}.{blocks_attr} is {type(blocks).__name__}, not a sequence")
    chosen = sorted(set(indices))
    for index in chosen:
        if not 0 <= index < len(blocks):
            raise IndexError(f"{name} has blocks 0 to {len(blocks) - 1}, and no {index}")
    state = _State()
    handles = [
        blocks[index].register_forward_hook(_Hook(state, extract, index == chosen[-1]))
        for index in chosen
    ]
    setattr(module, _BUFFER, state.buffer)
    setattr(module, _STATE, state)
    setattr(module, _HANDLES, handles)
    return handles


def detach(teacher: nn.Module) -> None:
    """Remove what ``attach`` installed; without it, nothing happens."""
    for handle in getattr(teacher, _HANDLES, ()):
        handle.remove()
    for name in (_HANDLES, _STATE, _BUFFER):
        if hasattr(teacher, name):
            delattr(teacher, name)


def _hooked(module: nn.Module) -> nn.Module:
    """What ``attach`` was called with: ``module``, or what it wraps (as data parallel does)."""
    inner: nn.Module | None = module
    while inner is not None:
        if hasattr(inner, _BUFFER):
            return inner
        inner = getattr(inner, "module", None)
    return module


def drain(module: nn.Module) -> list[Tensor] | None:
    """The captured features in call order, which are then forgotten; None if never attached."""
    buffer = getattr(_hooked(module), _BUFFER, None)
    if buffer is None:
        return None
    taken = list(buffer)
    buffer.clear()
    return taken


def pop_captured_features(teacher: nn.Module) -> list[Tensor]:
    """As ``drain``, for a module that must have hooks.

    Raises:
        RuntimeError: nothing was ever attached.
    """
    features = drain(teacher)
    if features is None:
        raise RuntimeError(
            f"{type(teacher).__name__} captures no features: call attach_feature_capture first"
        )
    return features


@contextmanager
def captured(
    module: nn.Module,
    stop_gradient: bool = True,
    early_exit: bool = False,
    needs_grad: bool = False,
) -> Iterator[Taken]:
    """Take the features of the one forward of ``module`` within this block.

        with captured(teacher, early_exit=True) as taken:
            teacher(x_t, t)
        taken.features  # [tensor of the first captured block, ...]

    Features left over from an earlier forward are dropped on the way in, and if the block raises,
    its own are too. With a module whose ``_fastgen_captured`` somebody else's hooks fill, the list
    is drained and no more: ``stop_gradient``, ``early_exit`` and ``needs_grad`` do nothing.

    Under reentrant activation checkpointing with ``needs_grad``, neither ``stop_gradient`` nor
    ``early_exit`` has an effect, and gradients come by ``backward()`` alone, as everywhere there.

    Args:
        module: what ``attach`` was called with.
        stop_gradient: what leaves the last captured block is detached: features keep their
            gradient, and the blocks behind build no graph for it.
        early_exit: the forward ends at the last captured block; statements of the ``with`` block
            behind it do not run.
        needs_grad: features are to carry a gradient where grad mode is on.

    Raises:
        RuntimeError: ``needs_grad``, and blocks ran without grad mode and got no graph later, as
            where one reentrant checkpoint covers more than the block.
    """
    state: _State | None = getattr(_hooked(module), _STATE, None)
    taken = Taken()
    if state is None:
        yield taken
        taken.features = drain(module)
        return
    needs_grad = needs_grad and torch.is_grad_enabled()
    with _armed(state, stop_gradient, early_exit, needs_grad):
        try:
            yield taken
        except _ForwardDone as done:
            if done.state is not state:  # of another module's forward, around this one
                raise
        taken.features = [
            state.late[position]() if position in state.late else feature
            for position, feature in enumerate(state.buffer)
        ]
        if any(taken.features[position].grad_fn is None for position in state.late):
            raise RuntimeError(
                f"{type(module).__name__}'s features carry no gradient, since its blocks ran "
                "without grad mode, as they do within a reentrant activation checkpoint: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or a checkpoint of "
                "each block alone"
            )


@contextmanager
def _armed(
    state: _State, stop_gradient: bool, early_exit: bool, needs_grad: bool
) -> Iterator[None]:
    """The hooks do as told within this block, which begins and ends with nothing captured."""
    before = state.stop_gradient, state.early_exit, state.needs_grad, state.only_captured
    state.stop_gradient, state.early_exit, state.needs_grad = stop_gradient, early_exit, needs_grad
    state.only_captured = False
    state.buffer.clear()
    state.late.clear()
    try:
        yield
    finally:
        state.stop_gradient, state.early_exit, state.needs_grad, state.only_captured = before
        state.buffer.clear()
        state.late.clear()
