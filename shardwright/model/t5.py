"""T5 (Raffel et al. 2020): relative biases in place of positions, RMSNorm before each part, no biases, unscaled scores.

A line of families.py; sizes are those that Google published: version 1.0 (ReLU, the head is the token embedding,
logits over the root of the width) and version 1.1 (gated GELU, a head of its own). A bias of each head and bucket of
distances is added to the scores of all blocks of a stack alike. Dropout is 0 by default, as in all families.
Shapes: B batch, T queries, S keys, H heads.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model.attention import Cache
from shardwright.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from shardwright.model.family import Family, HuggingFaceMap, TensorRule
from shardwright.model.position import distance_bucket
from shardwright.model.transformer import ActivationName, Context, Inputs

_NEWER: dict[str, Any] = {"head_dim": 64, "activation": "geglu_tanh", "tied": False, "scale_logits": False}


class T5Config(EncoderDecoderConfig):
    """The choices of version 1.0; the sizes of 1.1 bring theirs."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {"layers": 6, "width": 512, "heads": 8, "head_dim": 64, "mlp_width": 2048},
        "base": {"layers": 12, "width": 768, "heads": 12, "head_dim": 64, "mlp_width": 3072},
        "large": {"layers": 24, "width": 1024, "heads": 16, "head_dim": 64, "mlp_width": 4096},
        "3B": {"layers": 24, "width": 1024, "heads": 32, "head_dim": 128, "mlp_width": 16384},
        "11B": {"layers": 24, "width": 1024, "heads": 128, "head_dim": 128, "mlp_width": 65536},
        "v1.1-small": {"layers": 8, "width": 512, "heads": 6, "mlp_width": 1024, **_NEWER},
        "v1.1-base": {"layers": 12, "width": 768, "heads": 12, "mlp_width": 2048, **_NEWER},
        "v1.1-large": {"layers": 24, "width": 1024, "heads": 16, "mlp_width": 2816, **_NEWER},
        "v1.1-XL": {"layers": 24, "width": 2048, "heads": 32, "mlp_width": 5120, **_NEWER},
        "v1.1-XXL": {"layers": 24, "width": 4096, "heads": 64, "mlp_width": 10240, **_NEWER},
    }
    score_scale: ClassVar[float | None] = 1.0
    biased_scores: ClassVar[bool] = True

    family: Literal["t5"] = meaning("t5", "Model family")
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = meaning("none", "How positions enter")
    relative_buckets: int = meaning(32, "Buckets of distances, each with a bias for every head", ge=4)
    relative_distance: int = meaning(128, "Distance from which on all are in the last bucket", ge=2)
    norm: Literal["layer", "rms"] = meaning("rms", "Kind of norm")
    norm_eps: float = meaning(1e-6, "Added to the variance", gt=0)
    activation: ActivationName = meaning("relu", "Feed-forward activation")
    qkv_bias: bool = meaning(False, "Biases of q, k and v")
    out_bias: bool = meaning(False, "Bias of the attention's output")
    mlp_bias: bool = meaning(False, "Biases of the feed-forward layer")
    scale_logits: bool = meaning(True, "Hidden states over the root of the width before the head")
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("t5", "Initialisation")


class RelativeBias(nn.Module):
    """A bias of every head for every bucket of distances; head counts are read off the weight."""

    def __init__(self, config: T5Config, *, bidirectional: bool) -> None:
        super().__init__()
        self.buckets, self.distance = config.relative_buckets, config.relative_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(self.buckets, config.heads).normal_(std=config.width**-0.5))

    def forward(self, offsets: Tensor) -> Tensor:
        """Places of keys less those of queries [T, S] -> [1, H, T, S]."""
        bucket = distance_bucket(offsets, self.buckets, self.distance, bidirectional=self.bidirectional)
        return F.embedding(bucket, self.weight).permute(2, 0, 1).unsqueeze(0)


