"""ModernBERT (Warner et al. 2024): an encoder with rotary positions whose blocks see a window, every third one all.

A line of families.py. Pre-norm without biases, but the head's; GeGLU; a norm after the embedding, and so none before
the first attention; angles of one base where all is seen and of another within windows. What its authors call
unpadding is here packing: rows without padding whose documents do not see each other. A window is a mask, so blocks
that see one cost what the others cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model import bert, position
from shardwright.model.attention import LayerCache
from shardwright.model.classifier import ClassHead
from shardwright.model.encoder import Encoder, EncoderConfig, Transform
from shardwright.model.family import (
    Family,
    HuggingFaceMap,
    OneOf,
    TensorRule,
    Whatever,
    class_rules,
    class_variants,
    weight_and_bias,
)
from shardwright.model.transformer import ActivationName, Block, Cache, Context, Inputs

LayerType = Literal["full_attention", "sliding_attention"]


class ModernBertConfig(EncoderConfig):
    """The published choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 22, "width": 768, "heads": 12, "mlp_width": 1152},
        "large": {"layers": 28, "width": 1024, "heads": 16, "mlp_width": 2624},
    }

    family: Literal["modernbert"] = meaning("modernbert", "Model family")
    max_length: int = meaning(8192, "Longest sequence", ge=1)
    positions: Literal["rotary"] = meaning("rotary", "How positions enter")
    rope_theta: float = meaning(160000.0, "Base of the rotary angles", gt=0)
    local_theta: float = meaning(10000.0, "Base of the rotary angles within windows", gt=0)
    window: int = meaning(128, "Tokens in a window: half of them before a token, half after", ge=2)
    layer_types: list[LayerType] | None = meaning(None, "What each block sees; null is all, window, window, all, ...")
    norm_eps: float = meaning(1e-5, "Added to the variance", gt=0)
    norm_bias: bool = meaning(False, "Layer norms have a bias")
    norm_placement: Literal["pre"] = meaning("pre", "Norm before each part")
    activation: ActivationName = meaning("geglu", "Feed-forward activation")
    qkv_bias: bool = meaning(False, "Biases of q, k and v")
    out_bias: bool = meaning(False, "Bias of the attention's output")
    mlp_bias: bool = meaning(False, "Biases of the feed-forward layer")
    transform_bias: bool = meaning(False, "Bias of that dense layer")
    token_types: int = meaning(0, "Kinds of segments that a token may be of; 0 leaves their vectors out", ge=0)

    @model_validator(mode="after")
    def _check_layer_types(self) -> ModernBertConfig:
        if self.layer_types is not None and len(self.layer_types) != self.layers:
            raise ValueError(f"layer_types: names {len(self.layer_types)} blocks of {self.layers}")
        return self

    @property
    def sees(self) -> list[LayerType]:
        """What each block sees."""
        return self.layer_types or ["sliding_attention" if n % 3 else "full_attention" for n in range(self.layers)]

    @property
    def runs(self) -> tuple[range, ...]:
        """The first block has a norm less."""
        return tuple(run for run in (range(1), range(1, self.layers)) if run)

    def one_of_each(self) -> ModernBertConfig:
        """The same with one block of each kind."""
        return self.model_copy(update={"layers": len(self.runs), "layer_types": None})

    def derived(self) -> dict[str, Any]:
        """What fields that may be null come to."""
        return {**super().derived(), "layer_types": self.sees}


class LocalBlock(Block):
    """A block that sees a window."""

    def attend(self, x: Tensor, context: Context, layer_key: Tensor | None, cache: LayerCache | None) -> Tensor:
        """What attention adds to the residual stream."""
        local = context._replace(mask=context.local_mask, cos=context.local_cos, sin=context.local_sin)
        return super().attend(x, local, layer_key, cache)


class ModernBert(Encoder):
    """An encoder whose blocks see windows or all."""

    pretrained: ClassVar[Mapping[str, str]] = {"head.label.pooler.": "head.transform."}

    def build_label(self, config: Any) -> ClassHead:
        """Classes are told from what tokens are."""
        return ClassHead(config.width, config.classes, Transform(config))

    def build_block(self, config: Any, number: int) -> nn.Module:
        """As `layer_types` says; the first has the embedding's norm before it."""
        block = (Block if config.sees[number] == "full_attention" else LocalBlock)(config)
        if number == 0 and config.embed_norm:
            block.attention_norm = nn.Identity()
        return block

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """With the mask and the angles of windows."""
        context, config = super().context(inputs, cache), self.config
        assert isinstance(config, ModernBertConfig)
        cos, sin = position.rotary(context.position_ids, config.head_width, config.local_theta)
        mask = window_mask(inputs, config.window, context.mask)
        return context._replace(local_mask=mask, local_cos=cos, local_sin=sin)


