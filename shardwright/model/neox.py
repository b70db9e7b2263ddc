"""GPT-NeoX (Black et al. 2022): attention and feed-forward layer side by side, rotary positions of a quarter of a head.

A line of families.py. Sizes are the paper's 20B and those of Pythia (Biderman et al. 2023), whose architecture it is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model.attention import LayerCache
from shardwright.model.family import (
    Extra,
    Family,
    HuggingFaceMap,
    TensorRule,
    class_rules,
    class_variants,
    weight_and_bias,
)
from shardwright.model.transformer import ActivationName, Block, Context, LanguageModel, TransformerConfig


class NeoXConfig(TransformerConfig):
    """The paper's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "70M": {"layers": 6, "width": 512, "heads": 8},
        "160M": {"layers": 12, "width": 768, "heads": 12},
        "410M": {"layers": 24, "width": 1024, "heads": 16},
        "1B": {"layers": 16, "width": 2048, "heads": 8},
        "1.4B": {"layers": 24, "width": 2048, "heads": 16},
        "2.8B": {"layers": 32, "width": 2560, "heads": 32},
        "6.9B": {"layers": 32, "width": 4096, "heads": 32},
        "12B": {"layers": 36, "width": 5120, "heads": 40},
        "20B": {"layers": 44, "width": 6144, "heads": 64},
    }

    family: Literal["neox"] = meaning("neox", "Model family")
    max_length: int = meaning(2048, "Longest sequence", ge=1)
    positions: Literal["rotary"] = meaning("rotary", "How positions enter")
    rotary_share: float = meaning(0.25, "Share of a head's channels that turn", gt=0, le=1)
    norm_placement: Literal["pre"] = meaning("pre", "Norm before each part")
    activation: ActivationName = meaning("gelu", "Feed-forward activation")
    tied: bool = meaning(False, "The head is the token embedding")


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own."""

    def forward(
        self, x: Tensor, context: Context, layer_key: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attended = self.attend(self.attention_norm(x), context, layer_key, cache)
        return x + attended + self.feed(self.mlp_norm(x), context, layer_key)


class NeoX(LanguageModel):
    """A decoder of parallel blocks."""

    def build_block(self, config: Any, number: int) -> nn.Module:
        """One block."""
        return ParallelBlock(config)


def _layer(theirs: str, ours: str) -> tuple[TensorRule, TensorRule]:
    return weight_and_bias(f"gpt_neox.layers.{{n}}.{theirs}", f"blocks.{{n}}.{ours}")


def _fused(kind: str) -> TensorRule:
    """Queries, keys and values of a head lie together, head by head."""
    ours = tuple(f"blocks.{{n}}.attention.{part}.{kind}" for part in "qkv")
    return TensorRule(f"gpt_neox.layers.{{n}}.attention.query_key_value.{kind}", ours, by_heads=True)


HUGGINGFACE = HuggingFaceMap(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    variants={"GPTNeoXForCausalLM": {"classify": "none"}, **class_variants("GPTNeoX")},
    fields={
        "vocab_size": ("vocab_size",),
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "mlp_width": ("intermediate_size",),
        "max_length": ("max_position_embeddings",),
        "norm_eps": ("layer_norm_eps",),
        "attention_dropout": ("attention_dropout",),
        "embed_dropout": ("hidden_dropout",),
        "residual_dropout": ("hidden_dropout",),
        "qkv_bias": ("attention_bias",),
        "out_bias": ("attention_bias",),
        "init_std": ("initializer_range",),
        "tied": ("tie_word_embeddings",),
        "rope_theta": ("rope_parameters.rope_theta", "rotary_emb_base"),
        "rotary_share": ("rope_parameters.partial_rotary_factor", "rotary_pct"),
    },
    values={"activation": ("hidden_act", {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"})},
    ours={
        "kv_heads": None,
        "head_dim": None,
        "norm": "layer",
        "norm_weight": True,
        "norm_bias": True,
        "embed_norm": False,
        "qk_norm": False,
        "mlp_bias": True,
        "head_bias": False,
        "scale_embedding": False,
        "logit_softcap": None,
    },
    theirs={"use_parallel_residual": True, "rope_parameters.rope_type": "default", "rope_scaling": None},
    defaults={"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64},
    tensors=(
        TensorRule("gpt_neox.embed_in.weight", ("embed.tokens.weight",)),
        *_layer("input_layernorm", "attention_norm"),
        *(_fused(kind) for kind in ("weight", "bias")),
        *_layer("attention.dense", "attention.out"),
        *_layer("post_attention_layernorm", "mlp_norm"),
        *_layer("mlp.dense_h_to_4h", "mlp.up"),
        *_layer("mlp.dense_4h_to_h", "mlp.down"),
        *weight_and_bias("gpt_neox.final_layer_norm", "final_norm"),
        TensorRule("embed_out.weight", ("head.weight",)),
        *class_rules("score", "classifier"),
    ),
    tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
    prefix="gpt_neox.",
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    aliases={"lm_head.": "embed_out."},
)

# Both norms of a block read what is kept once.
FAMILY = Family(NeoXConfig, NeoX, HUGGINGFACE, extra=lambda config, *_: Extra(values=-config.width))
