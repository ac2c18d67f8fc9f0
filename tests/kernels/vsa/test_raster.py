"""Attention that reads and writes raster order itself, against the same by way of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.kernels import VSALayout, status, vsa_attention
from megagen.kernels.backend import cpu as extension
from megagen.kernels.vsa import VSAAux, dispatch, raster
from megagen.kernels.vsa.backends import cpu
from tests.kernels.vsa.backends import error

pytestmark = pytest.mark.skipif(
    not status()["cpu"].available, reason="the CPU extension is not built"
)
LAYOUT, KEYS = VSALayout((5, 6, 9), (4, 4, 4)), VSALayout((3, 6, 9), (3, 5, 4))


def drawn(generator: torch.Generator, layout: VSALayout, dim: int = 24) -> list[Tensor]:
    """q, k, v and gate as views into a fused projection ``[S, B, H, 4, D]``, tokens outermost."""
    fused = torch.randn(layout.num_tokens, 2, 3, 4, dim, generator=generator)
    return list(fused.transpose(0, 1).unbind(3))


def run(given: list[Tensor], do: Tensor, **options: Any) -> tuple[list[Tensor], VSAAux]:
    """The output and the gradients of all that is given."""
    leaves = [x.detach().requires_grad_() for x in given]
    out, aux = vsa_attention(*leaves, backend="cpu", return_aux=True, **options)
    out.backward(do)
    grads = [x.grad for x in leaves if x.grad is not None]
    assert len(grads) == len(leaves)
    return [out.detach(), *grads], aux


def both(
    monkeypatch: pytest.MonkeyPatch, given: list[Tensor], do: Tensor, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """In one operator, and from stage to stage."""
    calls: list[str] = []
    attend = raster.attend_raster
    monkeypatch.setattr(
        "megagen.kernels.vsa.attention.attend_raster",
        lambda *args, **kwargs: (calls.append("raster"), attend(*args, **kwargs))[1],
    )
    one, aux = run(given, do, **options)
    assert calls == ["raster"]
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "has", lambda name, operation: False)
        other, expected = run(given, do, **options)
    assert len(calls) == 1
    assert torch.equal(aux.index.idx_BHqM, expected.index.idx_BHqM)
    assert aux.lse is not None and expected.lse is not None
    assert torch.equal(aux.lse, expected.lse) and torch.equal(aux.o_coarse, expected.o_coarse)
    return one, other


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize(
    ("dtype", "dim", "tolerance"),
    [(torch.float32, 24, 2e-6), (torch.float32, 136, 2e-6), (torch.bfloat16, 64, 2**-7)],
)
def test_it_is_what_the_stages_are(
    dtype: torch.dtype,
    dim: int,
    tolerance: float,
    has_gate: bool,
    monkeypatch: pytest.MonkeyPatch,
    seeded: torch.Generator,
) -> None:
    """bf16 rounds once less: o before the sum, and a token's own gradient before its mean's."""
    given = [x.to(dtype) for x in drawn(seeded, LAYOUT, dim)][: 4 if has_gate else 3]
    do = torch.randn(given[0].shape, generator=seeded).to(dtype)
    one, other = both(monkeypatch, given, do, layout=LAYOUT, topk=3)
    for found, expected in zip(one, other, strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert error(found, expected.double()) < tolerance


def test_keys_of_another_grid(monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator) -> None:
    q, *_, gate = drawn(seeded, LAYOUT)
    _, k, v, _ = drawn(seeded, KEYS)
    do = torch.randn(2, 3, LAYOUT.num_tokens, 24, generator=seeded).transpose(1, 2)
    options = {"layout": LAYOUT, "kv_layout": KEYS, "topk": 99, "score_dtype": "bf16"}
    for found, expected in zip(*both(monkeypatch, [q, k, v, gate], do, **options), strict=True):
        assert error(found, expected.double()) < 2e-6


def test_same_bits_on_any_number_of_threads(seeded: torch.Generator) -> None:
    given = drawn(seeded, LAYOUT)
    do = torch.randn(given[0].shape, generator=seeded)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(given, do, layout=LAYOUT, topk=3)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_at_a_time_change_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seeded: torch.Generator
) -> None:
    """All three heads, two and one, one by one; with what a backward needs and without."""
    given = [x.to(dtype) for x in drawn(seeded, LAYOUT)]
    do = torch.randn(given[0].shape, generator=seeded).to(dtype)
    blocks = LAYOUT.tables().blocks
    assert cpu._heads_at_once(2, 3, 24, blocks, blocks) == 3
    wanted, aux = run(given, do, layout=LAYOUT, topk=3)
    one_head = 4 * 2 * LAYOUT.num_blocks * extension().block_panels(24)
    for memory, heads in ((2 * one_head, 2), (1, 1)):
        monkeypatch.setattr(cpu, "_PANELS", memory)
        assert cpu._heads_at_once(2, 3, 24, blocks, blocks) == heads
        found, other = run(given, do, layout=LAYOUT, topk=3)
        assert all(map(torch.equal, found, wanted))
        assert torch.equal(other.index.idx_BHqM, aux.index.idx_BHqM)
        assert aux.lse is not None and other.lse is not None
        assert torch.equal(other.lse, aux.lse) and torch.equal(other.o_coarse, aux.o_coarse)
        with torch.no_grad():
            out = vsa_attention(*given, layout=LAYOUT, topk=3, backend="cpu")
        assert isinstance(out, Tensor) and torch.equal(out, wanted[0])


def test_nothing_is_kept_where_no_gradient_is_wanted(seeded: torch.Generator) -> None:
    given = drawn(seeded, LAYOUT)
    blocks = LAYOUT.tables().blocks
    options: dict[str, Any] = {"topk": 3, "scale": 0.2, "score_dtype": "fp32", "backend": "cpu"}
    made = raster.attend_raster(*given, blocks, blocks, **options)
    given[3].requires_grad_()
    kept = raster.attend_raster(*given, blocks, blocks, **options)
    assert made.o.numel() == 0 and kept.o.shape == (2, 3, LAYOUT.padded, 24)
    assert torch.equal(made.out, kept.out)


@pytest.mark.parametrize("has_gate", [True, False])
def test_the_operators_say_what_they_do(has_gate: bool, seeded: torch.Generator) -> None:
    *qkv, gate = drawn(seeded, LAYOUT, 8)
    blocks = LAYOUT.tables().blocks
    order = (blocks.slot_to_raster_P, blocks.sizes_n)
    leaves = [x.detach().requires_grad_() for x in (*qkv, *([gate] if has_gate else []))]
    given = (*leaves, *([] if has_gate else [None]), *order, *order)
    torch.library.opcheck(raster._attend, (*given, 3, 0.3, False, True, "cpu"))
    made = raster._attend(*given, 3, 0.3, False, True, "cpu")
    out, *rest = (x.detach() for x in made)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in given]
    torch.library.opcheck(raster._attend_backward, (out, *detached, rest, 0.3, "cpu"))


def test_torch_compiles_it_whole(seeded: torch.Generator) -> None:
    given = drawn(seeded, LAYOUT, 8)

    def attend(*tensors: Tensor) -> Tensor:
        out = vsa_attention(*tensors, layout=LAYOUT, topk=3, backend="cpu")
        assert isinstance(out, Tensor)
        return out.sin()

    found = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = function(*leaves)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
