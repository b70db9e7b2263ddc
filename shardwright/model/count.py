"""What a model costs: parameters by part, FLOPs a token, bytes of saved activations a block.

Parameters are counted on the modules themselves, which take no memory on the meta device; the rest is arithmetic on a
config. The tests hold it against Hugging Face's counts, torch's FLOP counter and what autograd saves.
A multiplication and an addition are two FLOPs; element-wise work, norms and the softmax are not counted.
Symbols: D width, F feed-forward width, L layers, H heads, K key heads, d head width, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from shardwright.model.electra import ElectraConfig
from shardwright.model.encoder import EncoderConfig
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import TransformerConfig

#: Part of a parameter count -> what a component of a parameter's name may be; the first part that knows one has it.
PARTS: dict[str, tuple[str, ...]] = {
    "norms": (
        "norm",
        "attention_norm",
        "cross_norm",
        "mlp_norm",
        "q_norm",
        "k_norm",
        "encoder_norm",
        "final_norm",
        "convolution_norm",
    ),
    "tokens": ("tokens", "projection"),
    "positions": ("positions", "token_types", "encoder_relative", "decoder_relative", "relative", "query"),
    "attention": ("attention", "cross"),
    "mlp": ("mlp", "convolution"),
    "head": ("head",),
}


def num_parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters by part (the head's own alone: 0 where it is the token embedding), and their total."""
    parts = dict.fromkeys(PARTS, 0)
    for name, shape in parameter_shapes(config).items():
        components = set(name.split("."))
        part = next(part for part, words in PARTS.items() if components.intersection(words))
        parts[part] += math.prod(shape)
    return {**parts, "total": sum(parts.values())}


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in the model's order, from its modules on the meta device."""
    with torch.device("meta"):
        one = build_model(config.one_of_each())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in one.named_parameters():
        first, _, rest = name.partition(".")
        kind, _, rest = rest.partition(".")
        names = [f"blocks.{n}.{rest}" for n in config.runs[int(kind)]] if first == "blocks" else [name]
        shapes |= dict.fromkeys(names, tuple(parameter.shape))
    return shapes


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


def num_flops(
    config: TransformerConfig,
    length: int,
    *,
    causal: bool | None = None,
    recomputed: int = 0,
    predicted: float = 1.0,
    target: int | None = None,
    rows: int = 1,
) -> Flops:
    """FLOPs a token at sequences of `length` tokens, `rows` a micro-batch, `recomputed` blocks being run twice.

    Forward: 2 x (matrix weights of the blocks) + 2 D V for the head + L x attention, where attention is
    2 products x 2 x H d x (keys a query sees): T in full, (T + 1) / 2 on average when the causal half alone
    is counted (by default, unless `causal` is false). The head and its transform see the share `predicted` of the
    tokens. Backward is twice the forward. Embedding look-ups are free. (Kaplan et al. 2020, Chowdhery et al. 2022:
    6 N + 12 L H d T is this in full.) Beside a source of `length` tokens an encoder-decoder has a target of `target`,
    by default as many; a token is one of the source's.
    """
    target = length if target is None else target
    half = causal is None or causal
    each = block_flops(config, length, target, half, rows, predicted)
    runs = [len(run) * config.repeats * flops for run, flops in zip(config.runs, each, strict=True)]
    predicting = target if isinstance(config, EncoderDecoderConfig) else length
    blocks = sum(runs) / length
    extra = FAMILIES[config.family].extra(config, length, rows, predicted)
    forward = blocks + extra.embed / length + head_flops(config, length, predicted * predicting / length)
    return Flops(
        forward, 2 * forward - extra.constant / length, recomputed * blocks / (config.num_blocks * config.repeats)
    )


def block_flops(
    config: TransformerConfig,
    length: int,
    target: int,
    causal_half: bool = True,
    rows: int = 1,
    predicted: float = 1.0,
) -> list[float]:
    """FLOPs of the forward pass of one sequence through a block of each kind, `runs` by `runs`; see `num_flops`."""
    inner, kv = config.heads * config.head_width, config.num_kv_heads * config.head_width
    projections = config.width * (2 * inner + 2 * kv)
    matrices = 2.0 * (projections + (3 if config.gated else 2) * config.width * config.hidden_width)

    def stack(tokens: int, causal: bool) -> float:
        keys = (tokens + 1) / 2 if causal and causal_half else tokens
        return tokens * (matrices + 4.0 * inner * keys)

    if not isinstance(config, EncoderDecoderConfig):
        more = FAMILIES[config.family].extra(config, length, rows, predicted).flops or (0.0,) * len(config.runs)
        return [stack(length, config.causal) + one for one in more]
    cross = 2.0 * config.width * (2 * inner * target + 2 * kv * length) + 4.0 * inner * target * length
    return [stack(length, False), stack(target, True) + cross]


