"""Prefix tuning (Li & Liang 2021): keys and values of virtual tokens in every block, trained themselves.

Under build.py. The blocks are those of a decoder, an encoder, or the decoder of an encoder-decoder. Tokens of a row
come after the prefix: their positions begin at n. Of packed documents each sees it. With a projection, keys and values
of all blocks come out of one small table by a hidden layer that they share, and a matrix of each block's own.
Shapes: B batch, T queries, S keys, n virtual tokens, H heads, K key heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.adapt.prompt import shorten
from shardwright.config import AdaptConfig
from shardwright.model.attention import Cache, Core
from shardwright.model.layers import Linear
from shardwright.model.t5 import T5
from shardwright.model.transformer import Inputs


class Shared:
    """What a forward pass hands to the cores of its blocks."""

    def __init__(self) -> None:
        self.table: Tensor | None = None  # [n, P], where there is a projection
        self.bias: Tensor | None = None  # [1, H, T, n] of the prefix's scores, where those of distances are biased


class PrefixCore(Core):
    """Attention that sees n keys more, before all others."""

    def __init__(
        self, base: Core, config: AdaptConfig, width: int, head_dim: int, shared: Shared, like: Tensor
    ) -> None:
        super().__init__(base.dropout, base.scale)
        self.tokens, self.head_dim, self.shared = config.tokens, head_dim, shared
        own = config.projection is None
        self.prefix = nn.Parameter(like.new_empty(config.tokens, 2 * width)) if own else None
        self.project = None if config.projection is None else Linear(config.projection, 2 * width).to(like.device)

    def rows(self) -> Tensor:
        """[n, 2 K d]: keys, then values."""
        if self.project is None:
            assert self.prefix is not None
            return self.prefix
        assert self.shared.table is not None, "computed at the beginning of a pass"
        return self.project(self.shared.table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """As of `Core`."""
        rows = self.rows().to(k.dtype).view(self.tokens, 2, -1, self.head_dim).permute(1, 2, 0, 3)
        more = rows.unsqueeze(1).expand(2, k.shape[0], -1, -1, -1)  # [2, B, K, n, d]
        if mask is None and causal:
            mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = None if mask is None else self._widened(mask)
        return super().forward(q, torch.cat([more[0], k], 2), torch.cat([more[1], v], 2), mask, causal)

    def _widened(self, mask: Tensor) -> Tensor:
        """[B or 1, 1 or H, T or 1, S] -> the same with the prefix's columns, which all see."""
        if self.shared.bias is not None:
            bias = self.shared.bias.to(mask.dtype)
            shape = torch.broadcast_shapes(bias.shape[:3], mask.shape[:3])
            return torch.cat([bias.expand(*shape, -1), mask.expand(*shape, -1)], dim=-1)
        return F.pad(mask, (self.tokens, 0), value=True if mask.dtype == torch.bool else 0.0)


class PrefixTable(nn.Module):
    """What the projections of all blocks read: tanh(first(table))."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(tokens, width))
        self.first = Linear(width, hidden)

    def forward(self) -> Tensor:
        """[n, P]."""
        return torch.tanh(self.first(self.prompt))


def apply_prefix(model: Any, config: AdaptConfig) -> None:
    """Put keys and values into the blocks of a model, in place."""
    shape, shared = model.config, Shared()
    width = shape.num_kv_heads * shape.head_width
    for number in shape.runs[-1]:
        attention = model.blocks[str(number)].attention
        like = attention.k.weight
        attention.core = PrefixCore(attention.core, config, width, shape.head_width, shared, like)
    if config.projection is not None:
        model.prefix = PrefixTable(config.tokens, width, config.projection).to(like.device)
    hidden, n = model.hidden, config.tokens

    def prefixed(inputs: Inputs, x: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        shared.table = model.prefix() if config.projection is not None else None
        past = cache.length if cache else 0
        shared.bias = _t5_bias(model, inputs, n, past) if isinstance(model, T5) else None
        return hidden(inputs._replace(position_ids=_moved(inputs, n, past)), x, cache)

    model.hidden = prefixed
    shorten(model, n)


def _moved(inputs: Inputs, n: int, past: int) -> Tensor:
    """Positions of tokens that come after the prefix."""
    if inputs.position_ids is not None:
        return inputs.position_ids + n
    length = inputs.input_ids.shape[1]
    return torch.arange(past + n, past + n + length, device=inputs.input_ids.device).unsqueeze(0)


def _t5_bias(model: T5, inputs: Inputs, n: int, past: int) -> Tensor:
    """[1, H, T, n]: as far as a row's place lies behind the prefix."""
    device = inputs.input_ids.device
    queries = torch.arange(past + n, past + n + inputs.input_ids.shape[1], device=device)
    bias: Tensor = model.decoder_relative(torch.arange(n, device=device) - queries.unsqueeze(-1))
    return bias
