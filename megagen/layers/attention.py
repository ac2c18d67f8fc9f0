"""Attention over whole tensors behind one function, and the self- and cross-attention of a block.

Legend: S tokens, B batch, D hidden, N heads, K head dim, L text or image tokens. A shard keeps its
suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megagen.core.errors import SetupError, suggest
from megagen.core.vsa import VSAOptions
from megagen.layers.linear import column_linear, row_linear
from megagen.layers.norm import HeadsRMSNorm, norm_heads
from megagen.layers.sparse import (
    frames_layout,
    makes_blocks,
    normed_sparse_attention,
    sparse_attention,
)
from megagen.layers.tokens import TokenShard
from megagen.parallel.context import Attend, context_attention
from megagen.parallel.dims import CPCommType


def core_attention(q_SBNK: Tensor, k_SBNK: Tensor, v_SBNK: Tensor, backend: str) -> Tensor:
    """``softmax(q k^T / sqrt(K)) v`` without mask.

    Args:
        q_SBNK: queries.
        k_SBNK: keys, of any length.
        v_SBNK: values.
        backend: ``sdpa`` | ``flash`` | ``te``.

    Returns:
        ``[S, B, N, K]``, S the queries'.

    Raises:
        SetupError: the backend is unknown or cannot be imported.
    """
    return attention_backend(backend)(q_SBNK, k_SBNK, v_SBNK)


@cache
def attention_backend(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function behind a backend's name; raises ``SetupError`` where it is not to be had."""
    makers = {"sdpa": lambda: _sdpa, "flash": _make_flash, "te": _make_transformer_engine}
    if name not in makers:
        raise SetupError(
            f"unknown attention backend {name!r};",
            remedy=suggest(name, makers),
            where="models.<role>.attention.backend",
        )
    try:
        return makers[name]()
    except ImportError as error:
        raise SetupError(
            f"attention backend {name!r} cannot be imported ({error}).",
            remedy="Install megagen[cuda] on a machine with CUDA, or choose 'sdpa'.",
            where="models.<role>.attention.backend",
        ) from None


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)


def _make_flash() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
        return out.transpose(0, 1)

    return flash


def _make_transformer_engine() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from transformer_engine.pytorch import DotProductAttention

    @cache
    def module(num_heads: int, head_dim: int, kind: str) -> Any:
        return DotProductAttention(
            num_heads, head_dim, qkv_format="sbhd", attn_mask_type="no_mask", attention_type=kind
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = "self" if q.size(0) == k.size(0) else "cross"
        out = module(q.size(2), q.size(3), kind)(q.contiguous(), k.contiguous(), v.contiguous())
        return out.view(q.shape)

    return attend


class SelfAttention(nn.Module):
    """Self-attention with RMSNorm over all heads of q and k, and rotary embedding.

    Args:
        config: TransformerConfig.
        pg: process groups: ``tp``, ``cp``, and for ``a2a+p2p`` ``hcp = [a2a group, ring group]``.
        backend: of ``core_attention``.
        eps: of the norms.
        vsa: sparse attention, gated by a linear of its own; None: dense.
    """

    def __init__(
        self, config: Any, pg: Any, *, backend: str, eps: float, vsa: VSAOptions | None = None
    ) -> None:
        super().__init__()
        size = config.num_attention_heads * config.kv_channels
        self.linear_qkv = column_linear(config, pg.tp, config.hidden_size, 3 * size, name="qkv")
        self.vsa = vsa
        if vsa is not None:
            self.linear_gate = column_linear(config, pg.tp, config.hidden_size, size, name="qkv")
        self.norm_q = HeadsRMSNorm(config, pg.tp)
        self.norm_k = HeadsRMSNorm(config, pg.tp)
        self.linear_proj = row_linear(config, pg.tp, size, config.hidden_size, name="proj")
        self.head_dim, self.eps, self.pg = config.kv_channels, eps, pg
        self.comm_type: CPCommType = config.cp_comm_type or "a2a"
        self.attend = partial(core_attention, backend=backend)
        self.recompute = config.recompute_granularity == "selective"

    def forward(self, hidden_SBD: Tensor, cos: Tensor, sin: Tensor, shard: TokenShard) -> Tensor:
        """``[S_local, B, D]`` to the same; ``cos`` and ``sin`` are of the CP rank's tokens."""
        qkv = self.linear_qkv(hidden_SBD)
        weights = (self.norm_q(), self.norm_k())
        gate = self.linear_gate(hidden_SBD) if self.vsa is not None else None
        core = partial(self._core, shard=shard)
        if self.recompute and qkv.requires_grad:
            out = tensor_parallel.checkpoint(core, False, qkv, *weights, cos, sin, gate)
        else:
            out = core(qkv, *weights, cos, sin, gate)
        return self.linear_proj(out)

    def _core(
        self,
        qkv: Tensor,
        weight_q: Tensor,
        weight_k: Tensor,
        cos: Tensor,
        sin: Tensor,
        gate: Tensor | None,
        *,
        shard: TokenShard,
    ) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, 3, self.head_dim)).unbind(3)
        weights = (weight_q, weight_k)
        norm = {"eps": self.eps, "tp_group": self.pg.tp, "cos": cos, "sin": sin}
        if gate is not None:
            gate = gate.unflatten(-1, (-1, self.head_dim))
            blocks = self._blocks_of_norm(q, shard)
            if blocks is not None:
                return normed_sparse_attention(q, k, v, gate, weights, **norm, **blocks).flatten(2)
        q, k = norm_heads([q, k], weights, **norm)
        return self._mix(q, k, v, gate, shard).flatten(2)

    def _blocks_of_norm(self, q: Tensor, shard: TokenShard) -> dict[str, Any] | None:
        """Options of ``normed_sparse_attention`` where it is of use.

        CP ranks exchange tokens for heads between norm and attention, and make blocks after that.
        """
        if self.vsa is None or shard.grid is None or self.pg.cp.size() > 1:
            return None
        frames, rows, columns = shard.grid
        layout = frames_layout(self.vsa, [frames], rows, columns, shard.prefix)
        if not makes_blocks(q, self.vsa, shard.sparsity, layout):
            return None
        return {"options": self.vsa, "sparsity": shard.sparsity, "layout": layout}

    def _whole(self, shard: TokenShard) -> Attend:
        """What attends once all tokens are together."""
        assert shard.grid is not None or self.vsa is None, "sparse attention needs the tokens' grid"
        return self._between([shard.grid[0]], None, shard) if shard.grid else self.attend

    def _between(
        self, queries: Sequence[int], keys: Sequence[int] | None, shard: TokenShard
    ) -> Attend:
        """What attends from runs of whole frames to others, given by their lengths.

        Args:
            queries: of the queries.
            keys: of the keys; None: the queries'.
            shard: rows, columns, prefix and sparsity are read.
        """
        if self.vsa is None or shard.grid is None:
            return self.attend
        make = partial(frames_layout, self.vsa, rows=shard.grid[1], columns=shard.grid[2])
        return partial(
            sparse_attention,
            options=self.vsa,
            sparsity=shard.sparsity,
            layout=make(queries, prefix=shard.prefix),
            kv_layout=None if keys is None else make(keys),
        )

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        shard: TokenShard,
        attend: Attend | None = None,
    ) -> Tensor:
        """Attention over the tokens of all CP ranks: ``[S / cp, B, N, K]`` to the same."""
        a2a_group, ring_group = self.pg.hcp if self.comm_type == "a2a+p2p" else (None, None)
        return context_attention(
            q,
            k,
            v,
            num_tokens=shard.num_tokens,
            group_cp=self.pg.cp,
            comm_type=self.comm_type,
            a2a_group=a2a_group,
            ring_group=ring_group,
            attend=attend or self._whole(shard),
            gate_SBNK=gate,
        )


