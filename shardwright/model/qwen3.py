"""Qwen3, the dense ones (Yang et al. 2025): Llama's blocks with a norm of each head's queries and keys, no biases.

A line of families.py. All published sizes have 8 key heads of 128, whatever the width; the small ones tie the head to
the embedding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model import llama
from shardwright.model.family import Family, TensorRule, class_variants
from shardwright.model.transformer import LanguageModel

_HEADS = {"kv_heads": 8, "head_dim": 128}


class Qwen3Config(llama.LlamaConfig):
    """Qwen3's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "0.6B": {"layers": 28, "width": 1024, "heads": 16, "mlp_width": 3072, **_HEADS, "tied": True},
        "1.7B": {"layers": 28, "width": 2048, "heads": 16, "mlp_width": 6144, **_HEADS, "tied": True},
        "4B": {"layers": 36, "width": 2560, "heads": 32, "mlp_width": 9728, **_HEADS, "tied": True},
        "8B": {"layers": 36, "width": 4096, "heads": 32, "mlp_width": 12288, **_HEADS},
        "14B": {"layers": 40, "width": 5120, "heads": 40, "mlp_width": 17408, **_HEADS},
        "32B": {"layers": 64, "width": 5120, "heads": 64, "mlp_width": 25600, **_HEADS},
    }

    family: Literal["qwen3"] = meaning("qwen3", "Model family")  # type: ignore[assignment]
    max_length: int = meaning(40960, "Longest sequence", ge=1)
    rope_theta: float = meaning(1e6, "Base of the rotary angles", gt=0)
    norm_eps: float = meaning(1e-6, "Added to the variance", gt=0)
    qk_norm: bool = meaning(True, "Norm of each head's queries and keys")


def _norm(theirs: str, ours: str) -> TensorRule:
    return TensorRule(f"model.layers.{{n}}.self_attn.{theirs}.weight", (f"blocks.{{n}}.attention.{ours}.weight",))


_LLAMA = llama.HUGGINGFACE
HUGGINGFACE = replace(
    _LLAMA,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    variants={"Qwen3ForCausalLM": {"classify": "none"}, **class_variants("Qwen3")},
    fields={field: keys for field, keys in _LLAMA.fields.items() if field != "mlp_bias"},
    ours={**_LLAMA.ours, "qk_norm": True, "mlp_bias": False},
    theirs={**_LLAMA.theirs, "use_sliding_window": False},
    defaults={
        "vocab_size": 151936,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    tensors=(*_LLAMA.tensors, _norm("q_norm", "q_norm"), _norm("k_norm", "k_norm")),
)

FAMILY = Family(Qwen3Config, LanguageModel, HUGGINGFACE)
