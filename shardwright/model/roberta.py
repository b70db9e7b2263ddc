"""RoBERTa (Liu et al. 2019): BERT's stack without segments and without the head for pairs, longer trained.

A line of families.py. Positions are counted from 2 in its embedding, and from the first token that is no padding, as
fairseq did and Hugging Face does. Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from shardwright.config import meaning
from shardwright.model import bert
from shardwright.model.encoder import Encoder, EncoderConfig
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, class_variants, weight_and_bias


class RobertaConfig(EncoderConfig):
    """BERT's choices with one kind of segment and byte-level BPE's vocabulary."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 12, "width": 768, "heads": 12},
        "large": {"layers": 24, "width": 1024, "heads": 16},
    }

    family: Literal["roberta"] = meaning("roberta", "Model family")
    norm_eps: float = meaning(1e-5, "Added to the variance", gt=0)
    position_offset: int = meaning(2, "Rows of the learned positions that come before the first one's", ge=0)
    token_types: int = meaning(1, "Kinds of segments that a token may be of; 0 leaves their vectors out", ge=0)


class Roberta(Encoder):
    """An encoder whose positions count real tokens, on whichever side padding is."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *given: Tensor | None, **named: Tensor | None
    ) -> dict[str, Tensor]:
        """As any encoder's; positions [B, T] that are not given follow from the mask [B, T]."""
        if attention_mask is not None and len(given) < 2:
            named.setdefault("position_ids", (attention_mask.cumsum(1) - 1).clamp(min=0))
        return super().forward(input_ids, attention_mask, *given, **named)


HUGGINGFACE = HuggingFaceMap(
    architecture="RobertaForMaskedLM",
    model_type="roberta",
    variants={"RobertaForMaskedLM": {"classify": "none"}, **class_variants("Roberta")},
    fields={**bert.FIELDS, "max_length": ("max_position_embeddings",)},
    shifts={"max_length": 2},
    values=bert.ACTIVATION,
    ours={**bert.OURS, "position_offset": 2, "sentence_head": False, "tied": True},
    # They number positions from the padding's id on, whatever the tokenizer's padding is.
    theirs={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "pad_token_id": 1,
        **bert.TIED,
    },
    defaults={**bert.DEFAULTS, "vocab_size": 50265, "max_position_embeddings": 512},
    tensors=(
        *bert.stack_rules("roberta."),
        TensorRule("lm_head.decoder.weight", ("head.weight",)),
        TensorRule("lm_head.bias", ("head.bias",)),
        *weight_and_bias("lm_head.dense", "head.transform.dense"),
        *weight_and_bias("lm_head.layer_norm", "head.transform.norm"),
        *class_rules("classifier.out_proj", "classifier", "classifier.dense"),
    ),
    tied=("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    spare=("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
    prefix="roberta.",
    ignored=(".position_ids", "lm_head.decoder.bias"),
)

FAMILY = Family(RobertaConfig, Roberta, HUGGINGFACE)
