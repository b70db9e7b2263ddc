"""DeBERTa v1 (He et al. 2021a), v2 and v3 (He et al. 2021b): encoders with disentangled attention.

Two lines of families.py, since Hugging Face has two formats: v1 projects distances by weights of its own; v2 and v3
share those of contents, norm the vectors of distances, count far ones by logarithm and, in v2's sizes, begin with a
convolution. All of them predict masked tokens by the enhanced mask decoder. v3 was trained by replaced-token detection;
this is its masked-language-model half.

Hugging Face lacks the mask decoder: with `mask_decoder: false` we compute what it computes, and with it what the paper
and its authors' code do. Weights go both ways all the same, the absolute positions under the published name.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn

from shardwright.config import meaning
from shardwright.model import bert
from shardwright.model.disentangled import ConvolvedBlock, DecodingBlock, DisentangledBlock, Relative, near_tokens
from shardwright.model.encoder import Encoder, EncoderConfig
from shardwright.model.family import (
    Extra,
    Family,
    HuggingFaceMap,
    OneOf,
    TensorRule,
    class_rules,
    class_variants,
    weight_and_bias,
)
from shardwright.model.transformer import Cache, Context, Inputs


class DebertaConfig(EncoderConfig):
    """v1's choices."""

    projects_tables: ClassVar[bool] = True
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = "gelu"

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 12, "width": 768, "heads": 12},
        "large": {"layers": 24, "width": 1024, "heads": 16},
        "xlarge": {"layers": 48, "width": 1024, "heads": 16},
    }

    family: Literal["deberta"] = meaning("deberta", "Model family")
    norm_eps: float = meaning(1e-7, "Added to the variance", gt=0)
    positions: Literal["learned", "none"] = meaning("none", "Absolute positions at the input; v1 to v3 have none")
    token_types: int = meaning(0, "Kinds of segments that a token may be of; 0 leaves their vectors out", ge=0)
    key_bias: bool = meaning(False, "Keys, of tokens and of distances, have a bias as queries do")
    relative_span: int = meaning(-1, "Distance from which on all are alike; -1 is max_length", ge=-1)
    relative_norm: bool = meaning(False, "A norm of the vectors of distances")
    shared_projections: bool = meaning(False, "Distances are projected by the weights of queries and keys")
    buckets: int = meaning(-1, "Distances from half of this on share rows by their logarithm; -1 has a row for each")
    convolution: int = meaning(0, "Tokens that the first block's convolution sees at once; 0 has none", ge=0)
    convolution_activation: Literal["gelu", "tanh"] = meaning("gelu", "Activation after that convolution")
    mask_decoder: bool = meaning(True, "The last block predicts with absolute positions (enhanced mask decoder)")

    @model_validator(mode="after")
    def _check_attention(self) -> DebertaConfig:
        if self.classify != "none":
            self.__dict__["mask_decoder"] = False  # it is for masked tokens alone
        if self.num_kv_heads != self.heads or self.qk_norm:
            raise ValueError("disentangled attention has a key head for each query head, without norms; drop kv_heads "
                             "and qk_norm")  # fmt: skip
        if self.norm_placement != "post":
            raise ValueError("norm_placement: the mask decoder stands on post-norm blocks; use post")
        if self.mask_decoder and self.positions != "none":
            raise ValueError("mask_decoder brings in absolute positions at the end; use positions=none or leave it out")
        if self.convolution and (self.convolution % 2 == 0 or self.layers < 2):
            raise ValueError(f"convolution={self.convolution}: has to be odd, and needs 2 layers or more")
        return self

    @property
    def farthest(self) -> int:
        """Distance that the last bucket is for."""
        return self.relative_span if self.relative_span > 0 else self.max_length

    @property
    def span(self) -> int:
        """Rows of the table for distances one way."""
        return self.buckets if self.buckets > 0 else self.farthest

    @property
    def runs(self) -> tuple[range, ...]:
        """The first block and the last one may be of a kind of their own."""
        first, last = int(self.convolution > 0), self.layers - int(self.mask_decoder)
        return tuple(run for run in (range(first), range(first, last), range(last, self.layers)) if run)

    def one_of_each(self) -> DebertaConfig:
        """The same with one block of each kind."""
        return self.model_copy(update={"layers": len(self.runs)})


