"""Attention, causal or not, to oneself or to another stream, its masks, and the cache that generation keeps.

Used by the blocks of transformer.py. Shapes: B batch, T tokens, S keys, D width, H heads, K key heads,
d head width. Head counts are read off the tensors, so a module that holds some of the heads just works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.model import cpu_kernels
from shardwright.model.layers import Linear, build_norm, join, linear
from shardwright.model.position import rotate


class Core(nn.Module):
    """Scaled dot-product attention alone; a module, so that a layout may put another in its place."""

    def __init__(self, dropout: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        self.dropout, self.scale = dropout, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q [B, H, T, d], k and v [B, K, S, d], mask [B, 1, T, S] bool or additive -> [B, H, T, d]."""
        dropout = self.dropout if self.training else 0.0
        if _suits_cpu_kernel(q, k, mask, causal, dropout):
            groups = q.shape[1] // k.shape[1]
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            return cpu_kernels.CausalAttention.apply(q, k, v, mask, self.scale or q.shape[-1] ** -0.5)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


class Attention(nn.Module):
    """Multi-, grouped- or single-head attention with optional rotary positions and q/k norms.

    `fused` lets a compiled graph run q, k and v as one GEMM; set it False where they must be called as modules.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(width, heads * head_dim, bias=qkv_bias)
        self.k = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.v = Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.q_norm = build_norm(qk_norm, head_dim, eps=norm_eps, bias=False) if qk_norm else None
        self.k_norm = build_norm(qk_norm, head_dim, eps=norm_eps, bias=False) if qk_norm else None
        self.core = Core(dropout, scale)
        self.out = Linear(heads * head_dim, width, bias=out_bias)
        self.fused = True

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> q [B, T, H, d], k and v [B, T, K, d]."""
        if self.fused and torch.compiler.is_compiling():
            sizes = [p.weight.shape[0] for p in (self.q, self.k, self.v)]
            parts = linear(x, *join([self.q, self.k, self.v])).split(sizes, dim=-1)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in parts)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.core(q, k, v, mask, causal)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Attention of one stream to the tokens of another, whose keys generation computes once."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, memory: Tensor | None, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """x [B, T, D], memory [B, S, D] (None where the cache has its keys), mask [B, 1, T, S] -> [B, T, D]."""
        q = self.q(x).unflatten(-1, (-1, self.head_dim))
        q = q if self.q_norm is None else self.q_norm(q)
        if cache is None or cache.memory is None:
            assert memory is not None, "nothing to attend to"
            keys = self.keys(memory)
        else:
            keys = cache.memory
        if cache is not None:
            cache.memory = keys
        y = self.core(q.transpose(1, 2), *keys, mask, False)
        return self.out(y.transpose(1, 2).flatten(2))

    def keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> keys and values [B, K, S, d]."""
        k, v = (part(memory).unflatten(-1, (-1, self.head_dim)) for part in (self.k, self.v))
        k = k if self.k_norm is None else self.k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)


def _suits_cpu_kernel(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> bool:
    """Compiled training in bf16 on a CPU, where torch's own backward kernel is slow."""
    return (
        cpu_kernels.use_cpu_kernels(q)
        and q.dtype == torch.bfloat16
        and causal
        and dropout == 0.0
        and q.shape[2] == k.shape[2]
        and (mask is None or (mask.dtype == q.dtype and not mask.requires_grad))
    )


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to scores: 0 where attended, -inf elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def document_mask(documents: Tensor, causal: bool = True, virtual: int = 0) -> Tensor:
    """[B, 1, T, T], true where key and query share a document number of [B, T] and the key, if causal, is not later.

    The first `virtual` tokens of a row are seen by all and see all, but for padding (numbers below 0).
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    if virtual:
        same[:, :virtual] = (documents >= 0).unsqueeze(1)
        same[:, :, :virtual] = True
    return (same.tril_() if causal else same).unsqueeze(1)


def row_mask(
    row_index: Tensor,
    key_index: Tensor,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """[B, 1, T, S], true where the key is of the query's document and, if causal, not later.

    For queries that are part of a row. Places in it: `row_index` [T] or [B, T] of queries, `key_index` [B, S] of keys;
    documents alike.
    """
    keys, queries = key_index.unsqueeze(-2), row_index.unsqueeze(-1)
    mask = keys <= queries if causal else (keys >= 0) & (queries >= 0)
    if documents is not None:
        assert key_documents is not None, "documents of queries need those of keys beside them"
        mask &= documents.unsqueeze(-1) == key_documents.unsqueeze(-2)
    return mask.unsqueeze(1)


def padding_mask(attention_mask: Tensor, past: int = 0, causal: bool = True) -> Tensor:
    """[B, 1, T, S], or [B, 1, 1, S] if not causal, that hides keys where `attention_mask` [B, S] is 0.

    Causal queries see themselves at least; a row of padding alone is no row.
    """
    keys = attention_mask.bool()[:, None, None, :]
    if not causal:
        return keys
    size = attention_mask.shape[1]
    index = torch.arange(size, device=attention_mask.device)
    query = index[past:, None]
    return (keys & (index <= query)) | (index == query)


class LayerCache:
    """Keys and values of the tokens that one layer has seen, in memory reserved once.

    `memory`: those of the stream that it attends to beside its own, [B, K, S, d] each.
    """

    def __init__(self, size: int) -> None:
        self.size, self.length = size, 0
        self.memory: tuple[Tensor, Tensor] | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, K, T, d] of new tokens; returns all that is stored, [B, K, S, d]."""
        if self._keys is None or self._values is None:
            shape = (k.shape[0], k.shape[1], self.size, k.shape[3])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        stop = self.length + k.shape[2]
        assert stop <= self.size, "more tokens than the cache was made for"
        self._keys[:, :, self.length : stop] = k
        self._values[:, :, self.length : stop] = v
        self.length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]


class Cache:
    """One LayerCache a block, for `size` tokens."""

    def __init__(self, layers: int, size: int) -> None:
        self.size = size
        self.layers = [LayerCache(size) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length
