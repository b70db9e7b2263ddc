"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, tanh GELU, biases everywhere, tied head.

A line of families.py; sizes are those that OpenAI published. Dropout is 0 by default: the paper's 0.1 on
attention probabilities cannot be layout-independent, and one-epoch training needs none.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, class_variants
from shardwright.model.transformer import LanguageModel, TransformerConfig


class GPT2Config(TransformerConfig):
    """GPT-2's choices are the defaults of `TransformerConfig`."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "124M": {"layers": 12, "width": 768, "heads": 12},
        "355M": {"layers": 24, "width": 1024, "heads": 16},
        "774M": {"layers": 36, "width": 1280, "heads": 20},
        "1558M": {"layers": 48, "width": 1600, "heads": 25},
    }

    family: Literal["gpt2"] = meaning("gpt2", "Model family")


HUGGINGFACE = HuggingFaceMap(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    variants={"GPT2LMHeadModel": {"classify": "none"}, **class_variants("GPT2")},
    fields={
        "vocab_size": ("vocab_size",),
        "layers": ("n_layer",),
        "width": ("n_embd",),
        "heads": ("n_head",),
        "mlp_width": ("n_inner",),
        "max_length": ("n_positions",),
        "norm_eps": ("layer_norm_epsilon",),
        "embed_dropout": ("embd_pdrop",),
        "residual_dropout": ("resid_pdrop",),
        "attention_dropout": ("attn_pdrop",),
        "init_std": ("initializer_range",),
        "tied": ("tie_word_embeddings",),
    },
    values={"activation": ("activation_function", {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"})},
    ours={
        "kv_heads": None,
        "head_dim": None,
        "positions": "learned",
        "position_offset": 0,
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "norm_placement": "pre",
        "embed_norm": False,
        "qk_norm": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": False,
        "scale_embedding": False,
        "logit_softcap": None,
    },
    theirs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    defaults={"vocab_size": 50257, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    tensors=(
        TensorRule("transformer.wte.weight", ("embed.tokens.weight",)),
        TensorRule("transformer.wpe.weight", ("embed.positions.weight",)),
        TensorRule("transformer.h.{n}.ln_1.weight", ("blocks.{n}.attention_norm.weight",)),
        TensorRule("transformer.h.{n}.ln_1.bias", ("blocks.{n}.attention_norm.bias",)),
        TensorRule(
            "transformer.h.{n}.attn.c_attn.weight",
            ("blocks.{n}.attention.q.weight", "blocks.{n}.attention.k.weight", "blocks.{n}.attention.v.weight"),
            transpose=True,
        ),
        TensorRule(
            "transformer.h.{n}.attn.c_attn.bias",
            ("blocks.{n}.attention.q.bias", "blocks.{n}.attention.k.bias", "blocks.{n}.attention.v.bias"),
        ),
        TensorRule("transformer.h.{n}.attn.c_proj.weight", ("blocks.{n}.attention.out.weight",), transpose=True),
        TensorRule("transformer.h.{n}.attn.c_proj.bias", ("blocks.{n}.attention.out.bias",)),
        TensorRule("transformer.h.{n}.ln_2.weight", ("blocks.{n}.mlp_norm.weight",)),
        TensorRule("transformer.h.{n}.ln_2.bias", ("blocks.{n}.mlp_norm.bias",)),
        TensorRule("transformer.h.{n}.mlp.c_fc.weight", ("blocks.{n}.mlp.up.weight",), transpose=True),
        TensorRule("transformer.h.{n}.mlp.c_fc.bias", ("blocks.{n}.mlp.up.bias",)),
        TensorRule("transformer.h.{n}.mlp.c_proj.weight", ("blocks.{n}.mlp.down.weight",), transpose=True),
        TensorRule("transformer.h.{n}.mlp.c_proj.bias", ("blocks.{n}.mlp.down.bias",)),
        TensorRule("transformer.ln_f.weight", ("final_norm.weight",)),
        TensorRule("transformer.ln_f.bias", ("final_norm.bias",)),
        TensorRule("lm_head.weight", ("head.weight",)),
        *class_rules("score", "classifier"),
    ),
    tied=("lm_head.weight", "transformer.wte.weight"),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)

FAMILY = Family(GPT2Config, LanguageModel, HUGGINGFACE)
