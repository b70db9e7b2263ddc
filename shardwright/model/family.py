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

    `{n}` in a name stands for the number of a layer. `shape`: theirs, by our config, where it has dims that ours joins
    (after transposing).
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    shape: Callable[[Any], tuple[int, ...]] | None = None


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
    values: our config field -> (their key, {our value: their value}).
    ours: config fields of ours that their format cannot say otherwise.
    theirs: their keys that must have these values, or be absent.
    defaults: what their keys are where a config.json leaves them out.
    tensors: every tensor. tied: their head and embedding, one tensor where the head is tied.
    prefix: what the names lack in checkpoints of the bare stack. ignored: endings of buffers that carry nothing.
    beside: by folder inside theirs, what else of theirs our model holds.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, tuple[str, ...]]
    tensors: tuple[TensorRule, ...]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shifts: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, tuple[str, Mapping[Any, Any]]] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[str, str] = ("", "")
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    beside: Mapping[str, Beside] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """A second model of theirs that is in ours as well, as ELECTRA's generator is: fields and tensors that both name are
    equal in both. `absent`: our fields where there is no such folder.
    """

    map: HuggingFaceMap
    absent: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One line of the family table."""

    config: type[TransformerConfig]
    build: Callable[[Any], LanguageModel]
    huggingface: HuggingFaceMap | None = None
