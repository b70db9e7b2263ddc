"""Encoder-decoders: one stack reads a source, the other writes a target and looks at what the first made of it.

Stands on transformer.py; a family (t5.py, bart.py, ...) is a set of defaults for `EncoderDecoderConfig`. Both stacks
are one row of numbered blocks, the encoder's first. A model is two streams of activations: inside of it they are apart,
and where it is cut, they are joined along the tokens, source before target. Arrays named `encoder_` are of the source.
Shapes: B batch, S tokens of a source, T tokens of a target, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model import position
from shardwright.model.attention import Cache, CrossAttention, LayerCache, padding_mask
from shardwright.model.dropout import Dropout
from shardwright.model.transformer import (
    Block,
    Context,
    Inputs,
    LanguageModel,
    PostNormBlock,
    TransformerConfig,
    build_attention,
    build_stack_norm,
    suit_kernel,
)


class EncoderDecoderConfig(TransformerConfig):
    """Shape and choices of two stacks that differ in the number of their blocks alone."""

    kind: ClassVar[str] = "encoder-decoder"
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = "tanh"
    causal: ClassVar[bool] = False  # of the source every token sees every other

    layers: int = meaning(6, "Blocks of the encoder", ge=1)
    decoder_layers: int | None = meaning(None, "Blocks of the decoder; null is as many as of the encoder", ge=1)
    max_length: int = meaning(512, "Longest sequence, of a source or a target", ge=1)
    sinusoid: Literal["halves", "interleaved"] = meaning("halves", "Where sines and cosines stand among the channels")
    scale_logits: bool = meaning(False, "Hidden states over the root of the width before the head")

    @model_validator(mode="after")
    def _check_classes(self) -> EncoderDecoderConfig:
        if self.classify == "tokens":
            raise ValueError("classify=tokens: an encoder-decoder tells classes of texts alone; use an encoder")
        return self

    @property
    def num_decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.decoder_layers or self.layers

    @property
    def runs(self) -> tuple[range, ...]:
        """The encoder's blocks, then the decoder's."""
        return range(self.layers), range(self.layers, self.layers + self.num_decoder_layers)

    def one_of_each(self) -> EncoderDecoderConfig:
        """The same with one block of each stack."""
        return self.model_copy(update={"layers": 1, "decoder_layers": 1})

    def derived(self) -> dict[str, Any]:
        """What fields that may be null come to."""
        return {**super().derived(), "decoder_layers": self.num_decoder_layers}


class StreamEmbed(nn.Module):
    """What one stream adds to the vectors of its tokens: positions, a norm, dropout."""

    def __init__(self, config: EncoderDecoderConfig, site: int) -> None:
        super().__init__()
        rows, learned = config.max_length + config.position_offset, config.positions == "learned"
        self.positions = nn.Embedding(rows, config.width) if learned else None
        self.offset = config.position_offset
        self.sinusoid = config.sinusoid if config.positions == "sinusoidal" else None
        self.norm = build_stack_norm(config) if config.embed_norm else None
        self.dropout = Dropout(config.embed_dropout, site)

    def forward(self, x: Tensor, context: Context, layer_key: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.positions is not None:
            x = x + self.positions(context.position_ids + self.offset)
        if self.sinusoid is not None:
            halves = self.sinusoid == "halves"
            x = x + position.sinusoidal(context.position_ids, x.shape[-1], halves=halves).to(x.dtype)
        x = x if self.norm is None else self.norm(x)
        return self.dropout(x, context.token_keys, layer_key)


class PairEmbed(nn.Module):
    """Token vectors that both streams share, and what each adds to its own."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        self.encoder = StreamEmbed(config, site=0)
        self.decoder = StreamEmbed(config, site=4)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> vectors [B, T, D] of the tokens alone."""
        x = self.tokens(ids)
        return x if self.scale == 1.0 else x * self.scale

    def source(self, ids: Tensor, context: Context, layer_key: Tensor | None) -> Tensor:
        """ids [B, S] -> [B, S, D]."""
        return self.encoder(self.look_up(ids), context, layer_key)

    def target(self, ids: Tensor, context: Context, layer_key: Tensor | None) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        return self.decoder(self.look_up(ids), context, layer_key)


class DecoderBlock(Block):
    """x + attention(norm(x)), x + cross(norm(x), memory), x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.cross_norm = build_stack_norm(config)
        self.cross = build_attention(config, CrossAttention)
        self.cross_dropout = Dropout(config.residual_dropout, site=3)

    def look(
        self, x: Tensor, memory: Tensor | None, context: Context, layer_key: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """What attention to the source adds to the residual stream."""
        y = self.cross(x, memory=memory, mask=context.cross_mask, cache=cache)
        return self.cross_dropout(y, context.token_keys, layer_key)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        memory: Tensor | None,
        context: Context,
        layer_key: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D], memory [B, S, D] -> [B, T, D]."""
        x = x + self.attend(self.attention_norm(x), context, layer_key, cache)
        x = x + self.look(self.cross_norm(x), memory, context, layer_key, cache)
        return x + self.feed(self.mlp_norm(x), context, layer_key)


class PostNormDecoderBlock(DecoderBlock):
    """norm(x + attention(x)), norm(x + cross(x, memory)), norm(x + mlp(x))."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        memory: Tensor | None,
        context: Context,
        layer_key: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [B, T, D], memory [B, S, D] -> [B, T, D]."""
        x = self.attention_norm(x + self.attend(x, context, layer_key, cache))
        x = self.cross_norm(x + self.look(x, memory, context, layer_key, cache))
        return self.mlp_norm(x + self.feed(x, context, layer_key))


class Memory(nn.Module):
    """What the decoder sees of the encoder: all of it. A module, so that a layout has a place to bring it together."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return x


