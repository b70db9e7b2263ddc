"""BERT (Devlin et al. 2019): an encoder of two segments, post-norm, with a tied head behind a transform.

A line of families.py; sizes are the paper's two and the small ones of Turc et al. 2019. Dropout is 0 by default: the
paper's 0.1 on attention probabilities cannot be layout-independent, and one-epoch training needs none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model.encoder import Encoder, EncoderConfig
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, class_variants, weight_and_bias


class BertConfig(EncoderConfig):
    """BERT's choices are the defaults of `EncoderConfig`."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"layers": 2, "width": 128, "heads": 2},
        "mini": {"layers": 4, "width": 256, "heads": 4},
        "small": {"layers": 4, "width": 512, "heads": 8},
        "medium": {"layers": 8, "width": 512, "heads": 8},
        "base": {"layers": 12, "width": 768, "heads": 12},
        "large": {"layers": 24, "width": 1024, "heads": 16},
    }

    family: Literal["bert"] = meaning("bert", "Model family")
    sentence_head: bool = meaning(True, "A pooler and a classifier of pairs of segments, on the first token")


#: Our config field -> Hugging Face's keys, as all encoders of BERT's line name them.
FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "layers": ("num_hidden_layers",),
    "width": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "mlp_width": ("intermediate_size",),
    "norm_eps": ("layer_norm_eps",),
    "token_types": ("type_vocab_size",),
    "attention_dropout": ("attention_probs_dropout_prob",),
    "embed_dropout": ("hidden_dropout_prob",),
    "residual_dropout": ("hidden_dropout_prob",),
    "init_std": ("initializer_range",),
}
#: Of a free head theirs has a bias of its own, which BERT, RoBERTa and ALBERT never were trained with.
TIED = {"tie_word_embeddings": True}
ACTIVATION = {"activation": ("hidden_act", {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"})}
#: What they cannot say otherwise.
OURS: dict[str, Any] = {
    "kv_heads": None,
    "head_dim": None,
    "positions": "learned",
    "norm": "layer",
    "norm_weight": True,
    "norm_bias": True,
    "norm_placement": "post",
    "embed_norm": True,
    "qk_norm": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "head_bias": True,
    "head_transform": True,
    "transform_bias": True,
    "embed_width": None,
    "scale_embedding": False,
    "logit_softcap": None,
}
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "intermediate_size": 3072,
}


def stack_rules(prefix: str) -> tuple[TensorRule, ...]:
    """Embedding and layers, under `prefix` ("bert.")."""
    layer = f"{prefix}encoder.layer.{{n}}."
    return (
        TensorRule(f"{prefix}embeddings.word_embeddings.weight", ("embed.tokens.weight",)),
        TensorRule(f"{prefix}embeddings.position_embeddings.weight", ("embed.positions.weight",)),
        TensorRule(f"{prefix}embeddings.token_type_embeddings.weight", ("embed.token_types.weight",)),
        *weight_and_bias(f"{prefix}embeddings.LayerNorm", "embed.norm"),
        *weight_and_bias(f"{layer}attention.self.query", "blocks.{n}.attention.q"),
        *weight_and_bias(f"{layer}attention.self.key", "blocks.{n}.attention.k"),
        *weight_and_bias(f"{layer}attention.self.value", "blocks.{n}.attention.v"),
        *weight_and_bias(f"{layer}attention.output.dense", "blocks.{n}.attention.out"),
        *weight_and_bias(f"{layer}attention.output.LayerNorm", "blocks.{n}.attention_norm"),
        *weight_and_bias(f"{layer}intermediate.dense", "blocks.{n}.mlp.up"),
        *weight_and_bias(f"{layer}output.dense", "blocks.{n}.mlp.down"),
        *weight_and_bias(f"{layer}output.LayerNorm", "blocks.{n}.mlp_norm"),
    )


HUGGINGFACE = HuggingFaceMap(
    architecture="BertForPreTraining",
    model_type="bert",
    variants={
        "BertForPreTraining": {"sentence_head": True, "classify": "none"},
        "BertForMaskedLM": {"sentence_head": False, "classify": "none"},
        **class_variants("Bert"),
    },
    fields={**FIELDS, "max_length": ("max_position_embeddings",)},
    values=ACTIVATION,
    ours={**OURS, "position_offset": 0, "tied": True},
    theirs={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, **TIED},
    defaults=DEFAULTS,
    tensors=(
        *stack_rules("bert."),
        *weight_and_bias("bert.pooler.dense", "head.sentence.pooler"),
        TensorRule("cls.predictions.decoder.weight", ("head.weight",)),
        TensorRule("cls.predictions.bias", ("head.bias",)),
        *weight_and_bias("cls.predictions.transform.dense", "head.transform.dense"),
        *weight_and_bias("cls.predictions.transform.LayerNorm", "head.transform.norm"),
        *weight_and_bias("cls.seq_relationship", "head.sentence.classifier"),
        *class_rules("classifier", "classifier", "bert.pooler.dense"),
    ),
    tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    spare=(
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
    prefix="bert.",
    ignored=(".position_ids", "cls.predictions.decoder.bias"),
)


def objective(config: BertConfig) -> dict[str, Any]:
    """Hidden tokens, and next sentences where it has their head."""
    return {"name": "masked", "sentence": "next" if config.sentence_head else "none"}


FAMILY = Family(BertConfig, Encoder, HUGGINGFACE, objective=objective)
