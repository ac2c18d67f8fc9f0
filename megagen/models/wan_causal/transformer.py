"""A pipeline chunk of a Wan whose self-attention is block-causal; the weights are Wan's."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megagen.core.errors import DataError
from megagen.layers.tokens import TokenShard
from megagen.models.base import Request
from megagen.models.cache import KVCache
from megagen.models.wan.transformer import WanBlock, WanTransformer
from megagen.models.wan_causal.attention import CausalSelfAttention, CausalShard
from megagen.models.wan_causal.plugin import CLEAN
from megagen.models.wan_causal.window import Window


class CausalWanTransformer(WanTransformer):
    """``WanTransformer`` with a window.

    Args:
        args, kwargs: of ``WanTransformer``.
        window: which frames see which.
    """

    def __init__(self, *args: Any, window: Window, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window

    def make_block(self, layer: int, attention_backend: str) -> WanBlock:
        """Block ``layer``, uninitialised."""
        attention = partial(CausalSelfAttention, layer=layer)
        return WanBlock(
            self.config,
            self.arch,
            self.pg,
            backend=attention_backend,
            vsa=self.vsa,
            attention=attention,
        )

    def request_shard(self, request: Request, grid: tuple[int, int, int]) -> TokenShard:
        """The request's tokens of this rank and what they see.

        A teacher-forced request comes with its clean frames before its noisy ones.
        """
        cache = request.cache if request.cache is not None else KVCache()
        has_clean = CLEAN in request.condition
        if has_clean and cache.next_frame:
            raise DataError(
                "a teacher-forced request carries a cache.",
                remedy=f"Give its clean frames as {CLEAN!r}, or as a cache, not both.",
            )
        frames = grid[0] // 2 if has_clean else grid[0]
        start = cache.next_frame
        return CausalShard(
            **dataclasses.asdict(super().request_shard(request, grid)),
            views=self.window.views(frames, cache.frames, start, has_clean=has_clean),
            cache=cache,
            frame_tokens=grid[1] * grid[2],
            positions=range(start, start + frames),
            rope=self.rope,
        )

    def rotation(
        self, grid: tuple[int, int, int], shard: TokenShard, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """By the frames' places in the video; the clean and the noisy half of a frame share one."""
        assert isinstance(shard, CausalShard)
        frames, start = len(shard.positions), shard.positions.start
        tokens = shard.context
        if start == 0:  # the tables wrap where the noisy half begins
            return self.rope.tables((frames, *grid[1:]), tokens, device)
        offset = start * shard.frame_tokens
        positions = range(tokens.start + offset, tokens.stop + offset)
        return self.rope.tables((start + frames, *grid[1:]), positions, device)