def head_flops(c: TransformerConfig, length: int, predicted: float) -> float:
    """Of the heads, a token: that of tokens on the share `predicted`, that of pairs or texts once a sequence."""
    if c.classify != "none":
        pooler = c.width * (c.classify == "text" and c.class_pooler is not None)
        return 2.0 * c.width * (pooler + c.classes) / (length if c.classify == "text" else 1)
    if isinstance(c, ElectraConfig):  # whether each token was replaced
        return 2.0 * c.width * (c.width + 1)
    tokens = 2.0 * c.token_width * c.vocab_size
    if not isinstance(c, EncoderConfig):
        return predicted * tokens
    transform = 2.0 * c.width * c.token_width * c.head_transform
    pairs = 2.0 * c.width * (c.width + 2) * c.sentence_head
    projection = 2.0 * c.token_width * c.width * (c.embed_width is not None)
    return predicted * (tokens + transform) + pairs / length + projection


def score_bias_bytes(config: TransformerConfig, rows: int, length: int, target: int, *, value_bytes: int) -> int:
    """Bytes of the biases of scores that all blocks of a stack share, masks among them: H T^2 a row and stack."""
    places = length**2 + (target**2 if len(config.runs) > 1 else 0)
    return rows * config.heads * places * value_bytes if config.biased_scores else 0


def activation_bytes(
    config: TransformerConfig,
    tokens: int,
    *,
    value_bytes: int,
    recomputed: bool = False,
    memory: int | None = None,
    length: int | None = None,
) -> int:
    """Bytes that one block keeps for its backward pass of `tokens` tokens, of `value_bytes` a value.

    Values a token, without a compiler: both norms' inputs and outputs (4 D), q, k, v and the attention's output
    (2 H d + 2 K d), and of the feed-forward layer its pre-activation and the input of `down` (2 F), or gate,
    activated gate, up and their product (4 F), one less where the activation is a ReLU, which goes back through its
    own result. Norms of queries and keys keep their inputs (H d + K d). Plus float32 statistics: one a head
    (log-sum-exp), one (RMS) or two (mean and deviation) a norm, of which queries and keys have one a head. Dropout is
    recomputed from its keys but keeps a bool a value and site.
    `length`: tokens of a sequence, the longest by default; it matters where a family keeps something for each pair.
    A recomputed block keeps its input alone. A compiled block keeps less: what is cheap it computes again. Where
    torch has no fused RMSNorm (CPU), each keeps D values more. `memory`: tokens of the source that a decoder's block
    attends to as well, with a third norm and the keys and values of these.
    """
    c = config
    if recomputed:
        return tokens * c.width * value_bytes
    inner, kv, parts = c.heads * c.head_width, c.num_kv_heads * c.head_width, 2 if memory is None else 3
    hidden = ((4 if c.gated else 2) - (c.activation in ("relu", "reglu"))) * c.hidden_width
    normed = c.qk_norm * ((parts - 1) * c.heads + c.num_kv_heads)  # heads that have norms of their own
    values = 2 * parts * c.width + 2 * (parts - 1) * inner + 2 * kv + hidden + normed * c.head_width
    moments = 2 if c.norm == "layer" else 1
    statistics = (parts - 1) * c.heads + (parts + normed) * moments
    masks = parts * c.width if c.residual_dropout else 0
    length = length or c.max_length
    extra = FAMILIES[c.family].extra(c, length, max(tokens // length, 1), 1.0)
    source = (2 + c.qk_norm) * kv * value_bytes + c.qk_norm * c.num_kv_heads * moments * 4  # keys and values, a token
    more = int(tokens * extra.values + extra.fixed) * value_bytes + (memory or 0) * source
    return tokens * (values * value_bytes + statistics * 4 + masks) + more
