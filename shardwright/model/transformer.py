"""One stack of blocks with an embedding below and a head above, assembled from one typed config: the decoders.

Stands on the other files of the model room; a family (gpt2.py, llama.py, ...) is a set of defaults for
`TransformerConfig`; encoder.py adds what encoders have beyond it, encoder_decoder.py a second stack. What a forward
pass needs beyond the activations is built once and handed to each block as a `Context` of tensors, so that all blocks
are one compiled graph and no block reads the host.
Shapes: B batch, T tokens, D width, V vocabulary, S keys (T, or more with a cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import ModelConfig, meaning
from shardwright.model import position
from shardwright.model.attention import Attention, Cache, LayerCache, as_bias, document_mask, padding_mask, row_mask
from shardwright.model.classifier import ClassHead, Classifier, Pooler, last_places
from shardwright.model.dropout import Dropout, layer_keys, token_keys
from shardwright.model.layers import ACTIVATIONS, MLP, build_norm

Kind = TypeVar("Kind", bound=Attention)
ActivationName = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"]


class TransformerConfig(ModelConfig):
    """Shape and choices of a Transformer stack; a family gives its own defaults and sizes."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {}
    #: What an objective can train: decoder, encoder or encoder-decoder.
    kind: ClassVar[str] = "decoder"
    #: Whether no token sees a later one.
    causal: ClassVar[bool] = True
    #: What scores of attention are multiplied by; None is 1 / sqrt(width of a head).
    score_scale: ClassVar[float | None] = None
    #: Which token the class of a text is told from.
    class_token: ClassVar[Literal["first", "last"]] = "last"
    #: Activation of a dense layer before the classifier of a text; None is without that layer and without a bias.
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = None
    #: Whether biases that are trained are added to scores, the same in all blocks.
    biased_scores: ClassVar[bool] = False

    size: str | None = meaning(None, "A published size of the family; fields given beside it win")
    layers: int = meaning(12, "Blocks", ge=1)
    width: int = meaning(768, "Width of the residual stream", ge=1)
    heads: int = meaning(12, "Query heads", ge=1)
    kv_heads: int | None = meaning(None, "Key and value heads; null is one for each query head", ge=1)
    head_dim: int | None = meaning(None, "Width of a head; null is width / heads", ge=1)
    mlp_width: int | None = meaning(None, "Feed-forward width; null is 4 x width, or 8/3 rounded up if gated", ge=1)
    max_length: int = meaning(1024, "Longest sequence", ge=1)
    position_offset: int = meaning(0, "Rows of the learned positions that come before the first one's", ge=0)
    positions: Literal["learned", "sinusoidal", "scaled", "rotary", "none"] = meaning("learned", "How positions enter")
    rope_theta: float = meaning(10000.0, "Base of the rotary angles", gt=0)
    rotary_share: float = meaning(1.0, "Share of a head's channels that turn", gt=0, le=1)
    norm: Literal["layer", "rms"] = meaning("layer", "Kind of norm")
    norm_eps: float = meaning(1e-5, "Added to the variance", gt=0)
    norm_weight: bool = meaning(True, "Norms have a weight; those of queries and keys always do")
    norm_bias: bool = meaning(True, "Layer norms have a bias")
    norm_placement: Literal["pre", "post"] = meaning("pre", "Norm before each part, or after its addition")
    embed_norm: bool = meaning(False, "A norm after the embedding")
    qk_norm: bool = meaning(False, "Norm of each head's queries and keys")
    activation: ActivationName = meaning("gelu_tanh", "Feed-forward activation")
    qkv_bias: bool = meaning(True, "Biases of q, k and v")
    out_bias: bool = meaning(True, "Bias of the attention's output")
    mlp_bias: bool = meaning(True, "Biases of the feed-forward layer")
    head_bias: bool = meaning(False, "Bias of the head")
    tied: bool = meaning(True, "The head is the token embedding")
    scale_embedding: bool = meaning(False, "Token vectors times the root of the width")
    logit_softcap: float | None = meaning(None, "Logits become cap x tanh(logits / cap)", gt=0)
    classify: Literal["none", "text", "tokens"] = meaning(
        "none", "What the head tells the class of, in the place of the next token; filled in by the objective"
    )
    classes: int = meaning(2, "Classes there are, where the head tells them; filled in by the objective", ge=2)
    embed_dropout: float = meaning(0.0, "Dropout after the embedding", ge=0, lt=1)
    residual_dropout: float = meaning(0.0, "Dropout of what attention and feed-forward add", ge=0, lt=1)
    attention_dropout: float = meaning(0.0, "Dropout of attention probabilities; not layout-independent", ge=0, lt=1)
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("gpt2", "Initialisation")
    init_std: float = meaning(0.02, "Standard deviation of the gpt2 and bert initialisations", gt=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, raw: Any) -> Any:
        size = raw.get("size") if isinstance(raw, dict) else None
        if not isinstance(size, str):
            return raw
        if size not in cls.SIZES:
            raise ValueError(f"size {size!r}: expected one of {', '.join(cls.SIZES) or 'none: it has no sizes'}")
        return {**cls.SIZES[size], **raw}

    @model_validator(mode="after")
    def _check_shape(self) -> TransformerConfig:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}; change one or give head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.positions == "rotary" and (self.rotary_width < 2 or self.rotary_width % 2):
            raise ValueError(f"rotary positions need an even number of channels, not {self.rotary_width}")
        if self.positions in ("sinusoidal", "scaled") and self.token_width % 2:
            raise ValueError(f"sinusoidal positions need an even width, not {self.token_width}")
        return self

    @property
    def num_kv_heads(self) -> int:
        """Key heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.head_width * self.rotary_share)

    @property
    def hidden_width(self) -> int:
        """Feed-forward width; gated ones keep the parameters of 4 x width, in multiples of 256 (Llama's rule)."""
        if self.mlp_width:
            return self.mlp_width
        return 256 * math.ceil(8 * self.width / 3 / 256) if self.gated else 4 * self.width

    @property
    def token_width(self) -> int:
        """Width of token vectors: that of the residual stream, unless an embedding is factorised."""
        return self.width

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return ACTIVATIONS[self.activation].gated

    @property
    def slower(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the turns of rotary positions; see position.py."""
        return None

    #: Whether blocks project a table that all of them share: no one of them has its gradient.
    projects_tables: ClassVar[bool] = False

    @property
    def ties_stages(self) -> bool:
        """Whether the last layer computes with a weight of the first one."""
        return self.tied and self.classify == "none"

    @property
    def runs(self) -> tuple[range, ...]:
        """The numbers of the blocks, in runs of blocks that are alike."""
        return (range(self.layers),)

    @property
    def num_blocks(self) -> int:
        """Blocks of all kinds."""
        return self.runs[-1].stop

    @property
    def repeats(self) -> int:
        """Times that each block is run, one after the other."""
        return 1

    def one_of_each(self) -> TransformerConfig:
        """The same with one block of each kind."""
        return self.model_copy(update={"layers": 1})

    def derived(self) -> dict[str, Any]:
        """What fields that may be null come to."""
        return {"kv_heads": self.num_kv_heads, "head_dim": self.head_width, "mlp_width": self.hidden_width}

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass in training needs the keys of stateless dropout."""
        return self.embed_dropout > 0 or self.residual_dropout > 0


class Inputs(NamedTuple):
    """What a forward pass is given. Only the token ids are needed; the rest defaults to one document a row."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor | None = None  # [B, T] int64, position in the document; default 0..T-1
    documents: Tensor | None = None  # [B, T] integer segment in the row; attention stays inside a segment
    attention_mask: Tensor | None = None  # [B, S], 0 where a key is padding
    sequence: Tensor | None = None  # [B] int64 sequence numbers, for dropout; default 0..B-1
    step: int | Tensor = 0  # for dropout
    seed: int = 0  # for dropout
    row_index: Tensor | None = None  # [T] or [B, T] place in the row; default 0..T-1
    key_index: Tensor | None = None  # [B, S] place in the row of each key, where more keys are seen than input_ids has
    key_documents: Tensor | None = None  # [B, S] `documents` of those keys
    token_types: Tensor | None = None  # [B, T] int64, which segment of a pair a token is of; default 0
    key_token_types: Tensor | None = None  # [B, S] `token_types` of those keys
    order: Tensor | None = None  # [B, T] int64, when each token comes where tokens are predicted in an order of its own
    key_order: Tensor | None = None  # [B, S] `order` of those keys
    places: Tensor | None = None  # [B, P] int64, which positions are predicted, where a model has to know
    virtual: int = 0  # tokens at the beginning of each row that all of its documents see
    # Of an encoder-decoder, whose target the tensors above are of: the same of its source, S tokens a row.
    encoder_ids: Tensor | None = None
    encoder_positions: Tensor | None = None
    encoder_documents: Tensor | None = None  # a target sees the source of its own document
    encoder_mask: Tensor | None = None
    encoder_row_index: Tensor | None = None
    encoder_key_index: Tensor | None = None
    encoder_key_documents: Tensor | None = None
    encoder_virtual: int = 0


class Context(NamedTuple):
    """What every block of one forward pass shares; built once by `LanguageModel.context`."""

    position_ids: Tensor  # [B or 1, T] int64
    mask: Tensor | None = None  # [B, 1, T, S], true (or 0 against -inf) where attended; holds the causal rule too
    causal: bool = True  # no query sees a later key; where mask is None the kernel's own rule does that
    cos: Tensor | None = None  # [B or 1, T, 1, d/2] float32
    sin: Tensor | None = None
    token_keys: Tensor | None = None  # [B, T] int64, where dropout is on
    layer_keys: Tensor | None = None  # [layers + 1] int64; a block is handed its own, so this is None there
    token_types: Tensor | None = None  # [B, T] int64, of the residual stream as position_ids are
    cross_mask: Tensor | None = None  # [B, 1, T, S], as `mask`, of the keys that an encoder gives
    encoder: Context | None = None  # what the blocks of the encoder share
    relative: Tensor | None = None  # [2R, D] vectors of relative distances
    distances: Tensor | None = None  # [B or 1, T, S] int64, row of `relative` for each query and key
    local_mask: Tensor | None = None  # as `mask`, of blocks that see a window
    local_cos: Tensor | None = None  # and their angles
    local_sin: Tensor | None = None
    near: Tensor | None = None  # [B, T, N] bool, which of the N neighbours of a token a convolution may see
    # Of two streams (two_stream.py), the second of P predicted tokens; `mask` is of both.
    places: Tensor | None = None  # [B, P]
    query_keys: Tensor | None = None  # [B, P] int64, as `token_keys`
    query_distances: Tensor | None = None  # [B, P, S] int64, as `distances`
    seeing: Tensor | None = None  # [B, 1, T + P, 1], false for a query that sees no key; there `mask` is true
    differ: Tensor | None = None  # [B, 1, T + P, S], true where key and query are of different segments

    @property
    def of_tokens(self) -> dict[str, Tensor | None]:
        """The fields that belong to tokens of the residual stream, each [B or 1, T] or, of a second stream, [B, P]."""
        names = ("position_ids", "token_keys", "token_types", "places", "query_keys")
        return {name: getattr(self, name) for name in names}


class Embed(nn.Module):
    """Token vectors, with positions added where they are vectors."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.token_width
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length + config.position_offset, width)
        elif config.positions == "scaled":
            self.positions = position.ScaledSinusoids(width)
        self.offset = config.position_offset
        self.sinusoidal = config.positions == "sinusoidal"
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.norm = build_stack_norm(config, width) if config.embed_norm else None
        self.dropout = Dropout(config.embed_dropout, site=0)

    def look_up(self, input_ids: Tensor, context: Context) -> Tensor:
        """ids [B, T] -> vectors [B, T, D] of the tokens alone."""
        x = self.tokens(input_ids)
        return x if self.scale == 1.0 else x * self.scale

    def forward(self, input_ids: Tensor, context: Context, layer_key: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        x = self.look_up(input_ids, context)
        if self.positions is not None:
            x = x + self.positions(context.position_ids + self.offset)
        if self.sinusoidal:
            x = x + position.sinusoidal(context.position_ids, x.shape[-1]).to(x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        return self.dropout(x, context.token_keys, layer_key)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of GPT-2 and after."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = build_stack_norm(config)
        self.attention = self.build_attention(config)
        self.mlp_norm = build_stack_norm(config)
        self.mlp = MLP(config.width, config.hidden_width, config.activation, bias=config.mlp_bias)
        self.attention_dropout = Dropout(config.residual_dropout, site=1)
        self.mlp_dropout = Dropout(config.residual_dropout, site=2)

    def build_attention(self, config: Any) -> nn.Module:
        """What lets tokens see each other."""
        return build_attention(config, Attention)

    def attend(self, x: Tensor, context: Context, layer_key: Tensor | None, cache: LayerCache | None) -> Tensor:
        """What attention adds to the residual stream."""
        y = self.attention(x, mask=context.mask, causal=context.causal, cos=context.cos, sin=context.sin, cache=cache)
        return self.attention_dropout(y, context.token_keys, layer_key)

    def feed(self, x: Tensor, context: Context, layer_key: Tensor | None) -> Tensor:
        """What the feed-forward layer adds to the residual stream."""
        return self.mlp_dropout(self.mlp(x), context.token_keys, layer_key)

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attend(self.attention_norm(x), context, layer_key, cache)
        return x + self.feed(self.mlp_norm(x), context, layer_key)


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x)): the block of the original Transformer."""

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.attention_norm(x + self.attend(x, context, layer_key, cache))
        return self.mlp_norm(x + self.feed(x, context, layer_key))


class LanguageModel(nn.Module):
    """A stack with a language-model head. A part of it has the other modules set to None."""

    #: Modules that are no layers: every part of a model has them, since blocks anywhere use them.
    shared_tables: ClassVar[tuple[str, ...]] = ()
    #: How names of a classifier's parameters begin -> how those do that pre-training has made of the same.
    pretrained: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("model.vocab_size=0: fill in the tokenizer's size before the model is built")
        self.config = config
        self.embed: Embed | None = self.build_embed(config)
        self.blocks = nn.ModuleDict({str(n): self.build_block(config, n) for n in range(config.num_blocks)})
        # A post-norm stack ends in a norm already.
        self.final_norm: nn.Module | None = build_stack_norm(config) if config.norm_placement == "pre" else None
        #: A `Classifier` where the config says so.
        self.head: Any = self.build_head(config) if config.classify == "none" else Classifier(self.build_label(config))

    def build_embed(self, config: Any) -> Embed:
        """What makes vectors of ids."""
        return Embed(config)

    def build_block(self, config: Any, number: int) -> nn.Module:
        """One block."""
        return Block(config) if config.norm_placement == "pre" else PostNormBlock(config)

    def build_head(self, config: Any) -> Head | None:
        """What the head has of its own, None where that is nothing."""
        return Head(config) if not config.tied or config.head_bias else None

    def build_label(self, config: Any) -> ClassHead:
        """What tells classes."""
        pooled = config.classify == "text" and config.class_pooler is not None
        pooler = Pooler(config.width, config.class_pooler) if pooled else None
        bias = config.classify == "tokens" or config.class_pooler is not None
        return ClassHead(config.width, config.classes, pooler, bias=bias)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The parts in the order of the forward pass, by name; a slice of them is a model that goes on from another."""
        parts: list[tuple[str, nn.Module | None]] = [("embed", self.embed)]
        parts += [(f"blocks.{n}", block) for n, block in self.blocks.items()]
        parts += [("final_norm", self.final_norm), ("head", self.head)]
        return [(name, module) for name, module in parts if module is not None]

    def steps(self) -> Iterator[tuple[int, nn.Module]]:
        """The blocks in the order in which they are run, each with the number of its layer."""
        repeats = self.config.repeats
        return ((int(name) * repeats + n, block) for name, block in self.blocks.items() for n in range(repeats))

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """What the blocks share, from inputs alone: every part of a model can build it for itself."""
        return self.with_layers(self.stream(inputs, cache.length if cache else 0, self.config.causal))

    def with_layers(self, context: Context) -> Context:
        """The same with what tells layers apart, where dropout is on."""
        if context.token_keys is None:
            return context
        layers = self.config.num_blocks * self.config.repeats
        return context._replace(layer_keys=layer_keys(layers, context.token_keys.device))

    def stream(self, inputs: Inputs, past: int, causal: bool) -> Context:
        """`context` of one stream of tokens, `past` of which a cache holds, without what tells layers apart."""
        ids, index = inputs.input_ids, inputs.row_index
        if index is None:
            index = torch.arange(past, past + ids.shape[1], device=ids.device)
        positions = torch.atleast_2d(index) if inputs.position_ids is None else inputs.position_ids
        mask, causal = build_mask(inputs, past, causal)
        cos, sin = None, None
        if self.config.positions == "rotary":
            cos, sin = position.rotary(positions, self.config.rotary_width, self.config.rope_theta, self.config.slower)
        context = Context(positions, mask, causal, cos, sin, token_types=inputs.token_types)
        if not (self.training and self.config.has_dropout):
            return context
        sequence = inputs.sequence
        if sequence is None:
            sequence = torch.arange(ids.shape[0], device=ids.device)
        return context._replace(token_keys=token_keys(inputs.seed, inputs.step, sequence, index))

    def border(self, shapes: Mapping[str, torch.Size]) -> int:
        """Tokens a row of what one part of a model hands to the next, by the shapes of a batch's arrays."""
        return shapes["input_ids"][1]

    def hidden(self, inputs: Inputs, x: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Activations [B, T, D] after the final norm; `x` [B, T, D] enters where an earlier stage left off."""
        context = self.context(inputs, cache)
        keys = context.layer_keys
        context = context._replace(layer_keys=None)
        if x is None:
            assert self.embed is not None, "a part without the embedding needs the activations of the part before it"
            x = self.embed(inputs.input_ids, context, None if keys is None else keys[0])
        context = context._replace(mask=suit_kernel(context.mask, x), local_mask=suit_kernel(context.local_mask, x))
        for n, (layer, block) in enumerate(self.steps()):
            key = None if keys is None else keys[layer + 1]
            x = block(x, context, key, None if cache is None else cache.layers[n])
        return x if self.final_norm is None else self.final_norm(x)

    def output(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """Of what the last block gave, what the heads read: all of it, where a model has one stream."""
        return hidden

    def build_cache(self, size: int) -> Cache:
        """For so many tokens."""
        return Cache(self.config.num_blocks, size)

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the token embedding's where tied."""
        if self.head is not None and self.head.weight is not None:
            return self.head.weight
        assert self.embed is not None, "a tied head needs the embedding"
        return self.embed.tokens.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        return None if self.head is None else self.head.bias

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """[..., D] -> [..., D] before the product with the head's weight; None where there is nothing."""
        return None if self.head is None else self.head.transform

    def other_heads(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What else is told from hidden states [..., D], by name: logits of the kinds that it tells apart."""
        return {"label": self.head.label} if isinstance(self.head, Classifier) else {}

    def class_logits(self, hidden: Tensor, inputs: Inputs) -> Tensor:
        """[B, T, D] -> [B, C] of texts, or [B, T, C] of tokens."""
        if self.config.classify == "text":
            places = last_places(inputs.input_ids, inputs.attention_mask)
            places = torch.zeros_like(places) if self.config.class_token == "first" else places
            hidden = hidden[torch.arange(len(places), device=places.device), places]
        return self.head.label(hidden)

    def answer(self, hidden: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """`logits` of the only head that a model without others has."""
        if self.config.classify != "none":
            return {"logits": self.class_logits(hidden, inputs)}
        return {"logits": self.logits(hidden)}

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], soft-capped where the config says so."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        logits = F.linear(hidden, self.head_weight, self.head_bias)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        """Logits [B, T, V] under Hugging Face's names; `documents` [B, T] keeps packed documents apart.

        Of a classifier [B, C], at the last token that `attention_mask` leaves, or [B, T, C] of tokens.
        """
        inputs = Inputs(input_ids, position_ids, documents, attention_mask)
        return self.answer(self.hidden(inputs, cache=cache), inputs)


class Head(nn.Module):
    """The head's own parameters: a weight where it is free, a bias where it has one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.token_width)
        self.weight = None if config.tied else nn.Parameter(torch.empty(shape).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self.transform: nn.Module | None = None


def build_stack_norm(config: TransformerConfig, width: int | None = None) -> nn.Module:
    """A norm of the residual stream, or of what else is so wide."""
    return build_norm(
        config.norm, width or config.width, eps=config.norm_eps, weight=config.norm_weight, bias=config.norm_bias
    )


def build_attention(config: TransformerConfig, kind: type[Kind]) -> Kind:
    """An attention of this kind, as wide as the config says."""
    return kind(
        config.width,
        config.heads,
        config.num_kv_heads,
        config.head_width,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=config.norm if config.qk_norm else None,
        norm_eps=config.norm_eps,
        dropout=config.attention_dropout,
        scale=config.score_scale,
    )


def suit_kernel(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask as attention of `x` takes it: CPU kernels want an additive one, turned over once and not once a block."""
    if mask is None or mask.dtype != torch.bool or x.device.type != "cpu":
        return mask
    return as_bias(mask, x.dtype)


def build_mask(inputs: Inputs, past: int, causal: bool) -> tuple[Tensor | None, bool]:
    """(mask, causal): no mask where the kernel's own rule is enough."""
    length = inputs.input_ids.shape[1]
    if inputs.key_index is not None:
        assert past == 0, "keys of other places and a cache do not go together"
        assert inputs.row_index is not None, "key_index needs row_index beside it"
        assert inputs.attention_mask is None, "padding and keys of other places do not go together"
        return row_mask(inputs.row_index, inputs.key_index, inputs.documents, inputs.key_documents, causal), causal
    if inputs.documents is not None:
        assert past == 0, "packed documents and a cache do not go together"
        mask = document_mask(inputs.documents, causal, inputs.virtual)
        return (
            mask if inputs.attention_mask is None else mask & padding_mask(inputs.attention_mask, 0, causal)
        ), causal
    if inputs.attention_mask is not None:
        return padding_mask(inputs.attention_mask, past, causal), causal
    if past and length > 1:
        return padding_mask(inputs.input_ids.new_ones(1, past + length), past), True
    return None, causal and past == 0
