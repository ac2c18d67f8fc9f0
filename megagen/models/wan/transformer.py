"""The Wan diffusion transformer (arXiv 2503.20314) as a pipeline chunk on megatron-core.

A block: modulated norm, self-attention, gated residual; affine norm, cross-attention to text (and
image tokens), residual; modulated norm, feed-forward, gated residual. Modulation, norms, gated
residuals and the time embedding compute in fp32, the rest in the parameters' dtype, as the
published code does.

Legend: B batch, C channels, T H W latent sizes, S tokens, D hidden, L text or image tokens, R
timestep rows, K head dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megagen import kernels
from megagen.core.errors import DataError
from megagen.core.vsa import VSAOptions
from megagen.layers.adaln import ModulationTable, token_rows
from megagen.layers.attention import CrossAttention, SelfAttention
from megagen.layers.checkpointing import sharded_parameters
from megagen.layers.embeddings import ImageEmbedder, TextEmbedder, TimeEmbedder
from megagen.layers.linear import ReplicatedLinear, mark_sequence_parallel
from megagen.layers.mlp import MLP
from megagen.layers.norm import ResidualLayerNorm
from megagen.layers.patch import patchify, token_grid, unpatchify
from megagen.layers.rope import RotaryTables
from megagen.layers.tokens import TokenShard
from megagen.models.base import BlockTap, Request
from megagen.models.wan.architecture import WanArchitecture
from megagen.parallel.comm import copy_to_tp, gather_tokens, scatter_tokens


class ConditionEmbedder(nn.Module):
    """Time, text and image embedders; a copy on every pipeline stage."""

    def __init__(self, arch: WanArchitecture, dtype: torch.dtype) -> None:
        super().__init__()
        size = arch.hidden_size
        self.dtype = dtype
        self.time_embedder = TimeEmbedder(arch.freq_dim, size)
        self.time_proj = ReplicatedLinear(size, 6 * size, dtype=dtype)
        self.text_embedder = TextEmbedder(arch.text_dim, size, dtype=dtype)
        self.image_embedder: ImageEmbedder | None = None
        if arch.image_dim is not None:
            self.image_embedder = ImageEmbedder(
                arch.image_dim, size, num_positions=arch.pos_embed_seq_len, dtype=dtype
            )

    def time(self, timestep_RB: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding ``[R, B, D]`` for the head and modulation ``[R, B, 6, D]`` for the blocks."""
        embedding = self.time_embedder(timestep_RB).to(self.dtype)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))

    def text(self, condition: Any) -> Tensor:
        """``text_embeds_BLD`` as ``[L, B, D]``."""
        return self.text_embedder(
            _given(condition, "text_embeds_BLD").to(self.dtype).transpose(0, 1)
        )

    def image(self, condition: Any) -> Tensor | None:
        """``image_embeds_BLD`` as ``[L, B, D]``, None where the network has no image embedder."""
        if self.image_embedder is None:
            return None
        return self.image_embedder(_given(condition, "image_embeds_BLD").to(self.dtype))


