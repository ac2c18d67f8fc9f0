"""Captured features: under recomputation, with the gradient stopped, with the forward ended.

The reference is a loop over the blocks of the same network without any hook.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megagen.fastgen.features import (
    attach,
    captured,
    detach,
    drain,
    pop_captured_features,
)
from megagen.fastgen.network import first_tensor

WIDTH, BLOCKS = 6, 5
INDICES = [3, 1, 3]

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


class Stack(nn.Module):
    """Frozen blocks in a row, each counting its calls; their outputs as ``wrap`` gives them."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)]
        )
        for block in self.blocks:
            block.register_forward_hook(self._count)
            block.register_forward_hook(lambda _block, _inputs, output: wrap(output))
        self.calls: list[nn.Module] = []
        self.reentrant: bool | None = None
        self.requires_grad_(False).double()

    def _count(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.calls.append(block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                # without early stop, the hooks run again in backward
                with set_checkpoint_early_stop(False):
                    x = checkpoint(block, x, use_reentrant=self.reentrant)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Every block's output, computed without the hooks."""
        found = []
        for block in self.blocks:
            x = torch.tanh(x @ block[0].weight.T + block[0].bias)
            found.append(x)
        return found


@pytest.fixture
def stack() -> Stack:
    return Stack()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)


def same(found: list[Tensor] | None, wanted: list[Tensor]) -> None:
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def weighted(features: list[Tensor] | None) -> Tensor:
    assert features is not None
    return sum(((k + 1) * (f**2)).sum() for k, f in enumerate(features))  # type: ignore[return-value]


def test_features_come_in_the_order_of_the_blocks(stack: Stack, x: Tensor) -> None:
    assert drain(stack) is None
    with pytest.raises(RuntimeError, match="attach_feature_capture"):
        pop_captured_features(stack)
    attach(stack, "blocks", INDICES)
    stack(x)
    wanted = stack.outputs(x)
    assert len(stack._fastgen_captured) == 2
    same(pop_captured_features(stack), [wanted[1], wanted[3]])
    assert drain(stack) == []


def test_attaching_again_replaces_and_detaching_leaves_nothing(stack: Stack, x: Tensor) -> None:
    before = {block: dict(block._forward_hooks) for block in stack.blocks}
    attach(stack, "blocks", [0, 1])
    attach(stack, "blocks", [4])
    stack(x)
    same(drain(stack), stack.outputs(x)[4:])
    detach(stack)
    detach(stack)
    assert drain(stack) is None
    assert before == {block: dict(block._forward_hooks) for block in stack.blocks}


@pytest.mark.parametrize("wrap", [lambda x: (x, "rest"), lambda x: (x,)], ids=["two", "one"])
def test_a_tuple_gives_its_first_item(wrap: Callable[[Tensor], Any], x: Tensor) -> None:
    stack = Stack(wrap)
    attach(stack, "blocks", INDICES)
    with captured(stack) as taken:
        stack(x)
    wanted = stack.outputs(x)
    same(taken.features, [wanted[1], wanted[3]])


def test_no_capture_in_a_bare_module(stack: Stack, x: Tensor) -> None:
    with captured(stack, early_exit=True) as taken:
        assert stack(x) is not None
    assert taken.features is None


def test_a_list_that_others_fill_is_drained(stack: Stack, x: Tensor) -> None:
    stack._fastgen_captured = []
    stack.blocks[2].register_forward_hook(lambda _b, _i, out: stack._fastgen_captured.append(out))
    with captured(stack, stop_gradient=True, early_exit=True) as taken:
        out = stack(x)
    same(taken.features, [stack.outputs(x)[2]])
    assert out.requires_grad
    assert stack._fastgen_captured == []


@REENTRANT
def test_recomputation_adds_nothing(stack: Stack, x: Tensor, reentrant: bool) -> None:
    """The output's graph runs through the captured blocks, so they run again in backward."""
    attach(stack, "blocks", INDICES)
    stack.reentrant = reentrant
    stack(x).sum().backward()
    assert len(stack.calls) > BLOCKS, "nothing was computed twice: this test shows nothing"
    wanted = stack.outputs(x)
    same(drain(stack), [wanted[1], wanted[3]])
    assert stack._fastgen_captured == []


def test_gradient_of_features_under_checkpointing(stack: Stack, x: Tensor) -> None:
    attach(stack, "blocks", INDICES)
    stack.reentrant = False
    outputs = stack.outputs(x)
    wanted = torch.autograd.grad(weighted([outputs[1], outputs[3]]), x)
    for early_exit in (False, True):
        with captured(stack, early_exit=early_exit, needs_grad=True) as taken:
            stack(x)
        assert (len(stack.calls) == 4) is early_exit
        same(list(torch.autograd.grad(weighted(taken.features), x)), list(wanted))
        assert len(stack.calls) > 5, "nothing was computed twice: this test shows nothing"
        assert stack._fastgen_captured == []
        stack.calls.clear()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("early_exit", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_gradient_of_features_under_reentrant_checkpointing(
    stack: Stack, x: Tensor, early_exit: bool, view: bool
) -> None:
    """A block's output gets its graph only after the hook, and a view of it never by itself."""
    attach(stack, "blocks", INDICES, (lambda out: out.transpose(1, 2)) if view else first_tensor)
    stack.reentrant = True
    outputs = stack.outputs(x)
    wanted = torch.autograd.grad(weighted([outputs[1], outputs[3]]), x)
    with captured(stack, early_exit=early_exit, needs_grad=True) as taken:
        stack(x)
    assert len(stack.calls) == BLOCKS
    weighted(taken.features).backward()
    assert len(stack.calls) == BLOCKS + 4
    same([x.grad], list(wanted))  # type: ignore[list-item]
    assert drain(stack) == []
    stack.calls.clear()
    with torch.no_grad(), captured(stack, early_exit=early_exit, needs_grad=True) as taken:
        stack(x)
    assert len(stack.calls) == (4 if early_exit else BLOCKS)
    assert taken.features is not None and len(taken.features) == 2


@pytest.mark.parametrize("early_exit", [False, True])
def test_a_gradient_that_is_lost_is_said(stack: Stack, x: Tensor, early_exit: bool) -> None:
    attach(stack, "blocks", INDICES)
    with (
        pytest.raises(RuntimeError, match="use_reentrant=False"),
        captured(stack, early_exit=early_exit, needs_grad=True),
    ):
        checkpoint(stack, x, use_reentrant=True)  # the blocks' outputs are not the checkpoint's
    with captured(stack, early_exit=early_exit, needs_grad=True) as taken:
        stack(x)
    assert weighted(taken.features).requires_grad


def test_early_exit_skips_the_later_blocks(stack: Stack, x: Tensor) -> None:
    attach(stack, "blocks", INDICES)
    out = None
    with captured(stack, early_exit=True) as taken:
        out = stack(x)
    assert out is None
    assert stack.calls == list(stack.blocks)[:4]
    wanted = stack.outputs(x)
    same(taken.features, [wanted[1], wanted[3]])
    same([stack(x)], wanted[4:])  # and only within the block


def test_an_exit_passes_through_the_capture_of_another_module(x: Tensor) -> None:
    outer, inner = Stack(), Stack()
    attach(outer, "blocks", [0])
    attach(inner, "blocks", [2])
    with captured(outer, early_exit=True) as whole:
        with captured(inner, early_exit=True) as part:
            outer(inner(x))
        same(part.features, [inner.outputs(x)[2]])
        with captured(inner) as part:
            outer(x)
    same(whole.features, [outer.outputs(x)[0]])
    assert part.features is None and drain(inner) == []


def saved_bytes(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the graph of what ``run`` returns."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def test_stopping_the_gradient_changes_no_feature_and_keeps_less(stack: Stack, x: Tensor) -> None:
    attach(stack, "blocks", INDICES)
    found = {}
    for stop in (True, False):
        with captured(stack, stop_gradient=stop) as taken:
            out = stack(x)
        assert out.requires_grad is not stop
        same([out], stack.outputs(x)[4:])
        found[stop] = torch.autograd.grad(weighted(taken.features), x)[0]
    assert torch.equal(found[True], found[False])

    def run(stop: bool) -> Any:
        with captured(stack, stop_gradient=stop) as taken:
            out = stack(x)
        return out, taken

    weights = WIDTH * WIDTH * 8  # and an activation: what the block behind the last one keeps
    assert saved_bytes(lambda: run(False)) - saved_bytes(lambda: run(True)) >= weights + x.nbytes


def test_what_is_left_over_is_dropped(stack: Stack, x: Tensor) -> None:
    attach(stack, "blocks", INDICES)
    stack(x)
    with captured(stack) as taken:
        stack(2 * x)
    same(taken.features, [stack.outputs(2 * x)[k] for k in (1, 3)])
    with pytest.raises(ZeroDivisionError), captured(stack, early_exit=True, stop_gradient=False):
        stack.blocks[0](x)
        raise ZeroDivisionError
    assert drain(stack) == []
    assert stack(x).requires_grad


def test_a_deep_copy_captures_into_its_own_list(stack: Stack, x: Tensor) -> None:
    attach(stack, "blocks", INDICES)
    other = copy.deepcopy(stack)
    with captured(other, early_exit=True) as taken:
        other(x)
    assert len(other.calls) == 4 and not stack.calls
    same(taken.features, [stack.outputs(x)[k] for k in (1, 3)])
    assert drain(stack) == []
    other(x)
    assert drain(other) == []  # nobody would drain it
    detach(other)
    other(x)
    assert drain(other) is None and drain(stack) == []
    stack(x)
    assert len(drain(stack) or []) == 2


def test_rejected(stack: Stack) -> None:
    attach(stack, "blocks", [0])
    with pytest.raises(AttributeError, match="layers"):
        attach(stack, "layers", [0])
    assert drain(stack) is None
    stack.single = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="single"):
        attach(stack, "single", [0])
    for index in (-1, BLOCKS):
        with pytest.raises(IndexError, match=f"no {index}"):
            attach(stack, "blocks", [0, index])