class CrossAttention(nn.Module):
    """Attention to the text, and to image tokens by keys and values of their own, outputs summed.

    Text and image states are whole on every TP and CP rank, so nothing is sent.

    Args:
        config: TransformerConfig.
        pg: process groups.
        backend: of ``core_attention``.
        eps: of the norms.
        has_image: whether there are keys and values for image tokens.
    """

    def __init__(self, config: Any, pg: Any, *, backend: str, eps: float, has_image: bool) -> None:
        super().__init__()
        size, hidden = config.num_attention_heads * config.kv_channels, config.hidden_size
        self.linear_q = column_linear(config, pg.tp, hidden, size, name="qkv")
        self.linear_kv = column_linear(config, pg.tp, hidden, 2 * size, replicated_input=True)
        self.norm_q = HeadsRMSNorm(config, pg.tp)
        self.norm_k = HeadsRMSNorm(config, pg.tp)
        self.has_image = has_image
        if has_image:
            self.linear_kv_image = column_linear(
                config, pg.tp, hidden, 2 * size, replicated_input=True
            )
            self.norm_k_image = HeadsRMSNorm(config, pg.tp)
        self.linear_proj = row_linear(config, pg.tp, size, hidden, name="proj")
        self.head_dim, self.eps, self.tp_group = config.kv_channels, eps, pg.tp
        self.attend = partial(core_attention, backend=backend)

    def forward(self, hidden_SBD: Tensor, text_LBD: Tensor, image_LBD: Tensor | None) -> Tensor:
        """``[S_local, B, D]`` to the same."""
        q = self.linear_q(hidden_SBD).unflatten(-1, (-1, self.head_dim))
        (q,) = norm_heads([q], [self.norm_q()], eps=self.eps, tp_group=self.tp_group)
        out = self._attend(q, text_LBD, self.linear_kv, self.norm_k)
        if self.has_image:
            assert image_LBD is not None
            out = out + self._attend(q, image_LBD, self.linear_kv_image, self.norm_k_image)
        return self.linear_proj(out.flatten(2))

    def _attend(self, q: Tensor, states: Tensor, linear: nn.Module, norm: HeadsRMSNorm) -> Tensor:
        k, v = linear(states).unflatten(-1, (-1, 2, self.head_dim)).unbind(3)
        (k,) = norm_heads([k], [norm()], eps=self.eps, tp_group=self.tp_group)
        return self.attend(q, k, v)
