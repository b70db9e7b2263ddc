"""What a family is: its config class, how to build it, and its Hugging Face map as data.

A family's own file makes one `Family`; families.py merges them into a table; interop/huggingface.py reads the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwright.model.transformer import LanguageModel, TransformerConfig


@dataclass(frozen=True)
class TensorRule:
    """One tensor of theirs is ours laid one after the other along dim 0, and transposed if so said.

    `{n}` in a name stands for the number of a layer, `{last}` for that of the last one, `{m}` for that of a decoder's
    where there are two stacks: theirs begin at 0, ours go on from the encoder's. row: theirs is a matrix of one row.
    by_heads: ours lie one after the other within each head of theirs. shape: theirs, by our config, where it has dims
    that ours joins. when: (attribute of the config, its value) that the rule is for.
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    row: bool = False
    by_heads: bool = False
    shape: Callable[[Any], tuple[int, ...]] | None = None
    when: tuple[str, Any] | None = None

    def split(self, theirs: Tensor, sizes: Sequence[int], heads: int) -> tuple[Tensor, ...]:
        """Ours, so many rows each, out of theirs, which lies as ours do."""
        if not self.by_heads:
            return theirs.split(list(sizes))
        parts = theirs.unflatten(0, (heads, -1)).split([size // heads for size in sizes], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def join(self, ours: Sequence[Tensor], heads: int) -> Tensor:
        """Theirs of ours, lying as ours do."""
        if self.by_heads:
            return torch.cat([part.unflatten(0, (heads, -1)) for part in ours], dim=1).flatten(0, 1)
        return torch.cat(list(ours)) if len(ours) > 1 else ours[0]


class OneOf:
    """Values that mean the same to us; the first is what we write."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return other in self.values

    def __repr__(self) -> str:
        return repr(self.values[0])

    __hash__ = None  # type: ignore[assignment]


class Whatever(OneOf):
    """Any value means the same to us; the first is written even where it is null, since their default would not fit."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


def weight_and_bias(theirs: str, ours: str) -> tuple[TensorRule, TensorRule]:
    """The two tensors of a linear layer or norm; a rule for one that a model lacks falls away."""
    return TensorRule(f"{theirs}.weight", (f"{ours}.weight",)), TensorRule(f"{theirs}.bias", (f"{ours}.bias",))


def class_variants(stem: str) -> dict[str, dict[str, Any]]:
    """The architectures that tell classes, of a family whose others begin with `stem`."""
    return {
        f"{stem}ForSequenceClassification": {"classify": "text"},
        f"{stem}ForTokenClassification": {"classify": "tokens"},
    }


def class_rules(text: str, tokens: str, pooler: str | None = None) -> tuple[TensorRule, ...]:
    """Their classifiers of texts and of tokens, and the layer before that of texts."""
    ours = "head.label.classifier"
    named = ((text, "text"), (tokens, "tokens"))
    rules = [replace(r, when=("classify", of)) for theirs, of in named for r in weight_and_bias(theirs, ours)]
    return (*rules, *(weight_and_bias(pooler, "head.label.pooler.dense") if pooler else ()))


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
    theirs: their keys that must have these values (one of `OneOf`), or be absent.
    read, write: what no table can say: fields of ours from a config.json, and sections of theirs from our config.
    classifying: as `theirs`, of architectures that tell classes.
    defaults: what their keys are where a config.json leaves them out.
    tensors: every tensor. tied: their head and embedding, one tensor where the head is tied. copies: other names of the
    embedding, which their files may have. zero: tensors that a model without a place for them may have as zeros, and
    what says that it has one. spare: tensors of other heads, which published files have beside those of the
    architecture that they name; passed over by a model without a place for them.
    prefix: what the names lack in checkpoints of the bare stack. ignored: endings of buffers that carry nothing.
    aliases: beginnings of their names that other versions use -> those of `tensors`.
    beside: by folder inside theirs, what else of theirs our model holds.
    lacks: our fields as their code computes them, where it lacks a part whose weights it carries; what they compute is
    to be compared with that.
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
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda raw: {}
    write: Callable[[Any], Mapping[str, Mapping[str, Any]]] = lambda config: {}
    classifying: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: tuple[str, str] = ("", "")
    copies: tuple[str, ...] = ()
    zero: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[str, ...] = ()
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """A second model of theirs that is in ours as well, as ELECTRA's generator is.

    Fields and tensors that both name are equal in both. `absent`: our fields where there is no such folder. `method`:
    what of our model gives its logits.
    """

    map: HuggingFaceMap
    absent: Mapping[str, Any]
    method: str


class Extra(NamedTuple):
    """What a family costs beyond what count.py knows. FLOPs are those of one sequence's forward pass."""

    flops: tuple[float, ...] = ()  # through a block, `runs` by `runs`
    embed: float = 0.0  # through the layer of the embedding
    constant: float = 0.0  # of all these, products with what has no gradient: half of their backward pass is left out
    values: float = 0.0  # that a block keeps for its backward pass, a token
    fixed: float = 0.0  # that it keeps whatever the number of tokens


@dataclass(frozen=True)
class Family:
    """One line of the family table."""

    config: type[TransformerConfig]
    build: Callable[[Any], LanguageModel]
    huggingface: HuggingFaceMap | None = None
    #: (config, tokens of a sequence, sequences of a micro-batch, share of predicted tokens) -> what `count` has to add.
    extra: Callable[[Any, int, int, float], Extra] = lambda config, length, rows, predicted: Extra()
    #: config -> the objective that it is pre-trained by, as in a run's config; None is the first that trains its kind.
    objective: Callable[[Any], Mapping[str, Any]] | None = None

    @property
    def kind(self) -> str:
        """decoder, encoder or encoder-decoder."""
        return self.config.kind
