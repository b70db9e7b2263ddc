"""Encoders: stacks in which every token sees every other, with segments, and heads of their own (Devlin et al. 2019).

Stands on transformer.py, whose blocks and stack they are; a family (bert.py, roberta.py, ...) is a set of defaults for
`EncoderConfig`. Shapes: B batch, T tokens, D width, V vocabulary, N any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model.layers import ACTIVATIONS, Linear
from shardwright.model.transformer import (
    ActivationName,
    Context,
    Embed,
    Head,
    Inputs,
    LanguageModel,
    TransformerConfig,
    build_stack_norm,
)


class EncoderConfig(TransformerConfig):
    """BERT's choices: post-norm, exact GELU, learned positions, two segments, a transform before the tied head."""

    kind: ClassVar[str] = "encoder"
    causal: ClassVar[bool] = False
    class_token: ClassVar[Literal["first", "last"]] = "first"
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = "tanh"

    max_length: int = meaning(512, "Longest sequence", ge=1)
    norm_eps: float = meaning(1e-12, "Added to the variance", gt=0)
    norm_placement: Literal["pre", "post"] = meaning("post", "Norm before each part, or after its addition")
    embed_norm: bool = meaning(True, "A norm after the embedding")
    activation: ActivationName = meaning("gelu", "Feed-forward activation")
    head_bias: bool = meaning(True, "Bias of the head")
    token_types: int = meaning(2, "Kinds of segments that a token may be of; 0 leaves their vectors out", ge=0)
    head_transform: bool = meaning(True, "A dense layer, activation and norm before the head")
    transform_bias: bool = meaning(True, "Bias of that dense layer")
    embed_width: int | None = meaning(None, "Width of token vectors, then projected; null is the width itself", ge=1)
    sentence_head: bool = meaning(False, "A pooler and a classifier of pairs of segments, on the first token")
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("bert", "Initialisation")

    @model_validator(mode="after")
    def _check_factors(self) -> EncoderConfig:
        if self.embed_width is not None and not self.head_transform:
            raise ValueError(
                f"embed_width={self.embed_width} needs head_transform, which brings hidden states back to it"
            )
        return self

    @property
    def token_width(self) -> int:
        """Width of token vectors."""
        return self.embed_width or self.width


class SegmentEmbed(Embed):
    """Token vectors with those of their segments added; where they are narrower, brought to the stream's width."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        narrow = config.token_width
        self.token_types = nn.Embedding(config.token_types, narrow) if config.token_types else None
        self.projection = Linear(narrow, config.width) if config.embed_width else None

    def look_up(self, input_ids: Tensor, context: Context) -> Tensor:
        """ids [B, T] -> vectors [B, T, D] of tokens and segments."""
        x = super().look_up(input_ids, context)
        if self.token_types is None:
            return x
        kinds = context.token_types
        return x + self.token_types(x.new_zeros(x.shape[:-1], dtype=torch.int64) if kinds is None else kinds)

    def forward(self, input_ids: Tensor, context: Context, layer_key: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        x = super().forward(input_ids, context, layer_key)
        return x if self.projection is None else self.projection(x)


class Transform(nn.Module):
    """norm(act(dense(x))): what BERT puts before the product with the token vectors."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.token_width, bias=config.transform_bias)
        self.function = ACTIVATIONS[config.activation].function
        self.norm = build_stack_norm(config, config.token_width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., width of token vectors]."""
        return self.norm(self.function(self.dense(x)))


class SentenceHead(nn.Module):
    """classifier(tanh(pooler(x))) of first tokens: whether the second segment is what it should be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pooler = Linear(width, width)
        self.classifier = Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> logits [N, 2]; class 0 is a pair as it stood in the text."""
        return self.classifier(torch.tanh(self.pooler(x)))


class EncoderHead(Head):
    """The head's own parameters, a transform before it, and the head for pairs beside it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.transform = Transform(config) if config.head_transform else None
        self.sentence = SentenceHead(config.width) if config.sentence_head else None


class Encoder(LanguageModel):
    """An encoder with a language-model head."""

    pretrained: ClassVar[Mapping[str, str]] = {"head.label.pooler.dense.": "head.sentence.pooler."}
    #: What Hugging Face calls the logits of the head for pairs.
    pairs: ClassVar[str] = "seq_relationship_logits"

    def build_embed(self, config: Any) -> Embed:
        """Tokens, segments and positions."""
        return SegmentEmbed(config)

    def build_head(self, config: Any) -> Head | None:
        """None where tied and without anything of its own."""
        plain = config.tied and not (config.head_bias or config.head_transform or config.sentence_head)
        return None if plain else EncoderHead(config)

    def other_heads(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """`sentence`: [N, D] of first tokens -> [N, 2]."""
        found = getattr(self.head, "sentence", None)
        return super().other_heads() if found is None else {"sentence": found}

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logits` [B, T, V] under Hugging Face's names, and those of pairs [B, 2] where there is that head.

        Of a classifier [B, C], at the first token, or [B, T, C]. `documents` [B, T] keeps packed documents apart.
        """
        inputs = Inputs(input_ids, position_ids, documents, attention_mask, token_types=token_type_ids)
        hidden = self.hidden(inputs)
        answer, sentence = self.answer(hidden, inputs), getattr(self.head, "sentence", None)
        return answer if sentence is None else {**answer, self.pairs: sentence(hidden[:, 0])}
