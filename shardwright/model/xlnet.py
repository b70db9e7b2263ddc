"""XLNet (Yang et al. 2019): tokens predicted in a random order of a row that stays as it is.

A line of families.py; its attention and block are two_stream.py's. `order` says when each token comes; a token sees
those that come before it, and unpredicted ones, which all come first, see each other. Without an order it is an encoder
with relative positions. No memory of segments before: rows are whole documents, or kept apart by `documents`.
Shapes: B batch, T tokens, P predicted ones, filled up to a multiple of 8, N = T + P, S keys, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model.attention import Cache
from shardwright.model.dropout import mix, token_keys
from shardwright.model.family import (
    Extra,
    Family,
    HuggingFaceMap,
    TensorRule,
    class_rules,
    class_variants,
    weight_and_bias,
)
from shardwright.model.position import relative_sinusoidal
from shardwright.model.transformer import ActivationName, Context, Embed, Inputs, LanguageModel, TransformerConfig
from shardwright.model.two_stream import TwoStreamBlock, stream_keys

MULTIPLE = 8  # of the query stream's length, so that ranks can cut it, and as matrix products like it
_QUERY = 0x51A7E  # tells dropout of the query stream from that of the content stream at the same place

#: What the family cannot have otherwise.
FIXED: dict[str, Any] = {
    "kv_heads": None,
    "positions": "relative",
    "norm_placement": "post",
    "qk_norm": False,
    "qkv_bias": False,
    "out_bias": False,
    "embed_norm": False,
    "scale_embedding": False,
}


class XLNetConfig(TransformerConfig):
    """XLNet's choices; its sizes are BERT's."""

    kind: ClassVar[str] = "two-stream"
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = "tanh"
    causal: ClassVar[bool] = False
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 12, "width": 768, "heads": 12},
        "large": {"layers": 24, "width": 1024, "heads": 16},
    }

    family: Literal["xlnet"] = meaning("xlnet", "Model family")
    max_length: int = meaning(512, "Longest sequence; no weight depends on it", ge=1)
    positions: Literal["relative"] = meaning("relative", "How positions enter")  # type: ignore[assignment]
    norm_eps: float = meaning(1e-12, "Added to the variance", gt=0)
    norm_placement: Literal["pre", "post"] = meaning("post", "Norm before each part, or after its addition")
    activation: ActivationName = meaning("gelu", "Feed-forward activation")
    qkv_bias: bool = meaning(False, "Biases of q, k and v")
    out_bias: bool = meaning(False, "Bias of the attention's output")
    head_bias: bool = meaning(True, "Bias of the head")
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("bert", "Initialisation")

    @model_validator(mode="after")
    def _check_fixed(self) -> XLNetConfig:
        for field, only in FIXED.items():
            if getattr(self, field) != only:
                raise ValueError(f"{field}={getattr(self, field)!r}: XLNet has {only!r} alone")
        if self.width % 2:
            raise ValueError(f"relative positions need an even width, not {self.width}")
        return self


class Query(nn.Module):
    """The vector that every predicted token starts from in the query stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(std=0.02))

    def forward(self, places: Tensor) -> Tensor:
        """[B, P] -> [B, P, D]."""
        return self.weight.expand(*places.shape, -1)


class TwoStreamEmbed(Embed):
    """Token vectors, and after them the query stream where something is predicted."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.query = Query(config.width)

    def forward(self, input_ids: Tensor, context: Context, layer_key: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, N, D]."""
        x = self.tokens(input_ids)
        if context.places is not None:
            x = torch.cat([x, self.query(context.places).to(x.dtype)], dim=1)
        return self.dropout(x, stream_keys(context), layer_key)


