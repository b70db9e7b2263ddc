"""ALBERT (Lan et al. 2020): BERT with narrow token vectors and one block that is run `layers` times.

A line of families.py; sizes are those of the paper, as published in version 2. One block means: its gradient is the sum
over all of its uses, and where a model is cut into parts the block stays whole. Its second objective is the order of
sentences, on BERT's head for pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model import bert
from shardwright.model.encoder import Encoder, EncoderConfig
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, class_variants, weight_and_bias
from shardwright.model.transformer import ActivationName


class AlbertConfig(EncoderConfig):
    """BERT's choices with factorised token vectors and version 2's activation."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 12, "width": 768, "heads": 12},
        "large": {"layers": 24, "width": 1024, "heads": 16},
        "xlarge": {"layers": 24, "width": 2048, "heads": 16},
        "xxlarge": {"layers": 12, "width": 4096, "heads": 64},
    }

    family: Literal["albert"] = meaning("albert", "Model family")
    embed_width: int | None = meaning(128, "Width of token vectors, then projected; null is the width itself", ge=1)
    activation: ActivationName = meaning("gelu_tanh", "Feed-forward activation")
    sentence_head: bool = meaning(True, "A pooler and a classifier of pairs of segments, on the first token")

    @property
    def runs(self) -> tuple[range, ...]:
        """One block."""
        return (range(1),)

    @property
    def repeats(self) -> int:
        """Times that it is run."""
        return self.layers


class Albert(Encoder):
    """An encoder of one block."""

    pairs = "sop_logits"


_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0."

HUGGINGFACE = HuggingFaceMap(
    architecture="AlbertForPreTraining",
    model_type="albert",
    variants={
        "AlbertForPreTraining": {"sentence_head": True, "classify": "none"},
        "AlbertForMaskedLM": {"sentence_head": False, "classify": "none"},
        **class_variants("Albert"),
    },
    fields={**bert.FIELDS, "max_length": ("max_position_embeddings",), "embed_width": ("embedding_size",)},
    values=bert.ACTIVATION,
    ours={
        **{field: value for field, value in bert.OURS.items() if field != "embed_width"},
        "position_offset": 0,
        "tied": True,
    },
    theirs={"num_hidden_groups": 1, "inner_group_num": 1, **bert.TIED},
    defaults={
        "vocab_size": 30000,
        "embedding_size": 128,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12,
    },
    tensors=(
        TensorRule("albert.embeddings.word_embeddings.weight", ("embed.tokens.weight",)),
        TensorRule("albert.embeddings.position_embeddings.weight", ("embed.positions.weight",)),
        TensorRule("albert.embeddings.token_type_embeddings.weight", ("embed.token_types.weight",)),
        *weight_and_bias("albert.embeddings.LayerNorm", "embed.norm"),
        *weight_and_bias("albert.encoder.embedding_hidden_mapping_in", "embed.projection"),
        *weight_and_bias(f"{_LAYER}attention.query", "blocks.0.attention.q"),
        *weight_and_bias(f"{_LAYER}attention.key", "blocks.0.attention.k"),
        *weight_and_bias(f"{_LAYER}attention.value", "blocks.0.attention.v"),
        *weight_and_bias(f"{_LAYER}attention.dense", "blocks.0.attention.out"),
        *weight_and_bias(f"{_LAYER}attention.LayerNorm", "blocks.0.attention_norm"),
        *weight_and_bias(f"{_LAYER}ffn", "blocks.0.mlp.up"),
        *weight_and_bias(f"{_LAYER}ffn_output", "blocks.0.mlp.down"),
        *weight_and_bias(f"{_LAYER}full_layer_layer_norm", "blocks.0.mlp_norm"),
        *weight_and_bias("albert.pooler", "head.sentence.pooler"),
        TensorRule("predictions.decoder.weight", ("head.weight",)),
        TensorRule("predictions.bias", ("head.bias",)),
        *weight_and_bias("predictions.dense", "head.transform.dense"),
        *weight_and_bias("predictions.LayerNorm", "head.transform.norm"),
        *weight_and_bias("sop_classifier.classifier", "head.sentence.classifier"),
        *class_rules("classifier", "classifier", "albert.pooler"),
    ),
    tied=("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    spare=(
        "albert.pooler.weight",
        "albert.pooler.bias",
        "sop_classifier.classifier.weight",
        "sop_classifier.classifier.bias",
    ),
    prefix="albert.",
    ignored=(".position_ids", ".token_type_ids", "predictions.decoder.bias"),
)


def objective(config: AlbertConfig) -> dict[str, Any]:
    """Hidden tokens, and the order of sentences where it has their head."""
    return {"name": "masked", "sentence": "order" if config.sentence_head else "none"}


FAMILY = Family(AlbertConfig, Albert, HUGGINGFACE, objective=objective)