class WanBlock(nn.Module):
    """One transformer block on this rank's tokens and heads."""

    def __init__(
        self,
        config: Any,
        arch: WanArchitecture,
        pg: Any,
        *,
        backend: str,
        vsa: VSAOptions | None = None,
        attention: Callable[..., SelfAttention] = SelfAttention,
    ) -> None:
        super().__init__()
        sharded = config.sequence_parallel
        size, self.eps = arch.hidden_size, arch.eps
        self.scale_shift_table = ModulationTable(6, size, sequence_parallel=sharded)
        self.attn1 = attention(config, pg, backend=backend, eps=arch.eps, vsa=vsa)
        self.attn2 = CrossAttention(
            config, pg, backend=backend, eps=arch.eps, has_image=arch.added_kv_proj_dim is not None
        )
        self.norm2: nn.Module | None = None
        if arch.cross_attn_norm:
            self.norm2 = ResidualLayerNorm(size, eps=arch.eps, sequence_parallel=sharded)
        self.mlp = MLP(config, pg.tp)

    def forward(
        self,
        hidden_SBD: Tensor,
        rows_RB6D: Tensor,
        text_LBD: Tensor,
        image_LBD: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        shard: TokenShard,
        rows_S: Tensor | None,
    ) -> Tensor:
        """``[S_local, B, D]`` to the same; ``cos`` and ``sin`` are of the CP rank's tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.scale_shift_table(rows_RB6D)
        x = kernels.layernorm_modulate(hidden_SBD, scale1, shift1, rows_S, eps=self.eps)
        y = self.attn1(x, cos, sin, shard)
        if self.norm2 is None:
            hidden = x = kernels.gated_residual(hidden_SBD, y, gate1, rows_S)
        else:
            hidden, x = self.norm2(hidden_SBD, y, gate1, rows_S)
        y = self.attn2(x, text_LBD, image_LBD)
        hidden, x = kernels.gated_residual_layernorm_modulate(
            hidden, y, None, scale2, shift2, rows_S, eps=self.eps
        )
        return kernels.gated_residual(hidden, self.mlp(x), gate2, rows_S)


class WanTransformer(MegatronModule):
    """Blocks ``layers`` of a Wan, with the patch embedding and the head where they belong.

    Args:
        config: TransformerConfig from ``WanModel.transformer_config``.
        arch: shapes.
        pg: process groups.
        layers: global numbers of the blocks held here.
        pre_process: holds the patch embedding.
        post_process: holds the head.
        vp_stage: virtual stage; None: one chunk a stage.
        attention_backend: of ``core_attention``.
        vsa: sparse self-attention; None: dense.
    """

    def __init__(
        self,
        config: Any,
        arch: WanArchitecture,
        pg: Any,
        *,
        layers: range,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        attention_backend: str,
        vsa: VSAOptions | None = None,
    ) -> None:
        super().__init__(config)
        self.arch, self.pg, self.vp_stage, self.vsa = arch, pg, vp_stage, vsa
        self.pre_process, self.post_process = pre_process, post_process
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: Tensor | None = None
        self.rope = RotaryTables(arch.attention_head_dim)
        self.is_sequence_parallel = config.sequence_parallel and pg.tp.size() > 1
        dtype, size = config.params_dtype, arch.hidden_size
        if pre_process:
            features = arch.in_channels * arch.patch_volume
            self.patch_embedding = ReplicatedLinear(features, size, dtype=dtype)
            mark_sequence_parallel(self.patch_embedding.parameters(), config.sequence_parallel)
        self.condition_embedder = ConditionEmbedder(arch, dtype)
        for parameter in self.condition_embedder.parameters():
            # gradients are summed over stages; the first stage's copy counts in the norm
            parameter.pipeline_parallel = True  # type: ignore[attr-defined]
            if not pre_process:
                parameter.shared = True  # type: ignore[attr-defined]
        self.blocks = nn.ModuleDict({str(i): self.make_block(i, attention_backend) for i in layers})
        if post_process:
            out_features = arch.out_channels * arch.patch_volume
            self.scale_shift_table = ModulationTable(
                2, size, sequence_parallel=config.sequence_parallel
            )
            self.proj_out = ReplicatedLinear(size, out_features, dtype=dtype)
            mark_sequence_parallel(self.proj_out.parameters(), config.sequence_parallel)

    def make_block(self, layer: int, attention_backend: str) -> WanBlock:
        """Block ``layer``, uninitialised."""
        return WanBlock(self.config, self.arch, self.pg, backend=attention_backend, vsa=self.vsa)

    def set_input_tensor(self, tensor: Any) -> None:
        """Hidden states of the stage before (Megatron wraps them in a list)."""
        self.input_tensor = tensor[0] if isinstance(tensor, (list, tuple)) else tensor

    def forward(self, request: Request, tap: BlockTap | None = None) -> Tensor:
        """Hidden states ``[S_local, B, D]``, or on the last chunk ``[B, C, T, H, W]``."""
        wanted = [n for n in self.blocks if tap is None or not tap.is_over(int(n))]
        if not wanted:
            assert self.input_tensor is not None, "a first stage without a wanted block"
            return self.input_tensor.clone()
        latents = request.latents_BCTHW
        grid = token_grid(latents.shape, self.arch.patch_size)
        shard = self.request_shard(request, grid)
        embedding, modulation, rows_S = self._timestep(request.timestep, grid, shard)
        text = self.condition_embedder.text(request.condition)
        image = self.condition_embedder.image(request.condition)
        cos, sin = self.rotation(grid, shard, latents.device)
        if self.pre_process:
            tokens = _take(patchify(latents, self.arch.patch_size), shard.own)
            hidden = self.patch_embedding(tokens.to(self.config.params_dtype))
        else:
            assert self.input_tensor is not None, "the schedule gave this stage no input"
            hidden = self.input_tensor
        for number in wanted:
            run = partial(self.blocks[number], shard=shard, rows_S=rows_S)
            hidden = self._run(run, hidden, modulation, text, image, cos, sin)
            if tap is not None:
                tap(int(number), hidden)
        if not self.post_process or (tap is not None and tap.is_over(self.arch.num_layers)):
            return hidden
        shift, scale = self.scale_shift_table(embedding[:, :, None])
        hidden = kernels.layernorm_modulate(hidden, scale, shift, rows_S, eps=self.arch.eps)
        return self._whole(self.proj_out(hidden), grid, shard)

    def shard(self, grid: tuple[int, int, int]) -> TokenShard:
        """The tokens of this rank."""
        cp, tp = self.pg.cp, self.pg.tp
        sp_size, sp_rank = (tp.size(), tp.rank()) if self.is_sequence_parallel else (1, 0)
        return TokenShard(
            grid[0] * grid[1] * grid[2], cp.size(), cp.rank(), sp_size, sp_rank, grid=grid
        )

    def request_shard(self, request: Request, grid: tuple[int, int, int]) -> TokenShard:
        """The request's tokens of this rank."""
        return dataclasses.replace(self.shard(grid), sparsity=request.sparsity)

    def rotation(
        self, grid: tuple[int, int, int], shard: TokenShard, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin`` of the CP rank's tokens."""
        return self.rope.tables(grid, shard.context, device)

    def _timestep(
        self, timestep: Tensor, grid: tuple[int, int, int], shard: TokenShard
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embedding ``[R, B, D]``, modulation ``[R, B, 6, D]`` and the row of each own token.

        The embedders' gradients come out whole on every TP rank.
        """
        rows = timestep[None] if timestep.ndim == 1 else timestep.transpose(0, 1)
        if rows.size(0) not in (1, grid[0], shard.num_tokens):
            raise DataError(
                f"timestep has {rows.size(0)} columns; a sample has {grid[0]} latent frames and "
                f"{shard.num_tokens} tokens.",
                remedy="Give one timestep a sample, a frame or a token.",
            )
        if rows.size(0) in (1, grid[0]):
            embedding, modulation = self.condition_embedder.time(rows)
            if self.is_sequence_parallel:
                embedding, modulation = (copy_to_tp(x, self.pg.tp) for x in (embedding, modulation))
            return (
                embedding,
                modulation,
                token_rows(rows.size(0), shard.own, shard.num_tokens, timestep.device),
            )
        embedding, modulation = self.condition_embedder.time(_take(rows, shard.context))
        if self.is_sequence_parallel:
            embedding, modulation = (scatter_tokens(x, self.pg.tp) for x in (embedding, modulation))
        return embedding, modulation, torch.arange(len(shard.own), device=timestep.device)

    def _run(self, block: Any, *tensors: Tensor | None) -> Tensor:
        """One block, recomputed in the backward where asked; what it differentiates is passed."""
        fp8 = bool(self.config.fp8)
        if self.config.recompute_granularity != "full" or not torch.is_grad_enabled():
            with _fp8_context(self.config) if fp8 else contextlib.nullcontext():
                return block(*tensors)
        if fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            tracker = tensor_parallel.random.get_cuda_rng_tracker
            with _fp8_context(self.config):
                return te_checkpoint(block, False, tracker, self.pg.tp, *tensors)
        return tensor_parallel.checkpoint(block, False, *tensors)

    def _whole(self, tokens: Tensor, grid: tuple[int, int, int], shard: TokenShard) -> Tensor:
        """The whole prediction ``[B, C, T, H, W]`` of all ranks' tokens."""
        if self.is_sequence_parallel:
            tokens = gather_tokens(tokens, self.pg.tp)
        tokens = gather_tokens(tokens, self.pg.cp)
        return unpatchify(tokens[: shard.num_tokens], grid, self.arch.patch_size)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Keys do not depend on the layout: a block's carries its global number."""
        assert metadata is not None and not sharded_offsets
        stage = 0
        if not self.pre_process:
            stage = 1 + self.pg.pp.rank() + self.pg.pp.size() * (self.vp_stage or 0)
        return sharded_parameters(
            self, prefix, self.pg, dp_cp_group=metadata["dp_cp_group"], replica_stage=stage
        )


def _take(x: Tensor, positions: range) -> Tensor:
    """Rows ``positions`` of ``x``; zeros past its end."""
    part = x[positions.start : positions.stop]
    missing = len(positions) - part.size(0)
    return part if missing == 0 else torch.cat([part, part.new_zeros(missing, *x.shape[1:])])


def _given(condition: Any, name: str) -> Tensor:
    if name not in condition:
        raise DataError(
            f"the network needs the condition {name!r}, which the batch does not have; it has "
            f"{', '.join(sorted(condition)) or 'none'}.",
            remedy="Preprocess the data with the encoder that makes it, or choose another network.",
        )
    return condition[name]


def _fp8_context(config: Any) -> Any:
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(config)