class XLNet(LanguageModel):
    """A two-stream encoder with a language-model head."""

    config: XLNetConfig

    def build_embed(self, config: Any) -> Embed:
        """Tokens and the query stream's first vector."""
        return TwoStreamEmbed(config)

    def build_block(self, config: Any, number: int) -> nn.Module:
        """One of two streams."""
        return TwoStreamBlock(config)

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """What the blocks share, from inputs alone."""
        if cache is not None:
            raise ValueError("XLNet keeps no cache of keys")
        inputs = inputs._replace(places=fill_up(queried(inputs)))
        ids = inputs.input_ids
        index = torch.arange(ids.shape[1], device=ids.device) if inputs.row_index is None else inputs.row_index
        index = torch.atleast_2d(index).expand(ids.shape[0], -1)
        keys = index if inputs.key_index is None else inputs.key_index
        mask = build_mask(inputs)
        seeing = None if mask is None else mask.any(-1, keepdim=True)
        context = Context(
            position_ids=index,
            causal=False,
            relative=relative_sinusoidal(keys.shape[1], self.config.width, ids.device),
            mask=mask if seeing is None or mask is None else mask | ~seeing,
            seeing=seeing,
            differ=build_differ(inputs),
            distances=None if inputs.row_index is None else distance_rows(index, keys),
            query_distances=None if inputs.places is None else distance_rows(index.gather(1, inputs.places), keys),
            places=inputs.places,
        )
        if not (self.training and self.config.has_dropout):
            return context
        sequence = torch.arange(len(ids), device=ids.device) if inputs.sequence is None else inputs.sequence
        tokens = token_keys(inputs.seed, inputs.step, sequence, context.position_ids)
        queries = None if inputs.places is None else mix(tokens.gather(1, inputs.places) ^ _QUERY)
        return self.with_layers(context._replace(token_keys=tokens, query_keys=queries))

    def hidden(self, inputs: Inputs, x: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Activations [B, N, D], of the content stream and then of the query stream; see `output`."""
        context = self.context(inputs, cache)
        keys = context.layer_keys
        context = context._replace(layer_keys=None)
        if x is None:
            assert self.embed is not None, "a part without the embedding needs the activations of the part before it"
            x = self.embed(inputs.input_ids, context, None if keys is None else keys[0])
        for name, block in self.blocks.items():
            x = block(x, context, None if keys is None else keys[int(name) + 1], None)
        return x

    def output(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Of [B, N, D] the query stream [B, P, D] where something is predicted; its first ones are those asked for."""
        places = queried(inputs)
        if places is None:
            return hidden
        tokens, predicted = inputs.input_ids.shape[1], stream_length(places.shape[1])
        # A rank may have a slice of each stream.
        return hidden[:, hidden.shape[1] * tokens // (tokens + predicted) :]

    def border(self, shapes: Mapping[str, torch.Size]) -> int:
        """Tokens a row between parts of the model: of both streams."""
        return super().border(shapes) + (stream_length(shapes["places"][1]) if "order" in shapes else 0)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        documents: Tensor | None = None,
        order: Tensor | None = None,
        places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logits` [B, T, V]; with `order` [B, T] and `places` [B, P] those of the predicted tokens, [B, P, V].

        Hugging Face's `perm_mask[b, i, j]` is 1 where order[b, j] >= order[b, i], but for tokens of one unpredicted
        rank, and its `target_mapping` one-hot at places. `documents` [B, T] keeps packed documents apart.
        A classifier's are [B, C], at the last token, or [B, T, C].
        """
        if places is not None and order is None:
            raise ValueError("places need the order in which tokens are predicted beside them")
        inputs = Inputs(
            input_ids, None, documents, attention_mask, token_types=token_type_ids, order=order, places=places
        )
        output = self.output(self.hidden(inputs), inputs)
        return self.answer(output if places is None else output[:, : places.shape[1]], inputs)


def queried(inputs: Inputs) -> Tensor | None:
    """[B, P], the places that have a query stream: none where a class is told from one."""
    return None if inputs.order is None else inputs.places


def stream_length(predicted: int) -> int:
    """Length of a query stream of so many tokens."""
    return -(-predicted // MULTIPLE) * MULTIPLE


def fill_up(places: Tensor | None) -> Tensor | None:
    """[B, P'] -> [B, P], the last ones at place 0."""
    return None if places is None else F.pad(places, (0, stream_length(places.shape[1]) - places.shape[1]))


def build_mask(inputs: Inputs) -> Tensor | None:
    """[B, 1, N, S], true where a query of either stream sees a key; None where all see all."""
    parts = [_visible(inputs, None)]
    if inputs.places is not None:
        parts.append(_visible(inputs, inputs.places))
    found = [part for part in parts if part is not None]
    if not found:
        return None
    length = inputs.input_ids.shape[1]
    sizes = [length, 0 if inputs.places is None else inputs.places.shape[1]]
    rows = [part.expand(-1, size, -1) for part, size in zip(found, sizes, strict=False)]
    return torch.cat(rows, dim=1).unsqueeze(1)


def _visible(inputs: Inputs, places: Tensor | None) -> Tensor | None:
    """[B, n or 1, S] of the content stream's queries, or of those at `places`, which do not see themselves."""
    rules = []
    if inputs.attention_mask is not None:
        rules.append(inputs.attention_mask.bool().unsqueeze(1))
    if inputs.documents is not None:
        keys = inputs.documents if inputs.key_documents is None else inputs.key_documents
        rules.append(_of(inputs.documents, places) == keys.unsqueeze(1))
    if inputs.order is not None:
        keys, own = inputs.order if inputs.key_order is None else inputs.key_order, _of(inputs.order, places)
        rules.append(keys.unsqueeze(1) <= own if places is None else keys.unsqueeze(1) < own)
    visible: Tensor | None = None
    for rule in rules:
        visible = rule if visible is None else visible & rule
    return visible


def build_differ(inputs: Inputs) -> Tensor | None:
    """[B, 1, N, S], true where query and key are of different segments; None without segments."""
    types = inputs.token_types
    if types is None:
        return None
    keys = types if inputs.key_token_types is None else inputs.key_token_types
    queries = _of(types, None)
    if inputs.places is not None:
        queries = torch.cat([queries, _of(types, inputs.places)], dim=1)
    return (queries != keys.unsqueeze(1)).unsqueeze(1)


def _of(x: Tensor, places: Tensor | None) -> Tensor:
    """[B, T] -> [B, n, 1], at `places` [B, n] where they are given."""
    return (x if places is None else x.gather(1, places)).unsqueeze(-1)


def distance_rows(index: Tensor, keys: Tensor) -> Tensor:
    """Rows of the table of distances [B, n, S] of queries at `index` [B, n] in the row and keys at `keys` [B, S]."""
    return keys.shape[1] - 1 - index.unsqueeze(-1) + keys.unsqueeze(-2)


def extra_cost(config: XLNetConfig, length: int, rows: int, predicted: float) -> Extra:
    """What blocks cost beyond plain ones of one stream. Symbols as in count.py.

    A product of queries with the vectors of all 2T - 1 distances, and once for all rows of a micro-batch these vectors'
    projection (which have no gradient). Where not all tokens are predicted, those that are have queries of their own:
    q, out, attention and feed-forward layer. Kept, for one stream and as torch does it on a CPU: queries twice,
    probabilities in place of their log-sum-exp, a copy of the distances for every row.
    """
    inner, distances = config.heads * config.head_width, 2 * length - 1
    projection = 2.0 * config.width * inner * distances / rows
    streams = 1 + (predicted if predicted < 1 else 0)
    query = 2.0 * config.width * (2 * inner + (3 if config.gated else 2) * config.hidden_width) + 4.0 * inner * length
    block = projection + length * (streams * 2.0 * inner * distances + (streams - 1) * query)
    return Extra(
        (block,),
        constant=config.layers * projection,
        values=inner + config.heads * (length - 1),
        fixed=rows * inner * distances,
    )


def _split_heads(*dims: str) -> Any:
    """The shape of theirs: our config's fields."""
    return lambda config: tuple(int(name) if name.isdigit() else getattr(config, name) for name in dims)


_MATRIX, _VECTOR = _split_heads("width", "heads", "head_width"), _split_heads("heads", "head_width")
_ATTENTION = "transformer.layer.{n}.rel_attn."
_OURS = "blocks.{n}.attention."

HUGGINGFACE = HuggingFaceMap(
    architecture="XLNetLMHeadModel",
    model_type="xlnet",
    variants={"XLNetLMHeadModel": {"classify": "none"}, **class_variants("XLNet")},
    classifying={"summary_type": "last", "summary_use_proj": True, "summary_activation": "tanh"},
    fields={
        "vocab_size": ("vocab_size",),
        "layers": ("n_layer",),
        "width": ("d_model",),
        "heads": ("n_head",),
        "mlp_width": ("d_inner",),
        "norm_eps": ("layer_norm_eps",),
        "attention_dropout": ("dropout",),
        "embed_dropout": ("dropout",),
        "residual_dropout": ("dropout",),
        "init_std": ("initializer_range",),
        "tied": ("tie_word_embeddings",),
    },
    values={"activation": ("ff_activation", {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"})},
    ours={
        **FIXED,
        "head_dim": None,
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "mlp_bias": True,
        "head_bias": True,
        "logit_softcap": None,
    },
    theirs={"attn_type": "bi", "bi_data": False, "clamp_len": -1, "same_length": False},
    defaults={
        "vocab_size": 32000, "d_model": 1024, "n_layer": 24, "n_head": 16, "d_inner": 4096, "dropout": 0.1,
    },
    tensors=(
        TensorRule("transformer.word_embedding.weight", ("embed.tokens.weight",)),
        TensorRule("transformer.mask_emb", ("embed.query.weight",), shape=_split_heads("1", "1", "width")),
        *(TensorRule(f"{_ATTENTION}{x}", (f"{_OURS}{x}.weight",), True, shape=_MATRIX) for x in "qkvr"),
        TensorRule(f"{_ATTENTION}o", (f"{_OURS}out.weight",), shape=_MATRIX),
        TensorRule(f"{_ATTENTION}r_w_bias", (f"{_OURS}terms.content",), shape=_VECTOR),
        TensorRule(f"{_ATTENTION}r_r_bias", (f"{_OURS}terms.position",), shape=_VECTOR),
        TensorRule(f"{_ATTENTION}r_s_bias", (f"{_OURS}terms.segment",), shape=_VECTOR),
        TensorRule(
            f"{_ATTENTION}seg_embed", (f"{_OURS}terms.segments",), shape=_split_heads("2", "heads", "head_width")
        ),
        *weight_and_bias(f"{_ATTENTION}layer_norm", "blocks.{n}.attention_norm"),
        *weight_and_bias("transformer.layer.{n}.ff.layer_1", "blocks.{n}.mlp.up"),
        *weight_and_bias("transformer.layer.{n}.ff.layer_2", "blocks.{n}.mlp.down"),
        *weight_and_bias("transformer.layer.{n}.ff.layer_norm", "blocks.{n}.mlp_norm"),
        *weight_and_bias("lm_loss", "head"),
        *class_rules("logits_proj", "classifier", "sequence_summary.summary"),
    ),
    tied=("lm_loss.weight", "transformer.word_embedding.weight"),
    prefix="transformer.",
)  # fmt: skip

FAMILY = Family(XLNetConfig, XLNet, HUGGINGFACE, extra=extra_cost)