class T5(EncoderDecoder):
    """An encoder-decoder whose stacks have relative biases, each one table of them."""

    shared_tables: ClassVar[tuple[str, ...]] = ("encoder_relative", "decoder_relative")

    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.encoder_relative = RelativeBias(config, bidirectional=True)
        self.decoder_relative = RelativeBias(config, bidirectional=False)

    def context(self, inputs: Inputs, cache: Cache | None = None) -> Context:
        """As of any encoder-decoder, the biases added to the masks of the stacks that are here."""
        context, past = super().context(inputs, cache), cache.length if cache else 0
        source, target = (bool(self.numbered(run)) for run in self.config.runs)
        if target:
            length = inputs.input_ids.shape[1]
            offsets = place_offsets(inputs.row_index, inputs.key_index, past, length, inputs.input_ids.device)
            context = add_bias(context, self.decoder_relative(offsets), offsets)
        if source and context.encoder is not None:
            assert inputs.encoder_ids is not None
            length, device = inputs.encoder_ids.shape[1], inputs.encoder_ids.device
            offsets = place_offsets(inputs.encoder_row_index, inputs.encoder_key_index, 0, length, device)
            encoder = add_bias(context.encoder, self.encoder_relative(offsets), offsets)
            context = context._replace(encoder=encoder)
        return context

    def enter(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """Biases come in together with the activations, for the sake of zero-bubble schedules; see `_Together`."""
        encoder = context.encoder
        x, mask, source_mask = _Together.apply(x, context.mask, None if encoder is None else encoder.mask)
        return x, context._replace(mask=mask, encoder=encoder and encoder._replace(mask=source_mask))


class _Together(torch.autograd.Function):
    """Tensors as they are, which to autograd come out of one operation.

    torch's split of a backward pass (gradients of activations first, those of weights later) goes back from every place
    where a weight meets the activations, through all that lies between them. A table that several blocks read meets
    them in each; behind this it does so once, before the first.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The same tensors."""
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Their gradients."""
        return grads


def place_offsets(
    row_index: Tensor | None, key_index: Tensor | None, past: int, length: int, device: torch.device
) -> Tensor:
    """Place of each key less that of each query [T, S]; indices [.., T] and [.., S] are the same in all rows."""
    queries = torch.arange(past, past + length, device=device) if row_index is None else torch.atleast_2d(row_index)[0]
    keys = torch.arange(past + length, device=device) if key_index is None else torch.atleast_2d(key_index)[0]
    return keys - queries.unsqueeze(-1)


def add_bias(context: Context, bias: Tensor, offsets: Tensor) -> Context:
    """The same with `bias` [1, H, T, S] where its mask lets a query see a key, -inf elsewhere."""
    mask = context.mask
    if mask is None and context.causal:
        mask = offsets <= 0  # the kernel's own rule holds without a mask alone
    return context._replace(mask=bias if mask is None else torch.where(mask, bias, float("-inf")))


def _part(theirs: str, ours: str) -> TensorRule:
    return TensorRule(f"{theirs}.weight", (f"{ours}.weight",))


def _attention(theirs: str, ours: str) -> tuple[TensorRule, ...]:
    parts = {"q": "q", "k": "k", "v": "v", "o": "out"}
    return tuple(_part(f"{theirs}.{t}", f"{ours}.{o}") for t, o in parts.items())


def _mlp(theirs: str, ours: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{theirs}.wi.weight", (f"{ours}.up.weight",), when=("gated", False)),
        TensorRule(f"{theirs}.wi_0.weight", (f"{ours}.gate.weight",), when=("gated", True)),
        TensorRule(f"{theirs}.wi_1.weight", (f"{ours}.up.weight",), when=("gated", True)),
        _part(f"{theirs}.wo", f"{ours}.down"),
    )


_ENCODER, _DECODER = "encoder.block.{n}.layer", "decoder.block.{m}.layer"
HUGGINGFACE = HuggingFaceMap(
    architecture="T5ForConditionalGeneration",
    model_type="t5",
    fields={
        "vocab_size": ("vocab_size",),
        "layers": ("num_layers",),
        "decoder_layers": ("num_decoder_layers",),
        "width": ("d_model",),
        "heads": ("num_heads",),
        "head_dim": ("d_kv",),
        "mlp_width": ("d_ff",),
        "max_length": ("n_positions",),
        "relative_buckets": ("relative_attention_num_buckets",),
        "relative_distance": ("relative_attention_max_distance",),
        "norm_eps": ("layer_norm_epsilon",),
        "embed_dropout": ("dropout_rate",),
        "residual_dropout": ("dropout_rate",),
        "tied": ("tie_word_embeddings",),
        # What Hugging Face has made of the same key, where it wrote the file.
        "scale_logits": ("scale_decoder_outputs", "tie_word_embeddings"),
    },
    values={
        "activation": (
            "feed_forward_proj",
            {
                "relu": "relu",
                "gelu": "gelu",
                "gelu_tanh": "gelu_new",
                "silu": "silu",
                "geglu_tanh": "gated-gelu",
                "swiglu": "gated-silu",
                "reglu": "gated-relu",
            },
        )
    },
    ours={
        "kv_heads": None,
        "positions": "none",
        "norm": "rms",
        "norm_weight": True,
        "norm_placement": "pre",
        "embed_norm": False,
        "qk_norm": False,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "head_bias": False,
        "scale_embedding": False,
        "logit_softcap": None,
        "classify": "none",
    },
    theirs={"is_encoder_decoder": True},
    defaults={
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "dropout_rate": 0.1,
        "tie_word_embeddings": True,
    },
    tensors=(
        _part("shared", "embed.tokens"),
        _part("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "encoder_relative"),
        _part("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "decoder_relative"),
        _part(f"{_ENCODER}.0.layer_norm", "blocks.{n}.attention_norm"),
        *_attention(f"{_ENCODER}.0.SelfAttention", "blocks.{n}.attention"),
        _part(f"{_ENCODER}.1.layer_norm", "blocks.{n}.mlp_norm"),
        *_mlp(f"{_ENCODER}.1.DenseReluDense", "blocks.{n}.mlp"),
        _part("encoder.final_layer_norm", "encoder_norm"),
        _part(f"{_DECODER}.0.layer_norm", "blocks.{m}.attention_norm"),
        *_attention(f"{_DECODER}.0.SelfAttention", "blocks.{m}.attention"),
        _part(f"{_DECODER}.1.layer_norm", "blocks.{m}.cross_norm"),
        *_attention(f"{_DECODER}.1.EncDecAttention", "blocks.{m}.cross"),
        _part(f"{_DECODER}.2.layer_norm", "blocks.{m}.mlp_norm"),
        *_mlp(f"{_DECODER}.2.DenseReluDense", "blocks.{m}.mlp"),
        _part("decoder.final_layer_norm", "final_norm"),
        _part("lm_head", "head"),
    ),
    tied=("lm_head.weight", "shared.weight"),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ignored=(".EncDecAttention.relative_attention_bias.weight",),
)

FAMILY = Family(T5Config, T5, HUGGINGFACE)