def window_mask(inputs: Inputs, window: int, mask: Tensor | None) -> Tensor:
    """bool [B or 1, 1, T, S], true where query and key are at most half a window apart and `mask` lets it be.

    A query sees itself at least: padding may have nothing else within its window.
    """
    ids = inputs.input_ids
    rows = torch.arange(ids.shape[1], device=ids.device) if inputs.row_index is None else inputs.row_index
    keys = rows if inputs.key_index is None else inputs.key_index
    apart = torch.atleast_2d(rows).unsqueeze(-1) - torch.atleast_2d(keys).unsqueeze(-2)
    near = (apart.abs() <= window // 2).unsqueeze(1)
    return near if mask is None else (near & mask) | (apart == 0).unsqueeze(1)


def _joined(theirs: str, ours: tuple[str, ...]) -> tuple[TensorRule, ...]:
    """One linear layer of theirs that is several of ours."""
    return tuple(
        TensorRule(f"model.layers.{{n}}.{theirs}.{leaf}", tuple(f"blocks.{{n}}.{part}.{leaf}" for part in ours))
        for leaf in ("weight", "bias")
    )


HUGGINGFACE = HuggingFaceMap(
    architecture="ModernBertForMaskedLM",
    model_type="modernbert",
    variants={"ModernBertForMaskedLM": {"classify": "none"}, **class_variants("ModernBert")},
    classifying={"classifier_pooling": "cls"},
    fields={
        **{field: bert.FIELDS[field] for field in ("vocab_size", "layers", "width", "heads", "mlp_width")},
        "tied": ("tie_word_embeddings",),
        "max_length": ("max_position_embeddings",),
        "norm_eps": ("norm_eps",),
        "norm_bias": ("norm_bias",),
        "qkv_bias": ("attention_bias",),
        "out_bias": ("attention_bias",),
        "mlp_bias": ("mlp_bias",),
        "transform_bias": ("classifier_bias",),
        "head_bias": ("decoder_bias",),
        "rope_theta": ("rope_parameters.full_attention.rope_theta", "global_rope_theta"),
        "local_theta": ("rope_parameters.sliding_attention.rope_theta", "local_rope_theta"),
        "window": ("local_attention",),
        "layer_types": ("layer_types",),
        "attention_dropout": ("attention_dropout",),
        "embed_dropout": ("embedding_dropout",),
        "init_std": ("initializer_range",),
    },
    values={"activation": ("hidden_activation", {"geglu": "gelu", "geglu_tanh": "gelu_new", "swiglu": "silu"})},
    ours={
        **{field: value for field, value in bert.OURS.items()
           if field not in ("positions", "norm_bias", "norm_placement", "qkv_bias", "out_bias", "mlp_bias", "head_bias",
                            "transform_bias")},
        "position_offset": 0,
        "token_types": 0,
        "sentence_head": False,
        "residual_dropout": 0.0,
    },
    theirs={
        "pad_token_id": Whatever(None),  # theirs is of the published vocabulary
        "mlp_dropout": 0.0,
        "classifier_activation": "gelu",
        "global_attn_every_n_layers": OneOf(None, 3),
        "rope_parameters.full_attention.rope_type": "default",
        "rope_parameters.sliding_attention.rope_type": "default",
    },
    defaults={"vocab_size": 50368, "hidden_activation": "gelu", "intermediate_size": 1152, "num_hidden_layers": 22},
    tensors=(
        TensorRule("model.embeddings.tok_embeddings.weight", ("embed.tokens.weight",)),
        *weight_and_bias("model.embeddings.norm", "embed.norm"),
        *weight_and_bias("model.layers.{n}.attn_norm", "blocks.{n}.attention_norm"),
        *_joined("attn.Wqkv", tuple(f"attention.{part}" for part in "qkv")),
        *weight_and_bias("model.layers.{n}.attn.Wo", "blocks.{n}.attention.out"),
        *weight_and_bias("model.layers.{n}.mlp_norm", "blocks.{n}.mlp_norm"),
        *_joined("mlp.Wi", ("mlp.gate", "mlp.up")),
        *weight_and_bias("model.layers.{n}.mlp.Wo", "blocks.{n}.mlp.down"),
        *weight_and_bias("model.final_norm", "final_norm"),
        *weight_and_bias("head.dense", "head.transform.dense"),
        *weight_and_bias("head.norm", "head.transform.norm"),
        *class_rules("classifier", "classifier", "head.dense"),
        *weight_and_bias("head.norm", "head.label.pooler.norm"),
        TensorRule("decoder.weight", ("head.weight",)),
        TensorRule("decoder.bias", ("head.bias",)),
    ),
    tied=("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    prefix="model.",
)  # fmt: skip

FAMILY = Family(ModernBertConfig, ModernBert, HUGGINGFACE)