class EncoderDecoder(LanguageModel):
    """Two stacks with a language-model head. A part of it has the other modules set to None."""

    config: EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__(config)
        # As the final norm of the target: a post-norm stack ends in one already.
        self.encoder_norm: nn.Module | None = build_stack_norm(config) if config.norm_placement == "pre" else None
        self.memory = Memory()
        self.end = self.layers()[-1][0]  # the layer that only the last part of a model has

    def build_embed(self, config: Any) -> Any:
        """What makes vectors of both streams' ids."""
        return PairEmbed(config)

    def build_block(self, config: Any, number: int) -> nn.Module:
        """A block of the encoder or of the decoder."""
        pre = config.norm_placement == "pre"
        if number < config.layers:
            return Block(config) if pre else PostNormBlock(config)
        return DecoderBlock(config) if pre else PostNormDecoderBlock(config)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The parts in the order of the forward pass, the encoder's norm between the stacks."""
        parts = super().layers()
        norm = getattr(self, "encoder_norm", None)
        if norm is None:
            return parts
        names = [name for name, _ in parts]
        after = [f"blocks.{n}" for n in self.config.runs[1]] + ["final_norm", "head"]
        place = next((names.index(name) for name in after if name in names), len(names))
        return [*parts[:place], ("encoder_norm", norm), *parts[place:]]

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """What the decoder's blocks share; `encoder` is what the encoder's do, None where a cache has their work."""
        past = cache.length if cache else 0
        context = self.with_layers(self.stream(inputs, past, causal=True))
        encodes = inputs.encoder_ids is not None and not past
        encoder = self.stream(source_inputs(inputs), 0, causal=False) if encodes else None
        return context._replace(cross_mask=build_cross_mask(inputs), encoder=encoder)

    def border(self, shapes: Mapping[str, torch.Size]) -> int:
        """Tokens a row of both streams."""
        return shapes["encoder_ids"][1] + shapes["input_ids"][1]

    def hidden(self, inputs: Inputs, x: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Activations of the target [B, T, D] after the final norm, of a part of a model those of both [B, S + T, D].

        `x` [B, S + T, D] enters where an earlier stage left off.
        """
        context = self.context(inputs, cache)
        keys = context.layer_keys
        if x is None:
            source, target = self._embed(inputs, context, keys)
        else:
            x, context = self.enter(x, context)
            source, target = split_streams(x, inputs)
        source = self._encode(source, context, keys)
        target = self._decode(source, target, context, keys, cache)
        if self.layers()[-1][0] != self.end:
            assert source is not None, "a part of a model has both streams"
            return torch.cat([source, target], dim=1)
        return target if self.final_norm is None else self.final_norm(target)

    def enter(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """What a part of a model begins with: activations of the part before it, and what its own blocks share."""
        return x, context

    def _embed(self, inputs: Inputs, context: Context, keys: Tensor | None) -> tuple[Tensor | None, Tensor]:
        embed: Any = self.embed
        assert embed is not None, "a part without the embedding needs the activations of the part before it"
        key = None if keys is None else keys[0]
        target = embed.target(inputs.input_ids, context, key)
        if context.encoder is None:
            return None, target
        return embed.source(inputs.encoder_ids, context.encoder, key), target

    def _encode(self, x: Tensor | None, context: Context, keys: Tensor | None) -> Tensor | None:
        """The source after the blocks of the encoder that are here; None where a cache has its keys."""
        if x is None or context.encoder is None:
            return x
        shared = context.encoder._replace(mask=suit_kernel(context.encoder.mask, x))
        for number, block in self.numbered(self.config.runs[0]):
            x = block(x, shared, None if keys is None else keys[number + 1])
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def _decode(
        self, source: Tensor | None, x: Tensor, context: Context, keys: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """The target after the blocks of the decoder that are here."""
        blocks = self.numbered(self.config.runs[1])
        if not blocks:
            return x
        memory = None if source is None else self.memory(source)
        shared = context._replace(
            layer_keys=None,
            encoder=None,
            mask=suit_kernel(context.mask, x),
            cross_mask=suit_kernel(context.cross_mask, x),
        )
        for place, (number, block) in enumerate(blocks):
            held = None if cache is None else cache.layers[place]
            x = block(x, memory, shared, None if keys is None else keys[number + 1], held)
        return x

    def numbered(self, run: range) -> list[tuple[int, nn.Module]]:
        """The blocks of a stack that are here, by number."""
        return [(int(name), block) for name, block in self.blocks.items() if int(name) in run]

    def build_cache(self, size: int) -> Cache:
        """For targets of so many tokens; it takes in the source at the first pass."""
        return Cache(self.config.num_decoder_layers, size)

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """[..., D] -> [..., D] before the product with the head's weight; None where there is nothing."""
        return partial(torch.mul, other=self.config.width**-0.5) if self.config.scale_logits else None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        decoder_documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        """Logits [B, T, V] of the target under Hugging Face's names: `input_ids` [B, S] are the source.

        `documents` [B, S] and `decoder_documents` [B, T] keep packed pairs apart, each sees its own source alone.
        A classifier's are [B, C], at the last token of the target that `decoder_attention_mask` leaves.
        """
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids: is missing; give the target, moved right by one")
        inputs = Inputs(
            decoder_input_ids,
            decoder_position_ids,
            decoder_documents,
            decoder_attention_mask,
            encoder_ids=input_ids,
            encoder_positions=position_ids,
            encoder_documents=documents,
            encoder_mask=attention_mask,
        )
        return self.answer(self.hidden(inputs, cache=cache), inputs)


def source_inputs(inputs: Inputs) -> Inputs:
    """What the encoder is given, as a stack of one stream is."""
    assert inputs.encoder_ids is not None
    return Inputs(
        inputs.encoder_ids,
        inputs.encoder_positions,
        inputs.encoder_documents,
        inputs.encoder_mask,
        sequence=inputs.sequence,
        step=inputs.step,
        seed=inputs.seed,
        row_index=inputs.encoder_row_index,
        key_index=inputs.encoder_key_index,
        key_documents=inputs.encoder_key_documents,
        virtual=inputs.encoder_virtual,
    )


def split_streams(x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[B, S + T, D], or as large a share of each stream, -> the source's and the target's."""
    assert inputs.encoder_ids is not None
    source, target = inputs.encoder_ids.shape[1], inputs.input_ids.shape[1]
    first = x.shape[1] * source // (source + target)
    return x[:, :first], x[:, first:]


def build_cross_mask(inputs: Inputs) -> Tensor | None:
    """[B, 1, T or 1, S], true where a target's token sees one of its source: of its own document, and no padding.

    A token without any source (padding, beside a source that has none) sees all of it: attention to nothing is NaN.
    """
    keys = inputs.encoder_key_documents if inputs.encoder_key_documents is not None else inputs.encoder_documents
    mask = None if inputs.encoder_mask is None else padding_mask(inputs.encoder_mask, causal=False)
    if keys is None or inputs.documents is None:
        return mask
    same = (inputs.documents.unsqueeze(2) == keys.unsqueeze(1)).unsqueeze(1)
    same[..., : inputs.encoder_virtual] = True
    mask = same if mask is None else same & mask
    return mask | ~mask.any(-1, keepdim=True)