class DebertaV2Config(DebertaConfig):
    """v2's and v3's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "v2-xlarge": {"layers": 24, "width": 1536, "heads": 24, "convolution": 3},
        "v2-xxlarge": {"layers": 48, "width": 1536, "heads": 24, "convolution": 3},
        "v3-xsmall": {"layers": 12, "width": 384, "heads": 6},
        "v3-small": {"layers": 6, "width": 768, "heads": 12},
        "v3-base": {"layers": 12, "width": 768, "heads": 12},
        "v3-large": {"layers": 24, "width": 1024, "heads": 16},
    }

    family: Literal["deberta_v2"] = meaning("deberta_v2", "Model family")  # type: ignore[assignment]
    key_bias: bool = meaning(True, "Keys, of tokens and of distances, have a bias as queries do")
    relative_norm: bool = meaning(True, "A norm of the vectors of distances")
    shared_projections: bool = meaning(True, "Distances are projected by the weights of queries and keys")
    buckets: int = meaning(256, "Distances from half of this on share rows by their logarithm; -1 has a row for each")


class Deberta(Encoder):
    """An encoder whose blocks share a table of distances."""

    shared_tables: ClassVar[tuple[str, ...]] = ("relative",)

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        self.relative = Relative(config)

    def build_block(self, config: Any, number: int) -> nn.Module:
        """The first and the last may be of a kind of their own."""
        if config.mask_decoder and number == config.layers - 1:
            return DecodingBlock(config)
        return ConvolvedBlock(config) if config.convolution and number == 0 else DisentangledBlock(config)

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """With the vectors of distances, and which of them each pair of tokens has."""
        ids, config = inputs.input_ids, self.config
        rows = torch.arange(ids.shape[1], device=ids.device) if inputs.row_index is None else inputs.row_index
        keys = rows if inputs.key_index is None else inputs.key_index
        near = near_tokens(inputs, config.convolution) if config.convolution else None  # type: ignore[attr-defined]
        distances = self.relative.rows(torch.atleast_2d(rows), torch.atleast_2d(keys))
        return super().context(inputs, cache)._replace(relative=self.relative(), distances=distances, near=near)


def extra_cost(config: DebertaConfig, length: int, rows: int, predicted: float) -> Extra:
    """What disentangled attention costs beyond plain attention. Symbols as in count.py; R rows of the table each way.

    Per token and block: 2 products of H d x 2R, and, once for all rows of a micro-batch, the table's 2 projections of
    2R x D x H d. The mask decoder is one more pass through a block; the convolution a product of N D x D. Kept, as
    torch does it on a CPU: queries and keys twice, probabilities in place of their log-sum-exp, both projections.
    """
    inner, table = config.heads * config.head_width, 2 * config.span
    matrices = 2.0 * config.width * (4 * inner + (3 if config.gated else 2) * config.hidden_width)
    distances = 2.0 * 2 * table * inner * (length + config.width / rows)
    flops = [distances] * len(config.runs)
    if config.convolution:
        flops[0] += 2.0 * config.convolution * config.width**2 * length
    if config.mask_decoder:
        flops[-1] += length * (matrices + 4.0 * inner * length) + distances
    return Extra(tuple(flops), values=2 * inner + config.heads * (length - 1), fixed=2 * table * inner)


#: Published configs say it in either order, as a list or as one word.
_BOTH = OneOf(["p2c", "c2p"], ["c2p", "p2c"], "p2c|c2p", "c2p|p2c")
_FIELDS: dict[str, tuple[str, ...]] = {
    **bert.FIELDS,
    "max_length": ("max_position_embeddings",),
    "relative_span": ("max_relative_positions",),
    "mask_decoder": ("enhanced_mask_decoder",),
}
_POSITIONS = {"positions": ("position_biased_input", {"none": False, "learned": True})}
_THEIRS: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": _BOTH,
    # Theirs of old puts the head under other names and ties it by a flag; the one that was trained is always tied.
    "legacy": OneOf(False, True),
    **bert.TIED,
}
_CLASSIFYING = {"pooler_hidden_act": "gelu"}
_OURS: dict[str, Any] = {
    **{field: value for field, value in bert.OURS.items() if field != "positions"},
    "position_offset": 0,
    "sentence_head": False,
    "tied": True,
}
_DEFAULTS: dict[str, Any] = {
    **bert.DEFAULTS,
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "max_relative_positions": -1,
    "position_biased_input": True,
    "enhanced_mask_decoder": False,
}
#: The same tensors under the names of `legacy`.
_ALIASES = {
    "cls.predictions.transform.": "lm_predictions.lm_head.",
    "cls.predictions.bias": "lm_predictions.lm_head.bias",
}
#: v3's other head, which told replaced tokens; a masked language model lacks it.
_IGNORED = (
    ".position_ids",
    "cls.predictions.decoder.bias",
    *(
        f"mask_predictions.{part}.{leaf}"
        for part in ("dense", "LayerNorm", "classifier")
        for leaf in ("weight", "bias")
    ),
)
_LAYER = "deberta.encoder.layer.{n}."
_TIED = ("cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight")


def _rules() -> tuple[TensorRule, ...]:
    """What both formats name alike: all but the projections of attention."""
    plain = bert.stack_rules("deberta.")
    return (
        *(rule for rule in plain if ".attention.self." not in rule.theirs),
        TensorRule("deberta.embeddings.position_embeddings.weight", ("blocks.{last}.positions.weight",)),
        TensorRule("deberta.encoder.rel_embeddings.weight", ("relative.table.weight",)),
        *weight_and_bias("deberta.encoder.LayerNorm", "relative.norm"),
        *weight_and_bias("lm_predictions.lm_head.dense", "head.transform.dense"),
        *weight_and_bias("lm_predictions.lm_head.LayerNorm", "head.transform.norm"),
        TensorRule("lm_predictions.lm_head.bias", ("head.bias",)),
        *class_rules("classifier", "classifier", "pooler.dense"),
    )


HUGGINGFACE = HuggingFaceMap(
    architecture="DebertaForMaskedLM",
    model_type="deberta",
    variants={"DebertaForMaskedLM": {"classify": "none"}, **class_variants("Deberta")},
    classifying=_CLASSIFYING,
    fields=_FIELDS,
    values={**bert.ACTIVATION, **_POSITIONS},
    ours={
        **_OURS,
        "key_bias": False,
        "relative_norm": False,
        "shared_projections": False,
        "buckets": -1,
        "convolution": 0,
    },  # fmt: skip
    theirs={**_THEIRS, "talking_head": OneOf(False, None)},
    defaults={**_DEFAULTS, "vocab_size": 50265},
    tensors=(
        *_rules(),
        TensorRule(
            f"{_LAYER}attention.self.in_proj.weight",
            tuple(f"blocks.{{n}}.attention.{part}.weight" for part in "qkv"),
            by_heads=True,
        ),
        TensorRule(f"{_LAYER}attention.self.q_bias", ("blocks.{n}.attention.q.bias",)),
        TensorRule(f"{_LAYER}attention.self.v_bias", ("blocks.{n}.attention.v.bias",)),
        TensorRule(f"{_LAYER}attention.self.pos_proj.weight", ("blocks.{n}.attention.position_k.weight",)),
        *weight_and_bias(f"{_LAYER}attention.self.pos_q_proj", "blocks.{n}.attention.position_q"),
    ),
    tied=_TIED,
    prefix="deberta.",
    aliases=_ALIASES,
    ignored=_IGNORED,
    lacks={"mask_decoder": False},
)

HUGGINGFACE_V2 = HuggingFaceMap(
    architecture="DebertaV2ForMaskedLM",
    model_type="deberta-v2",
    variants={"DebertaV2ForMaskedLM": {"classify": "none"}, **class_variants("DebertaV2")},
    classifying=_CLASSIFYING,
    fields={
        **_FIELDS,
        "head_dim": ("attention_head_size",),
        "buckets": ("position_buckets",),
        "shared_projections": ("share_att_key",),
        "convolution": ("conv_kernel_size",),
    },  # fmt: skip
    values={
        **bert.ACTIVATION,
        **_POSITIONS,
        "relative_norm": ("norm_rel_ebd", {True: "layer_norm", False: "none"}),
        "convolution_activation": ("conv_act", {"gelu": "gelu", "tanh": "tanh"}),
    },
    ours={**_OURS, "key_bias": True},
    theirs={**_THEIRS, "conv_groups": 1},
    defaults={
        **_DEFAULTS,
        "vocab_size": 128100,
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "position_buckets": -1,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "conv_kernel_size": 0,
        "conv_act": "tanh",
    },
    tensors=(
        *_rules(),
        *weight_and_bias(f"{_LAYER}attention.self.query_proj", "blocks.{n}.attention.q"),
        *weight_and_bias(f"{_LAYER}attention.self.key_proj", "blocks.{n}.attention.k"),
        *weight_and_bias(f"{_LAYER}attention.self.value_proj", "blocks.{n}.attention.v"),
        *weight_and_bias(f"{_LAYER}attention.self.pos_key_proj", "blocks.{n}.attention.position_k"),
        *weight_and_bias(f"{_LAYER}attention.self.pos_query_proj", "blocks.{n}.attention.position_q"),
        *weight_and_bias("deberta.encoder.conv.conv", "blocks.0.convolution"),
        *weight_and_bias("deberta.encoder.conv.LayerNorm", "blocks.0.convolution_norm"),
    ),
    tied=_TIED,
    prefix="deberta.",
    aliases=_ALIASES,
    ignored=_IGNORED,
    lacks={"mask_decoder": False},
)

FAMILY = Family(DebertaConfig, Deberta, HUGGINGFACE, extra=extra_cost)
FAMILY_V2 = Family(DebertaV2Config, Deberta, HUGGINGFACE_V2, extra=extra_cost)
