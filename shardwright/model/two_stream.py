"""Two-stream attention (XLNet, Yang et al. 2019) with the relative positions of Transformer-XL (Dai et al. 2019).

The content stream has a vector for every token and sees the token itself; the query stream has one for every token that
is predicted, and sees where it stands but not what it is. Both attend to the content stream's keys alone, so that one
attention serves them, with T + P queries. Between blocks the streams lie one after the other in one tensor; the parts
of it are cut and joined here. Positions, segments and what is seen enter as one additive bias of the scores, so any
kernel of attention.py will do. Scores, with i a query and j a key: (q_i + u) k_j + (q_i + v) r_(i-j) + (q_i + s) e_ij.
Shapes: B batch, T tokens, P predicted ones, N = T + P queries, S keys (T, or more where a rank has some rows of them),
L = S tokens of the whole row, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardwright.model.attention import Core
from shardwright.model.dropout import Dropout
from shardwright.model.layers import MLP, Linear
from shardwright.model.transformer import Context, TransformerConfig, build_stack_norm


def stream_keys(context: Context) -> Tensor | None:
    """[B, N] keys of dropout, of both streams as they lie."""
    if context.token_keys is None or context.query_keys is None:
        return context.token_keys
    return torch.cat([context.token_keys, context.query_keys], dim=1)


class RelativeTerms(nn.Module):
    """What the scores have beside the product of query and key, with vectors u, v and s of each head's own."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.content = nn.Parameter(torch.empty(heads * head_dim).normal_(std=0.02))  # u
        self.position = nn.Parameter(torch.empty(heads * head_dim).normal_(std=0.02))  # v
        self.segment = nn.Parameter(torch.empty(heads * head_dim).normal_(std=0.02))  # s
        self.segments = nn.Parameter(torch.empty(2, heads * head_dim).normal_(std=0.02))  # e: the same, another

    def forward(self, q: Tensor, r: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """q [B, N, Hd], r [2L - 1, Hd] -> (q + u [B, H, N, d], bias of the scaled scores [B, H, N, S])."""
        scores = self._heads(q + self.position) @ self._heads(r).transpose(-1, -2)
        bias = self._at_distances(scores, context)
        if context.differ is not None:
            same, other = (self._heads(q + self.segment) @ self._heads(self.segments).transpose(-1, -2)).split(1, -1)
            bias = bias + torch.where(context.differ, other, same)
        bias = bias * self.head_dim**-0.5
        if context.mask is not None:
            bias = bias.masked_fill(~context.mask, float("-inf"))
        return self._heads(q + self.content), bias

    def _heads(self, x: Tensor) -> Tensor:
        """[..., n, Hd] -> [..., H, n, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def _at_distances(self, scores: Tensor, context: Context) -> Tensor:
        """Of scores with all distances [B, H, N, 2L - 1] those of each query's keys [B, H, N, S]."""
        rows, queries = context.distances, context.query_distances
        tokens = scores.shape[2] - (0 if queries is None else queries.shape[1])
        content = scores[:, :, :tokens]
        parts = [shift(content) if rows is None else pick(content, rows)]
        if queries is not None:
            parts.append(pick(scores[:, :, tokens:], queries))
        return torch.cat(parts, dim=2)


def pick(scores: Tensor, rows: Tensor) -> Tensor:
    """[B, H, n, 2L - 1] at rows [B or 1, n, S] -> [B, H, n, S]."""
    return scores.gather(-1, rows.unsqueeze(1).expand(*scores.shape[:2], -1, -1))


def shift(scores: Tensor) -> Tensor:
    """[B, H, T, 2T - 1], query i by distances T - 1, ..., 1 - T -> [B, H, T, T], query i by keys; as views.

    Query i finds key j in column T - 1 - i + j: a row further on is a column less, so rows are read 2T - 2 apart.
    """
    tokens = scores.shape[2]
    if tokens == 1:
        return scores
    flat = scores.flatten(-2)[..., tokens - 1 :]
    return flat[..., : tokens * (2 * tokens - 2)].unflatten(-1, (tokens, -1))[..., :tokens]


class TwoStreamAttention(nn.Module):
    """Attention of both streams to the content stream."""

    def __init__(self, width: int, heads: int, head_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(width, heads * head_dim, bias=False)
        self.k = Linear(width, heads * head_dim, bias=False)
        self.v = Linear(width, heads * head_dim, bias=False)
        self.r = Linear(width, heads * head_dim, bias=False)
        self.terms = RelativeTerms(heads, head_dim)
        self.core = Core(dropout)
        self.out = Linear(heads * head_dim, width, bias=False)

    def forward(
        self, content: Tensor, query: Tensor | None = None, *, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """content [B, T, D], query [B, P, D] -> the same shapes."""
        assert context.relative is not None, "the vectors of all distances"
        both = content if query is None else torch.cat([content, query], dim=1)
        k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (self.k(content), self.v(content)))
        q, bias = self.terms(self.q(both), self.r(context.relative.to(both.dtype)), context)
        y = self.core(q, k, v, bias, False)
        if context.seeing is not None:
            y = y.where(context.seeing, 0.0)
        y = y.transpose(1, 2).flatten(2)
        if query is None:
            return self.out(y), None
        tokens = content.shape[1]
        return self.out(y[:, :tokens]), self.out(y[:, tokens:])


class TwoStreamBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), of both streams."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = TwoStreamAttention(
            config.width, config.heads, config.head_width, dropout=config.attention_dropout
        )
        self.attention_norm = build_stack_norm(config)
        self.mlp = MLP(config.width, config.hidden_width, config.activation, bias=config.mlp_bias)
        self.mlp_norm = build_stack_norm(config)
        self.attention_dropout = Dropout(config.residual_dropout, site=1)
        self.mlp_dropout = Dropout(config.residual_dropout, site=2)

    def forward(self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        content, query = split_streams(x, context)
        y, z = self.attention(content, query, context=context)
        y = y if z is None else torch.cat([y, z], dim=1)
        x = self.attention_norm(x + self.attention_dropout(y, stream_keys(context), layer_key))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), stream_keys(context), layer_key))


def split_streams(x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """[B, N, D] -> content [B, T, D], query [B, P, D] or None."""
    if context.places is None:
        return x, None
    tokens = context.position_ids.shape[1]
    return x[:, :tokens], x[:, tokens:]
