"""Virtual tokens before a row: prompt tuning (Lester et al. 2021) and p-tuning (Liu et al. 2021).

Under build.py. Their vectors are trained themselves, or come out of a small network (p-tuning), and take the places 0
to n - 1 of what a model reads: the row of a decoder or encoder, the source of an encoder-decoder. They have ids beyond
the vocabulary, so that what knows places of tokens (positions, masks, distances) needs not know of them; what comes out
at their places is cut off, so that labels and places of an objective stay as they are.
Of packed documents each sees them and has its own positions after them, as if it stood alone; in an encoder they see
all documents of their row.
Shapes: B batch, T tokens, n virtual tokens, D width of token vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.config import AdaptConfig
from shardwright.model.attention import Cache
from shardwright.model.layers import Linear
from shardwright.model.transformer import Inputs


class PromptEncoder(nn.Module):
    """Three layers from a table's vectors to those of virtual tokens, as peft's MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second, self.third = Linear(width, hidden), Linear(hidden, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, D]."""
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class VirtualTokens(nn.Embedding):
    """Token vectors with those of virtual tokens, whose ids follow the vocabulary's.

    `scale`: what all vectors are multiplied by afterwards; theirs are not.
    """

    def __init__(self, base: nn.Embedding, config: AdaptConfig, scale: float) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.scale = base.num_embeddings, base.embedding_dim, scale
        self.weight = base.weight
        self.prompt = nn.Parameter(base.weight.new_empty(config.tokens, base.embedding_dim))
        hidden = config.encoder_width or base.embedding_dim
        self.encoder = PromptEncoder(base.embedding_dim, hidden) if config.method == "p_tuning" else None

    def vectors(self) -> Tensor:
        """[n, D] of the virtual tokens."""
        return self.prompt if self.encoder is None else self.encoder(self.prompt)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        known = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        rows = (ids - self.num_embeddings).clamp(min=0)
        virtual = F.embedding(rows, self.vectors() / self.scale)
        return torch.where((ids >= self.num_embeddings).unsqueeze(-1), virtual, known)


def apply_prompt(model: Any, config: AdaptConfig) -> None:
    """Put virtual tokens before all that a model reads, in place."""
    n, paired = config.tokens, model.config.kind == "encoder-decoder"
    embed, hidden, build_cache = model.embed, model.hidden, model.build_cache
    embed.tokens = VirtualTokens(embed.tokens, config, embed.scale)

    def prompted(inputs: Inputs, x: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        if paired:
            return hidden(before_source(inputs, n, model.config.vocab_size), x, cache)
        if cache is not None and cache.length:  # which holds them
            return hidden(behind(inputs, n), x, cache)
        return hidden(before_row(inputs, n, model.config.vocab_size), x, cache)[:, n:]

    model.hidden = prompted
    if not paired:
        model.build_cache = lambda size: build_cache(size + n)
        shorten(model, n)


def shorten(model: Any, n: int) -> None:
    """Let a decoder generate so much less that the last position is one that it has."""
    if model.config.kind == "decoder":
        model.config = model.config.model_copy(update={"max_length": model.config.max_length - n})


def before_row(inputs: Inputs, n: int, first: int) -> Inputs:
    """The same with n virtual tokens before each row; `first`: the id of the first of them."""
    assert inputs.row_index is None and inputs.order is None, "virtual tokens go before whole rows in their own order"
    return behind(inputs, n)._replace(
        input_ids=_with_ids(inputs.input_ids, n, first),
        position_ids=_with_places(inputs.position_ids, n),
        documents=_with_documents(inputs.documents, n),
        token_types=None if inputs.token_types is None else F.pad(inputs.token_types, (n, 0)),
        virtual=n,
    )


def behind(inputs: Inputs, n: int) -> Inputs:
    """The same for tokens that have n virtual ones before them."""
    places, mask = inputs.position_ids, inputs.attention_mask
    return inputs._replace(
        position_ids=None if places is None else places + n,
        attention_mask=None if mask is None else F.pad(mask, (n, 0), value=1),
    )


def before_source(inputs: Inputs, n: int, first: int) -> Inputs:
    """As `before_row`, before the source of an encoder-decoder."""
    ids, mask = inputs.encoder_ids, inputs.encoder_mask
    return inputs._replace(
        encoder_ids=None if ids is None else _with_ids(ids, n, first),
        encoder_positions=_with_places(inputs.encoder_positions, n),
        encoder_documents=_with_documents(inputs.encoder_documents, n),
        encoder_mask=None if mask is None else F.pad(mask, (n, 0), value=1),
        encoder_virtual=n,
    )


def _with_ids(ids: Tensor, n: int, first: int) -> Tensor:
    new = torch.arange(first, first + n, device=ids.device, dtype=ids.dtype)
    return torch.cat([new.expand(ids.shape[0], n), ids], dim=1)


def _with_places(places: Tensor | None, n: int) -> Tensor | None:
    if places is None:
        return None
    new = torch.arange(n, device=places.device, dtype=places.dtype)
    return torch.cat([new.expand(places.shape[0], n), places + n], dim=1)


def _with_documents(documents: Tensor | None, n: int) -> Tensor | None:
    """Theirs is the first document's number; that all see them is told by `virtual`."""
    return None if documents is None else torch.cat([documents[:, :1].expand(-1, n), documents], dim=1)
