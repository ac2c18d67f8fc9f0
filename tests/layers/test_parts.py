"""Layers against independent formulas in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from megagen.core.errors import DataError, SetupError
from megagen.layers.adaln import token_rows
from megagen.layers.attention import attention_backend, core_attention
from megagen.layers.linear import column_linear
from megagen.layers.patch import patchify, token_grid, unpatchify
from megagen.layers.rope import RotaryTables
from megagen.layers.tokens import TokenShard


@pytest.mark.parametrize(("tokens", "keys"), [(7, 7), (5, 11), (1, 3)])
def test_core_attention(generator: torch.Generator, tokens: int, keys: int) -> None:
    q, k, v = (
        torch.randn(n, 2, 3, 8, generator=generator, requires_grad=True)
        for n in (tokens, keys, keys)
    )
    probe = torch.randn(tokens, 2, 3, 8, generator=generator)
    out = core_attention(q, k, v, "sdpa")
    grads = torch.autograd.grad((out * probe).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("sbnk,tbnk->bnst", exact[0], exact[1]) / math.sqrt(8)
    expected = torch.einsum("bnst,tbnk->sbnk", scores.softmax(-1), exact[2])
    expected_grads = torch.autograd.grad((expected * probe).sum(), exact)
    for found, value in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (found - value).norm() <= 1e-6 * value.norm()


@pytest.mark.parametrize("head_dim", [6, 14, 24, 128])
def test_rotary_tables_are_diffusers(head_dim: int) -> None:
    grid = (3, 5, 4)
    theirs = WanRotaryPosEmbed(head_dim, (1, 1, 1), 64)
    cos, sin = (t[0, :, 0] for t in theirs(torch.empty(1, 1, *grid)))
    tables = RotaryTables(head_dim)
    for positions in (range(60), range(17, 45), range(45, 64)):  # the last goes past the end
        own_cos, own_sin = tables.tables(grid, positions, torch.device("cpu"))
        inside = slice(positions.start, min(positions.stop, 60))
        count = len(range(60)[inside])
        assert own_cos.shape == (len(positions), head_dim // 2)
        assert torch.equal(own_cos[:count], cos[inside, 0::2])
        assert torch.equal(own_sin[:count], sin[inside, 1::2])


def test_rotary_tables_keep_few_shapes() -> None:
    tables = RotaryTables(6, keep=2)
    first = tables.tables((1, 2, 2), range(4), torch.device("cpu"))[0]
    assert tables.tables((1, 2, 2), range(4), torch.device("cpu"))[0] is first
    for frames in (2, 3):
        tables.tables((frames, 2, 2), range(4), torch.device("cpu"))
    assert tables.tables((1, 2, 2), range(4), torch.device("cpu"))[0] is not first


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patches_are_those_of_a_convolution(
    generator: torch.Generator, patch: tuple[int, int, int]
) -> None:
    latents = torch.randn(2, 3, 4, 4, 6, generator=generator)
    weight = torch.randn(5, 3, *patch, generator=generator)
    tokens = patchify(latents, patch) @ weight.flatten(1).T
    expected = torch.nn.functional.conv3d(latents, weight, stride=patch).flatten(2).permute(2, 0, 1)
    assert torch.allclose(tokens, expected, atol=1e-5)
    grid = token_grid(latents.shape, patch)
    volume = math.prod(patch)
    channels_last = patchify(latents, patch).unflatten(-1, (3, volume)).transpose(-1, -2).flatten(2)
    assert torch.equal(unpatchify(channels_last, grid, patch), latents)
    with pytest.raises(DataError, match=r"\(4, 4, 5\)"):
        token_grid((4, 4, 5), (1, 2, 2))


@pytest.mark.parametrize(("num_tokens", "cp", "sp"), [(45, 2, 2), (8, 2, 4), (3, 4, 2), (7, 1, 1)])
def test_shards_tile_the_tokens(num_tokens: int, cp: int, sp: int) -> None:
    own: list[int] = []
    for cp_rank in range(cp):
        context: list[int] = []
        for sp_rank in range(sp):
            shard = TokenShard(num_tokens, cp, cp_rank, sp, sp_rank)
            context += shard.own
            assert shard.padded % (cp * sp) == 0 and 0 <= shard.padded - num_tokens < cp * sp
        assert context == list(TokenShard(num_tokens, cp, cp_rank, sp, 0).context)
        own += context
    assert own == list(range(len(own)))


def test_rows_of_tokens() -> None:
    device = torch.device("cpu")
    assert token_rows(1, range(5), 5, device) is None
    rows = token_rows(3, range(4, 16), 15, device)
    assert rows is not None and rows.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


class _Config:
    transformer_impl = "transformer_engine"
    sequence_parallel = False


def test_what_is_not_installed_says_so() -> None:
    cases: list[tuple[str, Any]] = []
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        cases.append(("'te'", lambda: attention_backend("te")))
        cases.append(("transformer_impl", lambda: column_linear(_Config(), None, 4, 4)))
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        cases.append(("'flash'", lambda: attention_backend("flash")))
    cases.append(("did you mean 'flash'", lambda: attention_backend("flahs")))
    for words, call in cases:
        with pytest.raises(SetupError, match=words):
            call()
