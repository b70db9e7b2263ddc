"""Crammed BERT (Geiping & Goldstein 2023): the encoder for one GPU in one day.

A line of families.py. Pre-norm with a last norm; no biases in any matrix, nor before the logits; a gated feed-forward
layer that keeps the width of BERT's before the gate, and so has half of it after; sinusoidal positions times one
learned scale, and a norm after the embedding; no transform before the tied head; one kind of segment. The size is that
of the authors' final code (`crammed-bert`). transformers has no such model. The recipe is configs/crammed.yaml.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model.encoder import Encoder, EncoderConfig
from shardwright.model.family import Family
from shardwright.model.transformer import ActivationName


class CrammedConfig(EncoderConfig):
    """The recipe's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 16, "width": 768, "heads": 12, "max_length": 128},
    }

    family: Literal["crammed"] = meaning("crammed", "Model family")
    positions: Literal["learned", "sinusoidal", "scaled", "rotary", "none"] = meaning("scaled", "How positions enter")
    norm_placement: Literal["pre", "post"] = meaning("pre", "Norm before each part, or after its addition")
    activation: ActivationName = meaning("geglu", "Feed-forward activation")
    qkv_bias: bool = meaning(False, "Biases of q, k and v")
    out_bias: bool = meaning(False, "Bias of the attention's output")
    mlp_bias: bool = meaning(False, "Biases of the feed-forward layer")
    head_bias: bool = meaning(False, "Bias of the head")
    head_transform: bool = meaning(False, "A dense layer, activation and norm before the head")
    token_types: int = meaning(0, "Kinds of segments that a token may be of; 0 leaves their vectors out", ge=0)

    @property
    def hidden_width(self) -> int:
        """Feed-forward width: where gated half of the usual four widths, so that both of its matrices make up one."""
        return self.mlp_width or (2 if self.gated else 4) * self.width


FAMILY = Family(CrammedConfig, Encoder)
