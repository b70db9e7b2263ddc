"""Disentangled attention and what stands around it in DeBERTa (He et al. 2021a, 2021b), for the assembly of deberta.py.

A score adds up content to content, content to position and position to content, each over sqrt(3d); positions are
distances alone, told by one table of vectors that all blocks share. Absolute positions enter before the output: the
last block is the enhanced mask decoder. Shapes: B batch, T queries, S keys, D width, H heads, d head width,
2R rows of the table, N neighbours in the window of a convolution.

Equation 4 of the first paper gives position-to-content the distance from key to query; its authors' code, and Hugging
Face, take that from query to key for both, and so does this: the published weights were trained that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.model.attention import Core, LayerCache
from shardwright.model.dropout import Dropout, mix
from shardwright.model.layers import ACTIVATIONS, Linear
from shardwright.model.transformer import Context, Inputs, PostNormBlock, build_stack_norm


class DisentangledCore(Core):
    """Attention whose scores know distances; a module, so that a layout may put another around it."""

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        distances: Tensor,
        position_k: Tensor,
        position_q: Tensor,
    ) -> Tensor:
        """q [B, H, T, d], k and v [B, H, S, d], mask [B, 1, T, S] bool or additive, distances [B or 1, T, S] rows of
        position_k and position_q [2R, H, d] -> [B, H, T, d].
        """
        assert not causal, "distances go both ways"
        assert self.scale is not None
        to_position = _Pick.apply(torch.einsum("bhtd,rhd->bhtr", q, position_k), distances)
        from_position = _Pick.apply(torch.einsum("bhsd,rhd->bhsr", k, position_q), distances.transpose(-1, -2))
        bias = (to_position + from_position.transpose(-1, -2)) * self.scale
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
        return super().forward(q, k, v, bias, False)


class _Pick(torch.autograd.Function):
    """torch's gather, without the scores that it would keep for their shape alone: as many as attention's own."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, rows: Tensor) -> Tensor:
        """Of scores [B, H, X, 2R] those in `rows` [B or 1, X, Y] -> [B, H, X, Y]."""
        ctx.save_for_backward(rows)
        ctx.size = scores.shape[-1]
        return scores.gather(-1, _for_heads(rows, scores))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """A row gets the sum of what was picked from it."""
        (rows,) = ctx.saved_tensors
        zeros = grad.new_zeros(*grad.shape[:-1], ctx.size)
        return zeros.scatter_add(-1, _for_heads(rows, grad), grad), None


def _for_heads(rows: Tensor, like: Tensor) -> Tensor:
    """[B or 1, X, Y] -> [B, H, X, Y]."""
    return rows.unsqueeze(1).expand(*like.shape[:3], rows.shape[-1])


