"""The Transformer (Vaswani et al. 2017): sinusoidal positions, post-norm, ReLU, one scaled table of tokens for all.

A line of families.py; sizes are the paper's. Its Hugging Face counterpart is Marian, which is the same model: biases in
attention, which the paper leaves open; sines in the first half of the channels and cosines in the second, as in the
paper's own program (tensor2tensor), while its formula has them by turns (`sinusoid: interleaved`, the same model with
channels in another order, which Marian cannot say); activations of Marian's own. The constant that Marian adds to the
logits, which its checkpoints have, is our `head_bias`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model import bart
from shardwright.model.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from shardwright.model.family import Family, HuggingFaceMap
from shardwright.model.transformer import ActivationName


class Transformer2017Config(EncoderDecoderConfig):
    """The paper's choices."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {"layers": 6, "width": 512, "heads": 8},
        "big": {"layers": 6, "width": 1024, "heads": 16},
    }

    family: Literal["transformer"] = meaning("transformer", "Model family")
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = meaning("sinusoidal", "How positions enter")
    norm_placement: Literal["pre", "post"] = meaning("post", "Norm before each part, or after its addition")
    activation: ActivationName = meaning("relu", "Feed-forward activation")
    scale_embedding: bool = meaning(True, "Token vectors times the root of the width")
    init: Literal["gpt2", "bert", "xavier", "he", "t5", "small", "fan_in"] = meaning("xavier", "Initialisation")


HUGGINGFACE = HuggingFaceMap(
    architecture="MarianMTModel",
    model_type="marian",
    fields={**bart.FIELDS, "vocab_size": ("vocab_size", "decoder_vocab_size")},
    alike=(*bart.ALIKE, ("vocab_size", "decoder_vocab_size")),
    values=bart.ACTIVATION,
    ours={**bart.OURS, "positions": "sinusoidal", "sinusoid": "halves", "embed_norm": False, "classify": "none"},
    theirs={**bart.THEIRS, "share_encoder_decoder_embeddings": True},
    defaults={**bart.DEFAULTS, "vocab_size": 58101, "max_position_embeddings": 1024, "scale_embedding": False},
    tensors=bart.TENSORS,
    tied=bart.TIED,
    copies=bart.COPIES,
    zero=bart.ZERO,
    prefix="model.",
    ignored=(".embed_positions.weight",),
)

FAMILY = Family(Transformer2017Config, EncoderDecoder, HUGGINGFACE, objective=lambda config: {"name": "pairs"})
