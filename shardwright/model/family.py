"""What a family is: its config class, how to build it, and its Hugging Face map as data.

A family's own file makes one `Family`; families.py merges them into a table; interop/huggingface.py reads the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardwright.model.transformer import LanguageModel, TransformerConfig


@dataclass(frozen=True)
class TensorRule:
    """One tensor of theirs is ours laid one after the other along dim 0, and transposed if so said.

    `{n}` in a name stands for the number of a layer, `{m}` for that of a decoder's where there are two stacks: theirs
    begin at 0, ours go on from the encoder's. row: theirs is a matrix of one row. when: (attribute of the config, its
    value) that the rule is for.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    row: bool = False
    when: tuple[str, Any] | None = None


def weight_and_bias(theirs: str, ours: str) -> tuple[TensorRule, TensorRule]:
    """The two tensors of a linear layer or norm; a rule for one that a model lacks falls away."""
    return TensorRule(f"{theirs}.weight", (f"{ours}.weight",)), TensorRule(f"{theirs}.bias", (f"{ours}.bias",))


@dataclass(frozen=True)
class HuggingFaceMap:
    """How a family is written in Hugging Face's names.

    architecture, model_type: what config.json says. variants: other architectures of the same type, each with our
    fields that it stands for; where it names some, `architecture` is among them.
    fields: our config field -> their keys (a dot goes into a section); all are written, the first found is read.
    shifts: our config field -> how much greater theirs is.
    alike: keys of theirs that must have one value, since one field of ours stands for all of them.
    values: our config field -> (their key, {our value: their value}).
    ours: config fields of ours that their format cannot say otherwise.
    theirs: their keys that must have these values, or be absent.
    defaults: what their keys are where a config.json leaves them out.
    tensors: every tensor. tied: their head and embedding, one tensor where the head is tied. copies: other names of the
    embedding, which their files may have. zero: tensors that a model without a place for them may have as zeros, and
    what says that it has one.
    prefix: what the names lack in checkpoints of the bare stack. ignored: endings of buffers that carry nothing.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, tuple[str, ...]]
    tensors: tuple[TensorRule, ...]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shifts: Mapping[str, int] = field(default_factory=dict)
    alike: tuple[tuple[str, ...], ...] = ()
    values: Mapping[str, tuple[str, Mapping[Any, Any]]] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[str, str] = ("", "")
    copies: tuple[str, ...] = ()
    zero: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One line of the family table."""

    config: type[TransformerConfig]
    build: Callable[[Any], LanguageModel]
    huggingface: HuggingFaceMap | None = None

    @property
    def kind(self) -> str:
        """decoder, encoder or encoder-decoder."""
        return self.config.kind
