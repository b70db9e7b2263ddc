"""What a model costs, in closed form: parameters by part, FLOPs a token, bytes of saved activations a block.

Pure arithmetic on a config; the tests hold it against real modules, Hugging Face's counts and torch's FLOP counter.
A multiplication and an addition are two FLOPs; element-wise work, norms and the softmax are not counted.
Symbols: D width, F feed-forward width, L layers, H heads, K key heads, d head width, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from shardwright.model.transformer import TransformerConfig


def num_parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters by part: tokens, positions, attention, mlp, norms, head (0 where tied), and their total."""
    c = config
    inner = (c.heads + 2 * c.num_kv_heads) * c.head_width
    attention = c.width * inner + c.qkv_bias * inner + c.heads * c.head_width * c.width + c.out_bias * c.width
    matrices = 3 if c.gated else 2
    mlp = matrices * c.width * c.hidden_width + c.mlp_bias * ((matrices - 1) * c.hidden_width + c.width)
    parts = {
        "tokens": c.vocab_size * c.width,
        "positions": c.max_length * c.width if c.positions == "learned" else 0,
        "attention": c.layers * attention,
        "mlp": c.layers * mlp,
        "norms": _num_norm_parameters(c),
        "head": (not c.tied) * c.vocab_size * c.width + c.head_bias * c.vocab_size,
    }
    return {**parts, "total": sum(parts.values())}


def _num_norm_parameters(c: TransformerConfig) -> int:
    wide = 2 * c.layers + (c.norm_placement == "pre") + c.embed_norm
    vectors = c.norm_weight * (2 if c.norm == "layer" and c.norm_bias else 1)
    return wide * vectors * c.width + c.qk_norm * 2 * c.layers * c.head_width


class Flops(NamedTuple):
    """FLOPs of one token in one training step."""

    forward: float
    backward: float
    recompute: float  # forward passes repeated by activation checkpointing

    @property
    def model(self) -> float:
        """Forward and backward alone: what MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """All that the device computes: what HFU counts."""
        return self.model + self.recompute


def num_flops(config: TransformerConfig, length: int, *, causal: bool = True, recomputed: int = 0) -> Flops:
    """FLOPs a token at sequences of `length` tokens, `recomputed` blocks being run twice.

    Forward: 2 x (matrix weights of the blocks) + 2 D V for the head + L x attention, where attention is
    2 products x 2 x H d x (keys a query sees): T in full, (T + 1) / 2 on average when the causal half alone
    is counted. Backward is twice the forward. Embedding look-ups are free. (Kaplan et al. 2020, Chowdhery
    et al. 2022: 6 N + 12 L H d T is this in full.)
    """
    c = config
    inner = c.heads * c.head_width
    matrices = c.width * (2 * inner + 2 * c.num_kv_heads * c.head_width)
    matrices += (3 if c.gated else 2) * c.width * c.hidden_width
    keys = (length + 1) / 2 if causal else length
    block = 2.0 * matrices + 4.0 * inner * keys
    forward = c.layers * block + 2.0 * c.width * c.vocab_size
    return Flops(forward, 2 * forward, recomputed * block)


def activation_bytes(config: TransformerConfig, tokens: int, *, value_bytes: int, recomputed: bool = False) -> int:
    """Bytes that one block keeps for its backward pass of `tokens` tokens, of `value_bytes` a value.

    Values a token, without a compiler: both norms' inputs and outputs (4 D), q, k, v and the attention's output
    (2 H d + 2 K d), and of the feed-forward layer its pre-activation and the input of `down` (2 F), or gate,
    activated gate, up and their product (4 F). Norms of queries and keys keep their inputs (H d + K d). Plus float32
    statistics: one a head (log-sum-exp), one (RMS) or two (mean and deviation) a norm, of which queries and keys have
    one a head. Dropout is recomputed from its keys but keeps a bool a value and site.
    A recomputed block keeps its input alone. A compiled block keeps less: what is cheap it computes again. Where
    torch has no fused RMSNorm (CPU), each keeps D values more.
    """
    c = config
    if recomputed:
        return tokens * c.width * value_bytes
    values = 4 * c.width + 2 * (c.heads + c.num_kv_heads) * c.head_width + (4 if c.gated else 2) * c.hidden_width
    heads = c.qk_norm * (c.heads + c.num_kv_heads)  # that have norms of their own
    values += heads * c.head_width
    statistics = c.heads + (2 + heads) * (2 if c.norm == "layer" else 1)
    masks = 2 * c.width if c.residual_dropout else 0
    return tokens * (values * value_bytes + statistics * 4 + masks)