class DisentangledAttention(nn.Module):
    """Projections of contents and of distances; `shared` takes those of contents for both, as v2 does.

    `key_bias`: whether keys have a bias too, which v1 lacks.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool,
        key_bias: bool,
        out_bias: bool,
        shared: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner = heads * head_dim
        self.q = Linear(width, inner, bias=bias)
        self.k = Linear(width, inner, bias=bias and key_bias)
        self.v = Linear(width, inner, bias=bias)
        self.position_q = None if shared else Linear(width, inner, bias=bias)
        self.position_k = None if shared else Linear(width, inner, bias=bias and key_bias)
        self.core = DisentangledCore(dropout, 1 / math.sqrt(3 * head_dim))
        self.out = Linear(inner, width, bias=out_bias)

    def forward(
        self,
        x: Tensor,
        *,
        relative: Tensor,
        distances: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Queries of x [B, T, D] to keys and values of `memory` [B, S, D], x itself where it is None -> [B, T, D].

        relative [2R, D], distances [B or 1, T, S], mask [B, 1, T, S].
        """
        seen = x if memory is None else memory
        q, k, v = (self._heads(part).transpose(1, 2) for part in (self.q(x), self.k(seen), self.v(seen)))
        position_k = self._heads((self.position_k or self.k)(relative))
        position_q = self._heads((self.position_q or self.q)(relative))
        y = self.core(q, k, v, mask, False, distances, position_k, position_q)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[..., H d] -> [..., H, d]."""
        return x.unflatten(-1, (-1, self.head_dim))


class Relative(nn.Module):
    """The vectors of distances, which every block reads: [2R, D], normed where `relative_norm` says so."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(2 * config.span, config.width)
        self.norm = build_stack_norm(config) if config.relative_norm else None

    def forward(self) -> Tensor:
        """[2R, D]."""
        rows = self.table(torch.arange(2 * self.config.span, device=self.table.weight.device))
        return rows if self.norm is None else self.norm(rows)

    def rows(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The row of each pair's distance, int64 [B or 1, T, S], from places in the row [B or 1, T] and [B or 1, S]."""
        longest, span = self.config.max_length, self.config.span
        steps = torch.arange(-longest, longest + 1, device=queries.device)
        if self.config.buckets > 0:
            steps = log_buckets(steps, self.config.buckets, self.config.farthest)
        rows = (steps + span).clamp(0, 2 * span - 1)
        return rows[(queries.unsqueeze(-1) - keys.unsqueeze(-2)).clamp(-longest, longest) + longest]


def log_buckets(distances: Tensor, buckets: int, farthest: int) -> Tensor:
    """Distances as they are up to buckets / 2, beyond it by their logarithm, `farthest` in the last bucket (int64).

    In float32 as the published weights were trained: another format would round some distances to other buckets.
    """
    middle = buckets // 2
    size = distances.abs().clamp(min=middle - 1)
    share = torch.log(size / middle) / torch.log(torch.tensor((farthest - 1) / middle))
    bucket = (torch.ceil(share * (middle - 1)) + middle) * distances.sign()
    return torch.where(size <= middle, distances, bucket.long())


class DisentangledBlock(PostNormBlock):
    """A post-norm block with disentangled attention."""

    def build_attention(self, config: Any) -> nn.Module:
        """See `DisentangledAttention`."""
        return DisentangledAttention(
            config.width,
            config.heads,
            config.head_width,
            bias=config.qkv_bias,
            key_bias=config.key_bias,
            out_bias=config.out_bias,
            shared=config.shared_projections,
            dropout=config.attention_dropout,
        )

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.answer(x, None, context, layer_key)

    def answer(self, x: Tensor, memory: Tensor | None, context: Context, layer_key: Tensor | None) -> Tensor:
        """What x [B, T, D] becomes by asking `memory` [B, S, D], or itself."""
        attended = self.attention(
            x, memory=memory, mask=context.mask, relative=context.relative, distances=context.distances
        )
        x = self.attention_norm(x + self.attention_dropout(attended, context.token_keys, layer_key))
        return self.mlp_norm(x + self.feed(x, context, layer_key))


class DecodingBlock(DisentangledBlock):
    """The last block as enhanced mask decoder (He et al. 2021a, section 3.2 and figure 2): 2 passes with one set of
    weights, whose queries begin as its input plus absolute positions and whose keys and values are its input.
    """

    passes = 2

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.memory = nn.Identity()  # where a layout brings together what both passes ask

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        asked, memory = x + self.positions(context.position_ids), self.memory(x)
        for _ in range(self.passes):
            asked = self.answer(asked, memory, context, layer_key)
            layer_key = None if layer_key is None else mix(layer_key)  # each pass drops values of its own
        return asked


class Convolution(nn.Module):
    """A convolution over the tokens of a document: what is no neighbour of its own counts as zeros."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.window = Window()
        self.weight = nn.Parameter(torch.empty(width, width, kernel).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        """x [B, T, inputs], near [B, T, N] -> [B, T, D]."""
        y = nn.functional.linear(self.window(x, near).flatten(2), self.weight.transpose(1, 2).flatten(1))
        return y if self.bias is None else y + self.bias


class Window(nn.Module):
    """What a convolution sees of each token; a module, so that a layout may put another in its place."""

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        """[B, T, I] -> [B, T, N, I]: the N places around each token, in order, zeros where `near` says no."""
        size = near.shape[-1]
        padded = nn.functional.pad(x, (0, 0, size // 2, size - 1 - size // 2))
        return padded.unfold(1, size, 1).transpose(-1, -2) * near.unsqueeze(-1)


def near_tokens(inputs: Inputs, size: int) -> Tensor:
    """bool [B, T, N]: which of the N places around each token are in its row and document, and no padding."""
    ids, index = inputs.input_ids, inputs.row_index
    own = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if index is None else index.expand_as(ids)
    length = ids.shape[1] if inputs.key_index is None else inputs.key_index.shape[1]
    around = own.unsqueeze(-1) + torch.arange(-(size // 2), size - size // 2, device=ids.device)
    near = (around >= 0) & (around < length)
    places = around.clamp(0, length - 1).flatten(1)
    if inputs.documents is not None:
        every = inputs.documents if inputs.key_documents is None else inputs.key_documents
        near &= every.gather(1, places).view_as(around) == inputs.documents.unsqueeze(-1)
    if inputs.attention_mask is not None:
        near &= inputs.attention_mask.bool().gather(1, places).view_as(around)
    return near


class ConvolvedBlock(DisentangledBlock):
    """The first block of v2's large sizes: a convolution of its input is added to what it gives, and normed."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.convolution = Convolution(config.width, config.convolution)
        self.convolution_norm = build_stack_norm(config)
        self.convolution_dropout = Dropout(config.residual_dropout, site=3)
        self.function: Callable[[Tensor], Tensor] = CONVOLUTION_ACTIVATIONS[config.convolution_activation]

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.convolution_dropout(self.convolution(x, context.near), context.token_keys, layer_key)
        return self.convolution_norm(super().forward(x, context, layer_key) + self.function(y))


CONVOLUTION_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": ACTIVATIONS["gelu"].function,
    "tanh": torch.tanh,
}
