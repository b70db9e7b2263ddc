"""BART (Lewis et al. 2020): an encoder-decoder of GELU and learned positions, post-norm, its embeddings normed.

A line of families.py; sizes are those that Facebook published. Tokens of source, target and head are one table.
Positions are counted from 2, as fairseq did and Hugging Face does. Hugging Face adds a constant to the logits
(`final_logits_bias`), which is zero in BART: a model that has another one here has `head_bias`, which is trained.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, weight_and_bias
from shardwright.model.transformer import ActivationName


class BartConfig(EncoderDecoderConfig):
    """BART's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 6, "width": 768, "heads": 12},
        "large": {"layers": 12, "width": 1024, "heads": 16},
    }

    family: Literal["bart"] = meaning("bart", "Model family")
    max_length: int = meaning(1024, "Longest sequence, of a source or a target", ge=1)
    position_offset: int = meaning(2, "Rows of the learned positions that come before the first one's", ge=0)
    norm_placement: Literal["pre", "post"] = meaning("post", "Norm before each part, or after its addition")
    embed_norm: bool = meaning(True, "A norm after the embedding")
    activation: ActivationName = meaning("gelu", "Feed-forward activation")
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("bert", "Initialisation")


#: Our config field -> Hugging Face's keys, as all of fairseq's line name them.
FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "layers": ("encoder_layers",),
    "decoder_layers": ("decoder_layers",),
    "width": ("d_model",),
    "heads": ("encoder_attention_heads", "decoder_attention_heads"),
    "mlp_width": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "max_length": ("max_position_embeddings",),
    "attention_dropout": ("attention_dropout",),
    "embed_dropout": ("dropout",),
    "residual_dropout": ("dropout",),
    "init_std": ("init_std",),
    "scale_embedding": ("scale_embedding",),
}
#: Keys that one field of ours stands for.
ALIKE = (("encoder_attention_heads", "decoder_attention_heads"), ("encoder_ffn_dim", "decoder_ffn_dim"))
ACTIVATION = {
    "activation": ("activation_function", {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"})
}
#: What they cannot say otherwise.
OURS: dict[str, Any] = {
    "kv_heads": None,
    "head_dim": None,
    "norm": "layer",
    "norm_eps": 1e-5,
    "norm_weight": True,
    "norm_bias": True,
    "norm_placement": "post",
    "qk_norm": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tied": True,  # else each of their stacks has a table of its own
    "scale_logits": False,
    "logit_softcap": None,
}
THEIRS = {
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "normalize_before": False,
    "add_final_layer_norm": False,
}
DEFAULTS: dict[str, Any] = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "dropout": 0.1,
    "activation_function": "gelu",
}


def _layer(theirs: str, ours: str) -> tuple[TensorRule, ...]:
    """What blocks of both stacks have."""
    return (
        *_attention(f"{theirs}.self_attn", f"{ours}.attention"),
        *weight_and_bias(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm"),
        *weight_and_bias(f"{theirs}.fc1", f"{ours}.mlp.up"),
        *weight_and_bias(f"{theirs}.fc2", f"{ours}.mlp.down"),
        *weight_and_bias(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm"),
    )


def _attention(theirs: str, ours: str) -> tuple[TensorRule, ...]:
    parts = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    return tuple(rule for t, o in parts.items() for rule in weight_and_bias(f"{theirs}.{t}", f"{ours}.{o}"))


def _embedding(stack: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"model.{stack}.embed_positions.weight", (f"embed.{stack}.positions.weight",)),
        *weight_and_bias(f"model.{stack}.layernorm_embedding", f"embed.{stack}.norm"),
    )


#: Every tensor; rules for what a model lacks fall away.
TENSORS: tuple[TensorRule, ...] = (
    TensorRule("model.shared.weight", ("embed.tokens.weight",)),
    *_embedding("encoder"),
    *_layer("model.encoder.layers.{n}", "blocks.{n}"),
    *_embedding("decoder"),
    *_layer("model.decoder.layers.{m}", "blocks.{m}"),
    *_attention("model.decoder.layers.{m}.encoder_attn", "blocks.{m}.cross"),
    *weight_and_bias("model.decoder.layers.{m}.encoder_attn_layer_norm", "blocks.{m}.cross_norm"),
    TensorRule("lm_head.weight", ("head.weight",)),
    TensorRule("final_logits_bias", ("head.bias",), row=True),
    *class_rules("classification_head.out_proj", "", "classification_head.dense"),
)
TIED = ("lm_head.weight", "model.shared.weight")
COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
ZERO = {"final_logits_bias": "model.head_bias=true"}

HUGGINGFACE = HuggingFaceMap(
    architecture="BartForConditionalGeneration",
    model_type="bart",
    variants={
        "BartForConditionalGeneration": {"classify": "none"},
        "BartForSequenceClassification": {"classify": "text"},
    },
    fields=FIELDS,
    alike=ALIKE,
    values=ACTIVATION,
    ours={**OURS, "positions": "learned", "position_offset": 2, "embed_norm": True},
    theirs=THEIRS,
    defaults={**DEFAULTS, "vocab_size": 50265},
    tensors=TENSORS,
    tied=TIED,
    copies=COPIES,
    zero=ZERO,
    prefix="model.",
)

FAMILY = Family(BartConfig, EncoderDecoder, HUGGINGFACE, objective=lambda config: {"name": "denoise"})
