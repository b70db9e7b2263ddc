"""Llama (Touvron et al. 2023, Llama 2; Grattafiori et al. 2024, Llama 3): rotary, RMSNorm, SwiGLU, grouped queries.

A line of families.py. Also the home of a modern recipe: `qk_norm`, a tied head or another activation are options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model.family import Family, HuggingFaceMap, TensorRule, class_rules, class_variants, weight_and_bias
from shardwright.model.scaling import ScalingConfig
from shardwright.model.transformer import ActivationName, LanguageModel, TransformerConfig

#: What sizes of 3.1 and of 3.2 have in common.
_SLOWER = {"kind": "llama3", "low": 1.0, "high": 4.0, "length": 8192}
_LONG = {
    "kv_heads": 8,
    "max_length": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {**_SLOWER, "factor": 8.0},
}
_LONGER = {
    **_LONG,
    "tied": True,
    "rope_scaling": {"kind": "llama3", "factor": 32.0, "low": 1.0, "high": 4.0, "length": 8192},
}


class LlamaConfig(TransformerConfig):
    """Llama 2's choices; the sizes of Llama 3 bring their own base and length."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "2-7B": {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 11008},
        "2-13B": {"layers": 40, "width": 5120, "heads": 40, "mlp_width": 13824},
        "2-70B": {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672},
        "3-8B": {
            "layers": 32,
            "width": 4096,
            "heads": 32,
            "kv_heads": 8,
            "mlp_width": 14336,
            "max_length": 8192,
            "rope_theta": 500000.0,
        },
        "3-70B": {
            "layers": 80,
            "width": 8192,
            "heads": 64,
            "kv_heads": 8,
            "mlp_width": 28672,
            "max_length": 8192,
            "rope_theta": 500000.0,
        },
        "3.1-8B": {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 14336, **_LONG},
        "3.1-70B": {"layers": 80, "width": 8192, "heads": 64, "mlp_width": 28672, **_LONG},
        "3.1-405B": {"layers": 126, "width": 16384, "heads": 128, "mlp_width": 53248, **_LONG},
        "3.2-1B": {"layers": 16, "width": 2048, "heads": 32, "mlp_width": 8192, **_LONGER},
        "3.2-3B": {"layers": 28, "width": 3072, "heads": 24, "mlp_width": 8192, **_LONGER},
    }

    family: Literal["llama"] = meaning("llama", "Model family")
    max_length: int = meaning(4096, "Longest sequence", ge=1)
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = meaning("rotary", "How positions enter")
    rope_scaling: ScalingConfig | None = meaning(None, "Slower turns of rotary positions, for longer sequences")
    norm: Literal["layer", "rms"] = meaning("rms", "Kind of norm")
    activation: ActivationName = meaning("swiglu", "Feed-forward activation")
    qkv_bias: bool = meaning(False, "Biases of q, k and v")
    out_bias: bool = meaning(False, "Bias of the attention's output")
    mlp_bias: bool = meaning(False, "Biases of the feed-forward layer")
    tied: bool = meaning(False, "The head is the token embedding")

    @property
    def slower(self) -> ScalingConfig | None:
        """See the base class."""
        return self.rope_scaling


def _layer(theirs: str, ours: str) -> tuple[TensorRule, TensorRule]:
    """Weight and, where there is one, bias of a part of a layer."""
    return weight_and_bias(f"model.layers.{{n}}.{theirs}", f"blocks.{{n}}.{ours}")


#: Our field of a scaling -> their key.
_SCALING = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "length": "original_max_position_embeddings",
}


def read_scaling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` from a config.json, which has it in either of two sections; ValueError for a kind unknown here."""
    given = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        raise ValueError(f"config.json: rope_type={kind!r} is not supported here; expected default, linear or llama3")
    keys = _SCALING if kind == "llama3" else {"factor": "factor"}
    if lacking := [key for key in keys.values() if key not in given]:
        raise ValueError(f"config.json: rope_type={kind!r} needs {lacking[0]} beside it")
    return {"rope_scaling": {"kind": kind, **{ours: given[key] for ours, key in keys.items()}}}


def write_scaling(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """What their config.json has of it, by section; `rope_scaling` is that of older versions."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default"}}
    keys = _SCALING if scaling.kind == "llama3" else {"factor": "factor"}
    said = {"rope_type": scaling.kind, **{key: getattr(scaling, ours) for ours, key in keys.items()}}
    return {"rope_parameters": said, "rope_scaling": said}


HUGGINGFACE = HuggingFaceMap(
    architecture="LlamaForCausalLM",
    model_type="llama",
    variants={"LlamaForCausalLM": {"classify": "none"}, **class_variants("Llama")},
    fields={
        "vocab_size": ("vocab_size",),
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "kv_heads": ("num_key_value_heads",),
        "head_dim": ("head_dim",),
        "mlp_width": ("intermediate_size",),
        "max_length": ("max_position_embeddings",),
        "norm_eps": ("rms_norm_eps",),
        "attention_dropout": ("attention_dropout",),
        "qkv_bias": ("attention_bias",),
        "out_bias": ("attention_bias",),
        "mlp_bias": ("mlp_bias",),
        "init_std": ("initializer_range",),
        "tied": ("tie_word_embeddings",),
        "rope_theta": ("rope_parameters.rope_theta", "rope_theta"),
    },
    values={
        "activation": (
            "hidden_act",
            {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"},
        )
    },
    ours={
        "positions": "rotary",
        "rotary_share": 1.0,
        "norm": "rms",
        "norm_weight": True,
        "norm_placement": "pre",
        "embed_norm": False,
        "qk_norm": False,
        "head_bias": False,
        "scale_embedding": False,
        "logit_softcap": None,
        "embed_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    read=read_scaling,
    write=write_scaling,
    defaults={
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    tensors=(
        TensorRule("model.embed_tokens.weight", ("embed.tokens.weight",)),
        *_layer("input_layernorm", "attention_norm"),
        *_layer("self_attn.q_proj", "attention.q"),
        *_layer("self_attn.k_proj", "attention.k"),
        *_layer("self_attn.v_proj", "attention.v"),
        *_layer("self_attn.o_proj", "attention.out"),
        *_layer("post_attention_layernorm", "mlp_norm"),
        *_layer("mlp.gate_proj", "mlp.gate"),
        *_layer("mlp.up_proj", "mlp.up"),
        *_layer("mlp.down_proj", "mlp.down"),
        TensorRule("model.norm.weight", ("final_norm.weight",)),
        TensorRule("lm_head.weight", ("head.weight",)),
        *class_rules("score", "score"),
    ),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)

FAMILY = Family(LlamaConfig, LanguageModel, HUGGINGFACE)
